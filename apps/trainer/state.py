"""Train state: one plain dict of arrays that a step updates.

  {"params": nested dict,          float32 parameters
   "opt": optax state,             moments shaped and sharded like the parameters
   "step": int32 [],               number of completed updates; also the index of the next update
   "ema": nested dict}             float32 average of the parameters, only if enabled

The state contains no random numbers: every draw of step s uses fold_in(key(seed), s), see
`step_key`, so a resumed run draws the same values on any number of devices or hosts.

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
  """Return the state before the first update; it shares `params` without a copy.

  The average starts at the parameters.
  """
  state = {"params": params, "opt": tx.init(params), "step": jnp.zeros((), jnp.int32)}
  if ema:
    state["ema"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
  return state


def abstract_state(
  abstract_params: PyTree, tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
  """Return shapes and dtypes of `new_state` as ShapeDtypeStructs, without allocating arrays."""
  return jax.eval_shape(lambda params: new_state(params, tx, ema=ema), abstract_params)


def state_shardings(abstract: TrainState, param_shardings: PyTree, mesh: Mesh) -> TrainState:
  """Return the shardings of an abstract state: optimizer arrays are sharded like their parameters.

  Args:
    abstract: state returned by `abstract_state`.
    param_shardings: NamedShardings in the tree of the parameters.
    mesh: mesh of those shardings.
  """
  return ov_sharding.state_shardings(abstract, abstract["params"], param_shardings, mesh)


def init_state(
  init_params: Callable[[jax.Array], PyTree],
  key: jax.Array,
  tx: optax.GradientTransformation,
  shardings: TrainState,
) -> TrainState:
  """Create a fresh state under jit with its final shardings, so that no device holds all of it.

  Args:
    init_params: traceable function from a key to params.
    key: scalar random key.
    tx: transformation of the optimizer.
    shardings: shardings returned by `state_shardings`; an "ema" entry enables the average.
  """

  def init(key: jax.Array) -> TrainState:
    return new_state(init_params(key), tx, ema="ema" in shardings)

  return jax.jit(init, out_shardings=shardings)(key)


def replace_params(state: TrainState, params: PyTree) -> TrainState:
  """Return the state with other parameters of the same shapes; an average restarts from them."""
  if "ema" not in state:
    return {**state, "params": params}
  shardings = jax.tree.map(lambda x: x.sharding, state["ema"])
  copy = lambda p: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), p)
  return {**state, "params": params, "ema": jax.jit(copy, out_shardings=shardings)(params)}


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
  """Return ShapeDtypeStructs with shardings, the target of a restore or of `jit.lower`."""
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
  )


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
  """Return the random key of a step: fold_in(threefry key of `seed`, step).

  Threefry bits depend only on the key and the position in the array, so the values are the same for
  any sharding.
  """
  return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
