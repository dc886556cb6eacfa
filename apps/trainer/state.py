"""The train state: one plain dict of arrays, which is all that a step changes.

  {"params": nested dict,          float32 parameters
   "opt": optax state,             moments shaped and sharded like the parameters
   "step": int32 [],               updates done so far; also the index of the next update
   "ema": nested dict}             float32 average of params, only where it is asked for

Nothing random is in it: every draw of step s comes from fold_in(key(seed), s), see `step_key`, so a
resumed run draws what an uninterrupted one would have drawn, on any number of devices or hosts.

  abstract = abstract_state(abstract_params, tx, ema=False)
  shardings = state_shardings(abstract, param_shardings, mesh)
  state = init_state(lambda key: ov_models.init(config, key), jax.random.key(0), tx, shardings)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

import ov_sharding

PyTree = Any
TrainState = dict[str, Any]


def new_state(params: PyTree, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
  """The state before the first update around `params` (which it shares, no copy is made).

  The step counts as int32; the average starts at the parameters.
  """
  state = {"params": params, "opt": tx.init(params), "step": jnp.zeros((), jnp.int32)}
  if ema:
    state["ema"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
  return state


def abstract_state(
  abstract_params: PyTree, tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
  """Shapes and dtypes of `new_state`, as ShapeDtypeStructs; nothing is allocated."""
  return jax.eval_shape(lambda params: new_state(params, tx, ema=ema), abstract_params)


def state_shardings(abstract: TrainState, param_shardings: PyTree, mesh: Mesh) -> TrainState:
  """Shardings for every leaf of an abstract state: what mirrors a parameter is sharded like it.

  Args:
    abstract: from `abstract_state`.
    param_shardings: NamedShardings in the tree of the parameters.
    mesh: of those shardings.
  """
  return ov_sharding.state_shardings(abstract, abstract["params"], param_shardings, mesh)


def init_state(
  init_params: Callable[[jax.Array], PyTree],
  key: jax.Array,
  tx: optax.GradientTransformation,
  shardings: TrainState,
) -> TrainState:
  """A fresh state, created under jit where it will live: no device ever holds all of it.

  Args:
    init_params: key -> params, traceable.
    key: scalar random key.
    tx: the optimizer's transformation.
    shardings: from `state_shardings`; an "ema" entry in it asks for an average.
  """

  def init(key: jax.Array) -> TrainState:
    return new_state(init_params(key), tx, ema="ema" in shardings)

  return jax.jit(init, out_shardings=shardings)(key)


def replace_params(state: TrainState, params: PyTree) -> TrainState:
  """The state with other parameters of the same shapes; an average starts again at them."""
  if "ema" not in state:
    return {**state, "params": params}
  shardings = jax.tree.map(lambda x: x.sharding, state["ema"])
  copy = lambda p: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), p)
  return {**state, "params": params, "ema": jax.jit(copy, out_shardings=shardings)(params)}


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
  """ShapeDtypeStructs that carry their sharding: the target of a restore or of `jit.lower`."""
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
  )


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
  """The random key of one step: fold_in(threefry key of `seed`, step).

  Threefry bits depend on the key and the position in the drawn array only, so the same values come
  out however the array is sharded.
  """
  return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
