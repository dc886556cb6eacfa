"""Interface of update rules, and helpers to write one.

An update rule maps gradients to directions; all other parts of the optimizer are shared, see
`apps.trainer.optimizer`. It is a frozen dataclass of its hyperparameters with a method `build`.
"""

from collections.abc import Callable
import math
from typing import Any, Protocol

import jax
import optax

from apps.trainer.paths import is_stacked, path_str

PyTree = Any


class UpdateRule(Protocol):
  """A frozen dataclass of hyperparameters."""

  def build(self) -> optax.GradientTransformation:
    """Return the transformation of gradients to directions, without the learning rate.

    Its state is saved in checkpoints, so each part must have a name: join transformations with
    `named_chain`. `init` and `update` receive `optax.MaskedNode` for frozen parameters.
    """


def named_chain(*parts: tuple[str, optax.GradientTransformation]) -> optax.GradientTransformation:
  """Chain transformations; the state is a dict of the non-empty states by name.

  `optax.named_chain` also keeps the empty states. Checkpoints would store them as empty nodes and
  could not be restored after a transformation is added or removed.

  Args:
    *parts: pairs of name and transformation, in order of application.
  """

  def init(params: PyTree) -> dict[str, Any]:
    states = {name: tx.init(params) for name, tx in parts}
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}

  def update(
    updates: PyTree, state: dict[str, Any], params: PyTree | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    new = {}
    for name, tx in parts:
      old = state[name] if name in state else tx.init(params)
      updates, own = tx.update(updates, old, params)
      if name in state:
        new[name] = own
    return updates, new

  return optax.GradientTransformation(init, update)


def require(rule: Any, name: str, ok: bool, expected: str) -> None:
  """Raise ValueError with name, value and expectation of a hyperparameter unless `ok`."""
  if not ok:
    raise ValueError(f"optimizer {name}={getattr(rule, name)!r} must be {expected}.")


def require_decays(rule: Any, *names: str) -> None:
  """Raise ValueError unless these decay rates of averages are in [0, 1)."""
  for name in names:
    require(rule, name, 0 <= getattr(rule, name) < 1, "in [0, 1)")


def require_positive(rule: Any, *names: str) -> None:
  """Raise ValueError unless these hyperparameters are positive and finite."""
  for name in names:
    require(rule, name, 0 < getattr(rule, name) < math.inf, "finite and > 0")


def require_choice(rule: Any, name: str, *allowed: str) -> None:
  """Raise ValueError unless a hyperparameter is one of `allowed`."""
  require(rule, name, getattr(rule, name) in allowed, f"one of {', '.join(allowed)}")


def per_layer(
  function: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
  """Return a stateless transformation that processes each layer of a stack separately.

  Args:
    function: function from (update, parameter) of one array or layer to the update.
  """

  def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
    return (jax.vmap(function) if is_stacked(path_str(path)) else function)(update, param)

  def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
    return jax.tree_util.tree_map_with_path(one, updates, params)

  return optax.stateless(update)
