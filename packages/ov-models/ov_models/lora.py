"""Low-rank adapters (LoRA) of kernels.

  params = add_adapters(LoraConfig(rank=8, alpha=16), params, key)   # adds "lora" to the tree
  model = bind(config, merge_adapters(lora, params))

The effective kernel is W + alpha / rank * A B, with A [*, in, r] and B [*, r, out]. B is zero at
the start, so the model is unchanged; freeze W and train A and B only. Paper: Hu et al. 2021,
https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ov_models.config import check_range, check_size

Params = dict[str, Any]

ADAPTERS = "lora"  # key of the adapters in the tree of the parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Config of low-rank adapters.

  Attributes:
    rank: number r of columns of A and rows of B.
    alpha: the product A B is multiplied by alpha / rank.
    include: regexes of the paths of kernels [*, in, out] with adapters; by default the attention
      and MLP kernels of all blocks.
  """

  rank: int
  alpha: float
  include: tuple[str, ...] = (r"(^|/)blocks/(attn|mlp)/\w+/kernel$",)

  def __post_init__(self) -> None:
    check_size("rank", self.rank, 2**16)
    check_range("alpha", self.alpha, 0, 3e38)


def add_adapters(config: LoraConfig, params: Params, key: PRNGKeyArray) -> Params:
  """Return the parameters with fresh adapters as `params["lora"]`.

  A is normal with variance 1 / in, B is zero.

  Args:
    config: configuration of the adapters.
    params: parameters of a model.
    key: random key of A.

  Raises:
    ValueError: `include` matches no kernel, or something else.
  """
  number = iter(range(2**31))

  def create(kernel: jax.Array) -> Params:
    *stack, d_in, d_out = kernel.shape
    drawn = jax.random.normal(
      jax.random.fold_in(key, next(number)), (*stack, d_in, config.rank), jnp.float32
    )
    b = jnp.zeros((*stack, config.rank, d_out), jnp.float32)
    return {"a": drawn * d_in**-0.5, "b": b}

  return {**params, ADAPTERS: _select(config, params, create)}


def adapter_axes(config: LoraConfig, axes: Params) -> Params:
  """Return the logical axes of the tree of `add_adapters`, given those of the model."""

  def of(names: tuple[str | None, ...]) -> Params:
    *stack, d_in, d_out = names
    return {"a": (*stack, d_in, None), "b": (*stack, None, d_out)}

  return {**axes, ADAPTERS: _select(config, axes, of)}


def merge_adapters(config: LoraConfig, params: Params) -> Params:
  """Return the parameters of the model with the adapters added to their kernels.

  Args:
    config: configuration of the adapters.
    params: parameters with or without adapters.
  """
  params = dict(params)
  adapters = params.pop(ADAPTERS, {})
  return _merged(params, adapters, config.alpha / config.rank)


def _merged(params: Params, adapters: Params, scale: float) -> Params:
  merged = dict(params)
  for name, adapter in adapters.items():
    value = params[name]
    if isinstance(value, Mapping):
      merged[name] = _merged(dict(value), adapter, scale)
    else:
      product = jnp.matmul(adapter["a"], adapter["b"], precision="highest")
      merged[name] = value + scale * product
  return merged


def _select(config: LoraConfig, tree: Params, make: Callable[[Any], Params]) -> Params:
  """Return the nested dict of `make(leaf)` for the leaves that `include` matches."""

  def select(tree: Mapping[str, Any], path: str) -> Params:
    found: Params = {}
    for name in sorted(tree):
      value = tree[name]
      if isinstance(value, Mapping):
        if inner := select(value, f"{path}{name}/"):
          found[name] = inner
      elif any(re.search(regex, f"{path}{name}") for regex in config.include):
        if name != "kernel":
          raise ValueError(
            f"include={config.include!r} matches {path}{name}; only kernels have adapters."
          )
        found[name] = make(value)
    return found

  if not (selected := select(tree, "")):
    raise ValueError(f"include={config.include!r} matches no kernel of the model.")
  return selected
