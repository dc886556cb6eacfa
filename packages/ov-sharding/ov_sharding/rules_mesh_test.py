"""Tests of logical axis rules on 8 simulated devices."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_sharding import MeshConfig, make_mesh, tree_shardings

RULES = {
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv": (),
  "layers": (),
  "mlp": ("tensor",),
  "norm": ("tensor",),
  "vocab": ("tensor",),
}


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


# Parameters of a small captioner, with a stacked layer axis.
AXES = {
  "encoder": {
    "patch": {"kernel": (None, None, None, "embed"), "bias": (None,)},
    "blocks": {
      "norm1": {"scale": ("layers", "norm"), "bias": ("layers", None)},
      "query": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", None)},
      "out": {"kernel": ("layers", "mlp", "embed")},
      "heads3d": {"kernel": ("layers", "embed", "heads", "kv")},
    },
  },
  "decoder": {"embedding": ("vocab", "embed"), "head": {"kernel": ("embed", "vocab")}},
  "scale": (),
}
SHAPES = {
  "encoder": {
    "patch": {"kernel": shape(14, 14, 3, 64), "bias": shape(64)},
    "blocks": {
      "norm1": {"scale": shape(3, 64), "bias": shape(3, 64)},
      "query": {"kernel": shape(3, 64, 256), "bias": shape(3, 256)},
      "out": {"kernel": shape(3, 256, 64)},
      "heads3d": {"kernel": shape(3, 64, 4, 16)},
    },
  },
  "decoder": {"embedding": shape(1000, 64), "head": {"kernel": shape(64, 1000)}},
  "scale": shape(),
}


def mesh_of(data, fsdp, tensor):
  assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
  return make_mesh(MeshConfig(data, fsdp, tensor))


def test_specs_of_a_captioner():
  shardings = tree_shardings(AXES, SHAPES, mesh_of(2, 2, 2), RULES)
  assert jax.tree.map(lambda s: s.spec, shardings) == {
    "encoder": {
      "patch": {"kernel": P(None, None, None, "fsdp"), "bias": P(None)},
      "blocks": {
        "norm1": {"scale": P(None, "tensor"), "bias": P(None, None)},
        "query": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, None)},
        "out": {"kernel": P(None, "tensor", "fsdp")},
        "heads3d": {"kernel": P(None, "fsdp", "tensor", None)},
      },
    },
    "decoder": {"embedding": P("tensor", "fsdp"), "head": {"kernel": P("fsdp", "tensor")}},
    "scale": P(),
  }


def test_arrays_have_the_requested_shardings():
  shardings = tree_shardings(AXES, SHAPES, mesh_of(1, 4, 2), RULES)
  made = jax.jit(
    lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), SHAPES), out_shardings=shardings
  )()
  jax.tree.map(lambda x, s: np.testing.assert_equal(x.sharding, s), made, shardings)
  kernel = made["encoder"]["blocks"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 64 // 4, 256 // 2)


def test_mesh_axes_of_size_one_split_nothing():
  shardings = tree_shardings(AXES, SHAPES, mesh_of(8, 1, 1), RULES)
  assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def test_rule_with_two_mesh_axes_or_an_unknown_one():
  mesh = mesh_of(2, 2, 2)
  rules = {**RULES, "embed": ("fsdp", "data"), "vocab": ()}
  shardings = tree_shardings(AXES, SHAPES, mesh, rules)
  assert shardings["decoder"]["head"]["kernel"].spec == P(("fsdp", "data"), None)
  with pytest.raises(ValueError, match="rule 'embed' uses mesh axis 'model'; the mesh has"):
    tree_shardings(AXES, SHAPES, mesh, {"embed": ("model",)})


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_indivisible_dimension_is_left_unsharded_with_a_warning(sizes, caplog):
  mesh = mesh_of(*sizes)
  axes, shapes = {"head": {"kernel": ("embed", "vocab")}}, {"head": {"kernel": shape(12, 101)}}
  with caplog.at_level(logging.WARNING):
    spec = tree_shardings(axes, shapes, mesh, RULES)["head"]["kernel"].spec
  expected_spec, warning = {
    (2, 2, 2): (P("fsdp", None), "dim 1 (vocab=101) is not divisible by tensor=2"),
    (1, 8, 1): (P(None, None), "dim 0 (embed=12) is not divisible by fsdp=8"),
    (1, 1, 8): (P(None, None), "dim 1 (vocab=101) is not divisible by tensor=8"),
  }[sizes]
  assert spec == expected_spec
  assert [r.getMessage() for r in caplog.records] == [
    f"head/kernel (12, 101): {warning}; left unsharded"
  ]


def test_mesh_axis_is_used_once_per_array(caplog):
  mesh = mesh_of(2, 2, 2)
  axes, shapes = {"w": ("mlp", "vocab")}, {"w": shape(8, 8)}
  assert tree_shardings(axes, shapes, mesh, RULES)["w"].spec == P("tensor", None)
  warning = "w (8, 8): dim 1 (vocab=8) would use tensor=2 twice; left unsharded"
  assert [r.getMessage() for r in caplog.records] == [warning]


@pytest.mark.parametrize(
  "axes, shapes, message",
  [
    (
      {"a": {"kernel": ("embed", "mlpp")}},
      {"a": {"kernel": shape(8, 8)}},
      r"a/kernel \('embed', 'mlpp'\) names axis 'mlpp', which has no rule; known: \['embed'",
    ),
    (
      {"a": {"kernel": ("embed",)}},
      {"a": {"kernel": shape(8, 8)}},
      r"a/kernel has shape \(8, 8\) but axes \('embed',\); expected a tuple of 2 names",
    ),
    (
      {"a": ("embed",), "b": ("embed",)},
      {"a": shape(8), "c": shape(8)},
      r"different trees: only in axes \['b'\], only in shapes \['c'\]",
    ),
  ],
)
def test_errors_name_the_path(axes, shapes, message):
  with pytest.raises(ValueError, match=message):
    tree_shardings(axes, shapes, mesh_of(2, 2, 2), RULES)
