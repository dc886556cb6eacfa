"""Runtime checks of annotated shapes and dtypes, enabled only in tests."""

from collections.abc import Callable
import importlib
import importlib.util
import pkgutil
import typing
from typing import Any

import beartype
import jaxtyping

PACKAGES = ("ov_models", "ov_losses")


def install() -> None:
  """Check all calls of functions in PACKAGES, except in tests. Call this before importing them."""
  found = filter(None, map(importlib.util.find_spec, PACKAGES))
  names = [
    f"{spec.name}.{module.name}"
    for spec in found
    for module in pkgutil.iter_modules(spec.submodule_search_locations)
    if not module.name.endswith("_test")
  ]
  if names:
    # While the hook imports a module, Python finds no bytecode of what this module imports in turn.
    # To compile JAX takes 3 seconds.
    importlib.import_module("jax")
  jaxtyping.install_import_hook(names, f"{__name__}.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
  """Check the arguments and the result of a function that have shape annotations.

  Constructors are not checked: JAX rebuilds dataclasses with tracers, shardings or None in them.
  """
  if function.__name__ == "__init__":
    return function
  annotations = function.__annotations__.items()
  function.__annotations__ = {name: of for name, of in annotations if _has_shape(of)}
  return beartype.beartype(function)


def _has_shape(annotation: Any) -> bool:
  return any(map(_has_shape, typing.get_args(annotation))) or (
    isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
  )
