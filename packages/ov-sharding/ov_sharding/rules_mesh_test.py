"""Logical names -> specs, on 8 simulated devices."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_sharding import (
  DEFAULT_RULES,
  MeshConfig,
  describe_shardings,
  logical_sharding,
  make_mesh,
  tree_shardings,
)


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


# A captioner in small: the names that its parameters carry, with a stacked layer axis.
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
  shardings = tree_shardings(AXES, SHAPES, mesh_of(2, 2, 2))
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


def test_arrays_land_where_the_specs_say():
  shardings = tree_shardings(AXES, SHAPES, mesh_of(1, 4, 2))
  made = jax.jit(
    lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), SHAPES), out_shardings=shardings
  )()
  jax.tree.map(lambda x, s: np.testing.assert_equal(x.sharding, s), made, shardings)
  kernel = made["encoder"]["blocks"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 64 // 4, 256 // 2)


def test_mesh_axes_of_size_one_split_nothing():
  shardings = tree_shardings(AXES, SHAPES, mesh_of(8, 1, 1))
  assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


@pytest.mark.parametrize("name", sorted(DEFAULT_RULES))
def test_every_default_rule(name):
  expected = {
    "activation_batch": P(("data", "fsdp")),
    "activation_embed": P("tensor"),
    "activation_heads": P("tensor"),
    "activation_kv": P("tensor"),
    "activation_length": P(None),
    "activation_mlp": P("tensor"),
    "activation_vocab": P("tensor"),
    "embed": P("fsdp"),
    "heads": P("tensor"),
    "kv": P(None),
    "layers": P(None),
    "mlp": P("tensor"),
    "norm": P("tensor"),
    "vocab": P("tensor"),
  }
  mesh = mesh_of(2, 2, 2)
  assert tree_shardings({"x": (name,)}, {"x": shape(8)}, mesh)["x"].spec == expected[name]
  assert logical_sharding((name,), mesh).spec == expected[name]


def test_logical_sharding_constrains_an_activation():
  mesh = mesh_of(2, 2, 2)
  sharding = logical_sharding(("activation_batch", "activation_length", "activation_embed"), mesh)
  assert sharding.spec == P(("data", "fsdp"), None, "tensor")
  x = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, sharding))(jnp.zeros((8, 3, 4)))
  assert x.sharding.is_equivalent_to(sharding, 3)


def test_own_rules():
  mesh = mesh_of(2, 2, 2)
  rules = {**DEFAULT_RULES, "embed": ("fsdp", "data"), "vocab": ()}
  shardings = tree_shardings(AXES, SHAPES, mesh, rules)
  assert shardings["decoder"]["head"]["kernel"].spec == P(("fsdp", "data"), None)
  with pytest.raises(ValueError, match="rule 'embed' uses mesh axis 'model'; the mesh has"):
    tree_shardings(AXES, SHAPES, mesh, {"embed": ("model",)})


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_a_dimension_that_does_not_divide_stays_whole_and_is_reported(sizes, caplog):
  mesh = mesh_of(*sizes)
  axes, shapes = {"head": {"kernel": ("embed", "vocab")}}, {"head": {"kernel": shape(12, 101)}}
  with caplog.at_level(logging.WARNING):
    spec = tree_shardings(axes, shapes, mesh)["head"]["kernel"].spec
  text = describe_shardings(axes, shapes, mesh)
  notes = {
    (2, 2, 2): (P("fsdp", None), ["dim 1 (vocab=101) is not divisible by tensor=2: kept whole"]),
    (1, 8, 1): (P(None, None), ["dim 0 (embed=12) is not divisible by fsdp=8: kept whole"]),
    (1, 1, 8): (P(None, None), ["dim 1 (vocab=101) is not divisible by tensor=8: kept whole"]),
  }
  expected_spec, expected_notes = notes[sizes]
  assert spec == expected_spec
  assert [r.getMessage() for r in caplog.records] == [
    f"head/kernel (12, 101): {note}" for note in expected_notes
  ]
  assert all(f"! {note}" in text for note in expected_notes)


def test_a_mesh_axis_is_used_once_per_array():
  mesh = mesh_of(2, 2, 2)
  axes, shapes = {"w": ("mlp", "vocab")}, {"w": shape(8, 8)}
  assert tree_shardings(axes, shapes, mesh)["w"].spec == P("tensor", None)
  note = "dim 1 (vocab=8) would use tensor=2 a second time: kept whole"
  assert note in describe_shardings(axes, shapes, mesh)


def test_description_counts_bytes_per_device():
  lines = describe_shardings(AXES, SHAPES, mesh_of(2, 2, 2)).splitlines()
  assert len(lines) == len(jax.tree.leaves(SHAPES)) + 1
  head = next(line for line in lines if line.startswith("decoder/head/kernel"))
  assert head.split() == [
    "decoder/head/kernel", "float32[64,", "1000]", "P(fsdp,", "tensor)", f"{64 * 1000:,}"
  ]  # fmt: skip
  total = sum(int(line.split()[-1].replace(",", "")) for line in lines[:-1])
  assert lines[-1] == f"{total:,} bytes per device"


def test_fsdp_fallback_splits_large_unnamed_arrays():
  mesh = mesh_of(1, 4, 2)
  axes = {
    "table": (None, None),
    "stack": ("layers", None, None),
    "odd": (None, None),
    "small": (None,),
    "named": ("mlp", None),
  }
  shapes = {
    "table": shape(64, 1000),
    "stack": shape(2048, 16, 30),
    "odd": shape(77, 1001),
    "small": shape(64),
    "named": shape(64, 4096),
  }
  specs = jax.tree.map(lambda s: s.spec, tree_shardings(axes, shapes, mesh, fsdp_fallback=1000))
  assert specs == {
    "table": P(None, "fsdp"),
    "stack": P(None, "fsdp", None),  # never the layers, which a scan takes one by one
    "odd": P(None, None),  # nothing divides by 4
    "small": P(None),
    "named": P("tensor", None),  # a rule placed it
  }
  without = tree_shardings(axes, shapes, mesh)
  assert without["table"].spec == P(None, None)
  no_fsdp = tree_shardings(axes, shapes, mesh_of(8, 1, 1), fsdp_fallback=1000)
  assert all(s.is_fully_replicated for s in jax.tree.leaves(no_fsdp))


@pytest.mark.parametrize(
  "axes, shapes, message",
  [
    (
      {"a": {"kernel": ("embed", "mlpp")}},
      {"a": {"kernel": shape(8, 8)}},
      r"a/kernel \('embed', 'mlpp'\) names axis 'mlpp', which has no rule; known: \['activation_b",
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
    tree_shardings(axes, shapes, mesh_of(2, 2, 2))


def test_logical_sharding_errors():
  with pytest.raises(ValueError, match=r"axes \('batch',\) names axis 'batch', which has no rule"):
    logical_sharding(("batch",), mesh_of(2, 2, 2))
