"""Tests of state shardings on 8 simulated devices."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from ov_sharding import MeshConfig, bytes_per_device, make_mesh, state_shardings, tree_shardings


class AdamState(NamedTuple):  # the shape of an optax state, which this package does not import
  count: jax.Array
  mu: dict
  nu: dict


AXES = {"encoder": {"kernel": ("embed", "mlp")}, "kernel": ("mlp", "embed"), "bias": ("norm",)}
RULES = {"embed": ("fsdp",), "mlp": ("tensor",), "norm": ("tensor",)}


def params():
  return {
    "encoder": {"kernel": jnp.zeros((8, 16))},
    "kernel": jnp.zeros((8, 16)),
    "bias": jnp.zeros(8),
  }


def shapes_and_shardings():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  shapes = jax.eval_shape(params)
  return shapes, tree_shardings(AXES, shapes, mesh, RULES), mesh


def specs(tree):
  return jax.tree.map(lambda s: s.spec, tree)


PARAM_SPECS = {
  "encoder": {"kernel": P("fsdp", "tensor")},
  "kernel": P("tensor", "fsdp"),
  "bias": P("tensor"),
}


def test_moments_and_ema_get_the_shardings_of_the_params():
  shapes, shardings, mesh = shapes_and_shardings()

  def init():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    opt = ((), AdamState(jnp.zeros((), jnp.int32), half, params()), ())
    return {"params": params(), "opt": opt, "ema": params(), "key": jax.random.key(0)}

  got = state_shardings(jax.eval_shape(init), shapes, shardings, mesh)
  assert specs(got) == {
    "params": PARAM_SPECS,
    "opt": ((), AdamState(P(), PARAM_SPECS, PARAM_SPECS), ()),
    "ema": PARAM_SPECS,
    "key": P(),
  }
  state = jax.jit(init, out_shardings=got)()
  assert state["opt"][1].mu["encoder"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_longest_path_suffix_wins():
  # The top-level "kernel" has the same shape but a different sharding.
  shapes, shardings, mesh = shapes_and_shardings()
  moment = {"kernel": shapes["kernel"]}
  got = state_shardings({"encoder": moment, "decoder": moment}, shapes, shardings, mesh)
  assert got["encoder"]["kernel"].spec == P("fsdp", "tensor")
  assert got["decoder"]["kernel"].spec == P("tensor", "fsdp")


def test_other_shapes_are_replicated_and_reported(caplog):
  # Factored moments in optax keep the path of the parameter but have one dimension fewer.
  shapes, shardings, mesh = shapes_and_shardings()
  state = {
    "row": {"encoder": {"kernel": jax.ShapeDtypeStruct((8,), jnp.float32)}},
    "none": {"encoder": {"kernel": jax.ShapeDtypeStruct((1,), jnp.float32)}},
    "histogram": jax.ShapeDtypeStruct((100,), jnp.float32),
  }
  with caplog.at_level(logging.WARNING):
    got = state_shardings(state, shapes, shardings, mesh)
  assert all(s.is_fully_replicated for s in jax.tree.leaves(got))
  assert [r.getMessage() for r in caplog.records] == [
    "histogram (100,) matches no parameter; replicated",
    "row/encoder/kernel (8,) matches no parameter; replicated",
  ]


def test_same_rank_with_other_sizes_is_sharded_where_divisible(caplog):
  shapes, shardings, mesh = shapes_and_shardings()
  leaf = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
  state = {"rows": leaf(8, 1), "columns": leaf(1, 16), "scales": leaf(8, 4), "odd": leaf(6, 3)}
  got = state_shardings(state, shapes, shardings, mesh)  # the parameter has P("tensor", "fsdp")
  assert got["rows"]["kernel"].spec == P("tensor", None)
  assert got["columns"]["kernel"].spec == P(None, "fsdp")
  assert got["scales"]["kernel"].spec == P("tensor", "fsdp")
  assert got["odd"]["kernel"].spec == P("tensor", None)
  assert not caplog.records


def test_trees_must_agree():
  shapes, shardings, mesh = shapes_and_shardings()
  del shardings["bias"]
  with pytest.raises(ValueError, match="params has 3 leaves and param_shardings 2"):
    state_shardings({}, shapes, shardings, mesh)


def test_bytes_per_device():
  shapes, shardings, _ = shapes_and_shardings()
  assert bytes_per_device(shapes, shardings) == 4 * (8 * 16 / 4 + 8 * 16 / 4 + 8 / 2)
