"""Tests of stacked blocks, scan and rematerialisation."""

import dataclasses

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import VisionLanguageConfig, ViTConfig, bind, init
from ov_models.attention import FULL
from ov_models.blocks import run_blocks, take_layer
from ov_models.testing import random_params

VIT = ViTConfig(width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16)


def value_and_grad(config, params, images):
  def loss(params):
    out = bind(config, params)(images)
    return (out.tokens**2).mean() + (out.pooled**3).mean()

  with jax.default_matmul_precision("highest"):
    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(ours, expected):
  """Assert equality up to the order of float32 sums."""

  def close(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-6 * max(1e-3, np.abs(b).max()))

  chex.assert_trees_all_equal_comparator(close, lambda a, b: f"{a} != {b}", ours, expected)


@pytest.fixture(scope="module")
def reference():
  params = init(VIT, jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  return params, images, value_and_grad(VIT, params, images)


@pytest.mark.parametrize(
  ("scan", "remat"),
  [(True, "full"), (True, "dots"), (True, "offload"), (False, "none"), (False, "full")],
)
def test_scan_and_remat_do_not_change_values(reference, scan, remat):
  params, images, expected = reference
  config = dataclasses.replace(VIT, scan=scan, remat=remat)
  assert_same(value_and_grad(config, params, images), expected)


def test_remat_saves_memory():
  """Remat "full" needs the least memory, "none" the most."""
  temp = {}
  for remat in ("none", "dots", "full"):
    config = dataclasses.replace(VIT, depth=12, remat=remat)
    shapes = jax.eval_shape(lambda c=config: init(c, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
    loss = lambda p, x, c=config: bind(c, p)(x).pooled.sum()
    compiled = jax.jit(jax.grad(loss)).lower(shapes, images).compile()
    temp[remat] = compiled.memory_analysis().temp_size_in_bytes
  assert temp["full"] < temp["dots"] < temp["none"]


def test_scan_compiles_the_block_once():
  def lines(depth, scan):
    config = dataclasses.replace(VIT, depth=depth, scan=scan)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return len(jax.jit(lambda p, x: bind(config, p)(x)).lower(params, images).as_text().split("\n"))

  assert lines(12, scan=True) <= lines(2, scan=True) + 2
  assert lines(12, scan=False) > 2 * lines(2, scan=False)


def rope(q, k, position):
  """Apply 1-D rotary positions: https://arxiv.org/abs/2104.09864."""
  angle = position[..., None, None] / 100 ** jnp.linspace(0, 1, q.shape[3] // 2)

  def turn(a):
    real, imaginary = jnp.split(a, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)

  return turn(q), turn(k)


@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (False, "none")])
def test_rotary_attention_depends_on_distances_only(scan, remat):
  config = dataclasses.replace(VIT, scan=scan, remat=remat)
  blocks = bind(config, random_params(config)).blocks
  x = jax.random.normal(jax.random.key(0), (2, 9, 32))
  plain = run_blocks(blocks, x, FULL, config)

  def value_and_grad(shift):
    rotate = lambda q, k: rope(q, k, jnp.arange(9) + shift)
    return jax.value_and_grad(
      lambda x: (run_blocks(blocks, x, FULL, config, None, rotate) ** 2).sum()
    )(x)

  chex.assert_trees_all_close(value_and_grad(0), value_and_grad(20), rtol=1e-4, atol=1e-3)
  assert abs(value_and_grad(0)[0] - (plain**2).sum()) > 1
  shuffled = run_blocks(
    blocks, x[:, ::-1], FULL, config, None, lambda q, k: rope(q, k, 8 - jnp.arange(9))
  )
  rotated = run_blocks(blocks, x, FULL, config, None, lambda q, k: rope(q, k, jnp.arange(9)))
  chex.assert_trees_all_close(shuffled[:, ::-1], rotated, atol=1e-5)


def test_rotated_keys_can_be_cached():
  # As in decoding with a cache: tokens are rotated one at a time.
  config = dataclasses.replace(VIT, depth=1)
  block = take_layer(bind(config, random_params(config)).blocks, 0)
  x = jax.random.normal(jax.random.key(0), (2, 9, 32))
  whole = block.qkv(x, lambda q, k: rope(q, k, jnp.arange(9)))
  steps = [
    block.qkv(x[:, t : t + 1], lambda q, k, t=t: rope(q, k, jnp.array([t]))) for t in range(9)
  ]
  chex.assert_trees_all_close(
    whole, tuple(jnp.concatenate(a, axis=1) for a in zip(*steps)), atol=1e-6
  )


def std(a):
  return float(np.std(a))


def test_vision_initialisers():
  # At least 6 * 64 * 64 samples: the relative error of a std is below 1 / sqrt(2 * 24576) =
  # 0.5%; the tolerance of 3% is six standard errors.
  config = ViTConfig(width=64, depth=6, mlp_dim=256, num_heads=2, patch_size=16, image_size=32)
  p = init(config, jax.random.key(0))
  blocks = p["blocks"]
  for name in ("query", "key", "value", "out"):
    assert std(blocks["attn"][name]["kernel"]) == pytest.approx(0.02, rel=0.03)
    assert not blocks["attn"][name]["bias"].any()
  assert std(blocks["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.03)
  down = blocks["mlp"]["down"]["kernel"]
  assert std(down) == pytest.approx((0.3072 / 64) ** 0.5, rel=0.03)
  assert np.abs(down).max() < 2.3 * std(down)  # truncated at two standard deviations, then rescaled
  bound = (6 / (16 * 16 * 3)) ** 0.5
  kernel = p["patch_embed"]["kernel"]
  assert std(kernel) == pytest.approx(bound / 3**0.5, rel=0.03)
  assert bound * 0.99 < np.abs(kernel).max() <= bound
  assert 0 < np.abs(p["cls"]).max() < 1e-5
  assert (p["norm"]["scale"] == 1).all()
  learned = init(dataclasses.replace(config, image_size=512, position="learned"), jax.random.key(0))
  assert std(learned["position_embedding"]) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("depth", [2, 6])
def test_decoder_initialisers_do_not_depend_on_depth(depth):
  d = 128
  config = VisionLanguageConfig.openvision2(
    "mu/16", "Ti", image_size=32, vocab_size=500, max_len=64,
    decoder_options={"width": d, "num_heads": 2, "depth": depth, "mlp_dim": 256},
  )  # fmt: skip
  p = init(config, jax.random.key(0))["decoder"]
  blocks = p["blocks"]
  residual = d**-0.5 * (2 * 12) ** -0.5
  for name in ("query", "key", "value"):
    assert std(blocks["attn"][name]["kernel"]) == pytest.approx(d**-0.5, rel=0.03)
  assert std(blocks["attn"]["out"]["kernel"]) == pytest.approx(residual, rel=0.03)
  assert std(blocks["mlp"]["up"]["kernel"]) == pytest.approx((2 * d) ** -0.5, rel=0.03)
  assert std(blocks["mlp"]["down"]["kernel"]) == pytest.approx(residual, rel=0.03)
  assert std(p["embed"]["embedding"]) == pytest.approx(0.02, rel=0.03)
  assert std(p["head"]["kernel"]) == pytest.approx(d**-0.5, rel=0.03)
  assert std(p["image_proj"]["kernel"]) == pytest.approx(32**-0.5, rel=0.08)  # 4096 draws
  assert std(p["position_embedding"]) == pytest.approx(0.01, rel=0.06)  # 8192 draws


def test_layers_and_towers_differ():
  config = VisionLanguageConfig.openvision2(
    "mu/16", "Ti", image_size=32, vocab_size=50,
    encoder_options={"width": 192, "num_heads": 3, "depth": 3}, decoder_options={"depth": 3},
  )  # fmt: skip
  params = init(config, jax.random.key(0))
  kernels = [
    params[tower]["blocks"]["attn"][name]["kernel"][layer]
    for tower in ("encoder", "decoder")
    for name in ("query", "key", "value", "out")
    for layer in range(3)
  ]
  flat = np.stack([k.ravel() for k in kernels])
  correlation = np.corrcoef(flat) - np.eye(len(kernels))
  # Independent samples of 36864 numbers: the standard error of the correlation is 0.005.
  assert np.abs(correlation).max() < 0.03


def test_modules_keep_no_random_state():
  model = bind(VIT, init(VIT, jax.random.key(0)))
  assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
  assert all(isinstance(v, nnx.Param) for _, v in nnx.to_flat_state(nnx.state(model)))
