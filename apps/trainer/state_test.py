"""Tests of the train state: shapes without allocation, replacement of parameters, keys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from apps.trainer import state as state_lib

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
TX = optax.adam(0.1)


def test_abstract_state_matches_new_state():
  for ema in (False, True):
    state = state_lib.new_state(PARAMS, TX, ema=ema)
    abstract = state_lib.abstract_state(PARAMS, TX, ema=ema)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert ("ema" in state) == ema and state["step"].dtype == jnp.int32


def test_replace_params_restarts_average():
  state = state_lib.new_state(PARAMS, TX, ema=True)
  other = jax.tree.map(lambda p: p + 1, PARAMS)
  state = state_lib.replace_params(state, other)
  chex.assert_trees_all_equal(state["params"], other)
  chex.assert_trees_all_equal(state["ema"], other)
  donated = jax.jit(lambda s: jax.tree.map(jnp.negative, s), donate_argnums=0)(state)
  chex.assert_trees_all_equal(
    donated["ema"],
    jax.tree.map(
      jnp.negative, PARAMS | {"kernel": PARAMS["kernel"] + 1, "bias": PARAMS["bias"] + 1}
    ),
  )


def test_step_keys():
  keys = {(s, t): jax.random.key_data(state_lib.step_key(s, t)) for s in (0, 1) for t in (0, 1)}
  assert len({tuple(np.array(k)) for k in keys.values()}) == 4
  expected = jax.random.fold_in(jax.random.key(1, impl="threefry2x32"), 1)
  np.testing.assert_array_equal(keys[1, 1], jax.random.key_data(expected))
