"""Tests that the two-tower model has the same outputs and gradients on eight devices as on one."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_models import (
  RULES,
  QueryDecoderConfig,
  TextConfig,
  VisionLanguageConfig,
  ViTConfig,
  bind,
  logical_axes,
)
from ov_models.testing import random_params

B, T = 8, 6
SIZES = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4}
CONFIG = VisionLanguageConfig(
  encoder=ViTConfig(patch_size=8, image_size=32, mask_ratio=0.3, **SIZES),
  text=TextConfig(vocab_size=24, max_len=T, **SIZES),
  decoder=QueryDecoderConfig(vocab_size=24, num_queries=5, **SIZES),
  embed_dim=16,
  bias_init=-1.0,
)
FSDP, BOTH, BACK = P(None, "fsdp"), P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
PER_BLOCK = {"attn/query": BOTH, "attn/out": BACK, "mlp/up": BOTH, "mlp/down": BACK}
EXPECTED = {
  "encoder/patch_embed/kernel": P(None, None, None, "fsdp"),
  "image_head/kernel": P("fsdp", None),
  "text_head/kernel": P("fsdp", None),
  "log_scale": P(),
  "bias": P(),
  "text/embed/embedding": P("tensor", "fsdp"),
  "text/position_embedding": FSDP,
  "text/norm/scale": P("tensor"),
  "decoder/queries": FSDP,
  "decoder/image_proj/kernel": P("fsdp", None),
  "decoder/text_proj/kernel": P("fsdp", None),
  "decoder/head/kernel": P("fsdp", "tensor"),
  **{
    f"{part}/blocks/{name}/kernel": spec
    for part in ("encoder", "text", "decoder")
    for name, spec in PER_BLOCK.items()
  },
}


def make_mesh(data, fsdp, tensor):
  axis_types = (AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=axis_types)


def shardings(mesh):
  return jax.tree.map(
    lambda names: NamedSharding(mesh, P(*(RULES.get(n) or None for n in names))),
    logical_axes(CONFIG),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def batch():
  images = jax.random.normal(jax.random.key(0), (B, 32, 32, 3))
  ids = jax.random.randint(jax.random.key(1), (B, T), 1, 24)
  return images, ids.at[:3, 3:5].set(0)


def evaluate(params, images, ids):
  """Return the gradients and outputs of a loss that compares rows."""

  def loss(params):
    model = bind(CONFIG, params)
    image, text = model.encode_image(images, jax.random.key(3)), model.encode_text(ids)
    hidden = model.caption_hidden(image.tokens, text_tokens=text.tokens)
    scores = jnp.exp(params["log_scale"]) * image.unit @ text.unit.T + params["bias"]
    pairs = jax.nn.softplus(scores * (1 - 2 * jnp.eye(B))).mean()
    return pairs + (hidden**3).mean(), (image.unit, text.unit, hidden)

  return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def expected():
  with jax.default_matmul_precision("highest"):
    return jax.jit(evaluate)(random_params(CONFIG), *batch())


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_sharded_equals_single_device(expected, shape):
  mesh = make_mesh(*shape)
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  params = jax.device_put(random_params(CONFIG), shardings(mesh))
  with jax.default_matmul_precision("highest"):
    step = jax.jit(evaluate, out_shardings=(None, shardings(mesh)))
    with jax.set_mesh(mesh):
      (loss, outputs), grads = step(params, *jax.device_put(batch(), rows))
  (expected_loss, expected_outputs), expected_grads = expected
  # Different order of float32 sums over devices.
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for a, b in zip(outputs, expected_outputs, strict=True):
    assert a.addressable_shards[0].data.shape[0] == B // (shape[0] * shape[1])
    np.testing.assert_allclose(a, b, atol=1e-5)
  expected_grads = by_path(expected_grads)
  for path, leaf in by_path(grads).items():
    want = expected_grads[path]
    atol = 1e-5 * np.abs(want).max() + 1e-8
    np.testing.assert_allclose(leaf, want, rtol=1e-3, atol=atol, err_msg=path)


def test_parameters_are_sharded_by_their_axes():
  mesh = make_mesh(2, 2, 2)
  placed = by_path(jax.device_put(random_params(CONFIG), shardings(mesh)))
  assert EXPECTED.keys() <= placed.keys()
  for path, spec in EXPECTED.items():
    leaf = placed[path]
    assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path
  for path in placed.keys() - EXPECTED.keys():
    # The kernels of keys and values are split in four; norms, biases and cls are below 1 kB.
    share = placed[path].addressable_shards[0].data.size / placed[path].size
    assert share == 1 / 4 or placed[path].nbytes <= 1024, path
