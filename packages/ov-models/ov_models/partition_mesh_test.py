"""Tests of activation sharding on eight devices."""

from functools import partial

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_models import (
  RULES,
  DecoderConfig,
  VisionLanguageConfig,
  ViTConfig,
  attention,
  bind,
  generate,
  logical_axes,
  partition,
)
from ov_models.testing import random_params

CONFIG = VisionLanguageConfig(
  encoder=ViTConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8, image_size=32, mask_ratio=0.3
  ),
  decoder=DecoderConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, vocab_size=24, max_len=6
  ),
  keep_ratio=0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def make_mesh(*shape):
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def inputs():
  images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
  return images, jax.random.randint(jax.random.key(1), (16, 6), 0, 24)


def put(mesh):
  """Put parameters and inputs on the mesh by the default rules."""
  params = random_params(CONFIG)
  specs = jax.tree.map(
    lambda names: NamedSharding(mesh, P(*(RULES.get(n) or None for n in names))),
    logical_axes(CONFIG),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  batch = NamedSharding(mesh, P(("data", "fsdp")))
  return jax.device_put(params, specs), *jax.device_put(inputs(), batch)


def loss_and_grads(params, images, ids):
  def loss(params):
    return (bind(CONFIG, params)(images, ids, jax.random.key(3)).hidden ** 3).mean()

  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def expected():
  with jax.default_matmul_precision("highest"):
    return jax.jit(loss_and_grads)(random_params(CONFIG), *inputs())


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_sharded_equals_single_device(expected, shape):
  mesh = make_mesh(*shape)
  args = put(mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(loss_and_grads).lower(*args).compile()
  loss, grads = step(*args)
  # Different order of float32 sums over devices.
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max() + 1e-8)
  if shape == (1, 8, 1):
    # Weights are gathered, activations are not; gathered activations would have a batch of 16.
    gathers = [line for line in step.as_text().splitlines() if " all-gather(" in line]
    assert gathers
    assert not [line for line in gathers if "f32[16," in line]


def laid_out(mesh, x, *names):
  with jax.set_mesh(mesh):
    return jax.jit(lambda x: partition.constrain(x, *names))(x).sharding.spec


def test_constrain_shards_by_names():
  mesh = make_mesh(2, 2, 2)
  x = jnp.zeros((8, 6, 4, 2))
  rows = ("data", "fsdp")
  assert laid_out(mesh, x, *partition.HEADS) == P(rows, None, "tensor")
  assert laid_out(mesh, x[..., 0], *partition.HIDDEN) == P(rows)  # "fsdp" is used by the rows
  assert laid_out(mesh, x, None, None, "mlp", "mlp") == P(None, None, "tensor")
  assert partition.constrain(x, *partition.HEADS) is x  # no mesh
  with pytest.raises(ValueError):  # a name for each dimension
    laid_out(mesh, x, "batch")


def test_indivisible_dimension_is_left_unsharded():
  x = jnp.zeros((6, 6, 3, 2))
  assert laid_out(make_mesh(2, 2, 2), x, *partition.HEADS) == P()
  assert laid_out(make_mesh(1, 2, 4), x, *partition.HEADS) == P("fsdp")
  assert laid_out(make_mesh(2, 2, 2), jnp.zeros((6, 6, 4)), *partition.HIDDEN) == P()


def test_axes_that_the_mesh_lacks_are_left_to_xla():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  assert laid_out(mesh, jnp.zeros((8, 6, 4, 2)), *partition.HEADS) == P("data")
  mesh = jax.make_mesh((4, 2), ("rows", "tensor"), axis_types=(AxisType.Auto,) * 2)
  x = jax.device_put(jnp.zeros((8, 6, 4, 2)), NamedSharding(mesh, P("rows")))
  assert laid_out(mesh, x, *partition.HEADS) == P("rows", None, "tensor")
  assert laid_out(mesh, x[..., 0], *partition.HIDDEN) == P("rows")


def test_tpu_kernel_runs_per_device(monkeypatch):
  interpreted = partial(splash_attention.make_splash_mha_single_device, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  q, k, v = jax.random.normal(jax.random.key(0), (3, 8, 20, 2, 8))
  mask = attention.Mask("prefix", 5)
  mesh = make_mesh(2, 2, 2)

  run = jax.jit(partial(attention.attend, mask=mask, implementation="tpu"))
  with jax.set_mesh(mesh):
    out = run(*jax.device_put((q, k, v), NamedSharding(mesh, P(("data", "fsdp")))))
  assert out.sharding.spec == P(("data", "fsdp"), None, "tensor")
  np.testing.assert_allclose(out, attention.attend(q, k, v, mask, "xla"), atol=2e-6)


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_generation_on_a_mesh(method):
  mesh = make_mesh(2, 2, 2)
  options = {"max_len": 6, "bos_id": 1, "eos_id": 2, "pad_id": 0, "method": method}
  if method == "sample":
    options["key"] = jax.random.key(0)
  params, images, _ = put(mesh)
  with jax.set_mesh(mesh):
    out = generate(bind(CONFIG, params), images, **options)
  single = generate(bind(CONFIG, random_params(CONFIG)), inputs()[0], **options)
  np.testing.assert_array_equal(out.ids, single.ids)
