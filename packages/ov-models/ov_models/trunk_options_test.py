"""Options of the image tower against a naive float64 tower, written from the papers' formulas."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import ViTConfig, abstract_params, bind, functional, logical_axes, masking
from ov_models.blocks import drop_path, take_layer
from ov_models.testing import random_params

BASE = ViTConfig(
  width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=12, scan=False,
  position="learned",
)  # fmt: skip
CASES = {
  "no cls": {"cls_token": False},
  "registers": {"registers": 3, "pool": "tok"},
  "registers without cls": {"registers": 2, "cls_token": False, "pool": "map"},
  "norms of the input": {"patch_bias": True, "patch_norm": True, "pre_norm": True},
  "quick_gelu": {"activation": "quick_gelu"},
  "gelu_tanh": {"activation": "gelu_tanh"},
  "SwiGLU": {"activation": "silu", "mlp": "gated"},
  "RMSNorm": {"norm": "rms", "norm_eps": 1e-2},
  "epsilon": {"norm_eps": 1e-1},
  "no attention biases": {"qkv_bias": "none", "out_bias": False, "mlp_bias": False},
  "no key bias": {"qkv_bias": "query_value"},
  "QK norm": {"qk_norm": True},
  "QK norm, RMS": {"qk_norm": True, "norm": "rms"},
  "gated attention": {"attention_gate": True},
  "LayerScale": {"layer_scale": 0.1},
  "DINOv3 rotary": {"rotary": "dinov3", "position": "none", "registers": 1},
  "PE rotary": {"rotary": "pe", "rotary_base": 1e4},
  "M-RoPE": {"rotary": "mrope", "position": "none", "registers": 1},
  "PE rotary without cls": {"rotary": "pe", "cls_token": False, "position": "none"},
  "mean": {"pool": "mean"},
  "last": {"pool": "last"},
  "map, other heads": {"pool": "map", "pool_heads": 4, "pool_mlp_dim": 20},
  "attend": {"pool": "attend", "qkv_bias": "none", "pool_heads": 8},
}
ALL = dataclasses.replace(
  BASE, registers=1, patch_bias=True, patch_norm=True, pre_norm=True, activation="silu",
  mlp="gated", norm="rms", qkv_bias="query_value", out_bias=False, qk_norm=True,
  attention_gate=True, layer_scale=0.5, rotary="dinov3", rotary_rescale=2.0, pool="map",
  pool_heads=4, drop_path=0.5, mask_ratio=0.5,
)  # fmt: skip

_erf = np.vectorize(math.erf)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
  "gelu": lambda x: x * (1 + _erf(x / 2**0.5)) / 2,
  "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
  "quick_gelu": lambda x: x * sigmoid(1.702 * x),
  "silu": lambda x: x * sigmoid(x),
}


def norm(c, x, p):
  if c.norm == "rms":
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p["scale"]
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + c.norm_eps)
  return centred / deviation * p["scale"] + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p.get("bias", 0)


def mlp(c, x, p, gated=False):
  act = ACTIVATIONS[c.activation]
  hidden = act(dense(x, p["gate"])) * dense(x, p["up"]) if gated else act(dense(x, p["up"]))
  return dense(hidden, p["down"])


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def rotate(c, x, coords, grid, scale=1.0):
  """Rotate one vector [H] of a patch at (row, column), pair by pair."""
  h = len(x)
  if c.rotary == "mrope":
    place, pairs = (0, *coords), x[: h // 2] + 1j * x[h // 2 :]  # time, row, column
    for j in range(h // 2):
      pairs[j] *= np.exp(1j * place[j % 3] / c.rotary_base ** (j / (h / 2)))
    return np.concatenate([pairs.real, pairs.imag])
  out = np.zeros(h)
  for j in range(h // 4):
    period = c.rotary_base ** (j / (h / 4))
    for axis in range(2):
      if c.rotary == "dinov3":
        angle = 2 * np.pi * scale * (2 * (coords[axis] + 0.5) / grid[axis] - 1) / period
        a, b = axis * h // 4 + j, axis * h // 4 + j + h // 2
      else:
        angle = (coords[1 - axis] + c.cls_token) / period
        a = axis * h // 2 + 2 * j
        b = a + 1
      out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
      out[b] = x[b] * np.cos(angle) + x[a] * np.sin(angle)
  return out


def attend(q, k, v, heads):
  split = lambda a: a.reshape(len(a), heads, -1)
  q, k, v = split(q), split(k), split(v)
  scores = np.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
  return np.einsum("nts,snh->tnh", softmax(scores), v).reshape(len(q), -1)


def tower(c, p, image, index=None, keep=None, scale=1.0):
  """Return pooled vector and patches of one image; `index` are the kept patches."""
  rows, columns = image.shape[0] // c.patch_size, image.shape[1] // c.patch_size
  coords = [(i, j) for i in range(rows) for j in range(columns)]
  s = c.patch_size
  x = np.stack(
    [
      np.einsum(
        "ijc,ijcd->d", image[i * s : i * s + s, j * s : j * s + s], p["patch_embed"]["kernel"]
      )
      for i, j in coords
    ]
  ) + p["patch_embed"].get("bias", 0)
  if c.patch_norm:
    x = norm(c, x, p["patch_norm"])
  table = p["position_embedding"] if c.position == "learned" else np.zeros((99, c.width))
  prefix = [p["cls"] + table[0]] if c.cls_token else []
  prefix += [*p["registers"]] if c.registers else []
  x = x + table[int(c.cls_token) :][: len(x)]
  index = range(len(x)) if index is None else index
  x = np.stack([*prefix, *x[index]])
  coords = [coords[i] for i in index]
  if c.pre_norm:
    x = norm(c, x, p["pre_norm"])
  first = len(prefix)
  for layer in range(c.depth):
    b = take_layer(p["blocks"], layer)
    normed = norm(c, x, b["norm1"])
    q, k, v = (dense(normed, b["attn"][n]) for n in ("query", "key", "value"))
    q, k = (a.reshape(len(x), c.num_heads, -1).copy() for a in (q, k))
    if c.qk_norm:
      q, k = norm(c, q, b["attn"]["query_norm"]), norm(c, k, b["attn"]["key_norm"])
    if c.rotary != "none":
      for a in (q, k):
        for t, place in enumerate(coords):
          for n in range(c.num_heads):
            a[first + t, n] = rotate(c, a[first + t, n], place, (rows, columns), scale)
    attended = attend(q.reshape(len(x), -1), k.reshape(len(x), -1), v, c.num_heads)
    if c.attention_gate:
      attended = attended * sigmoid(dense(normed, b["attn"]["gate"]))
    factors = (1, 1) if keep is None else keep[layer]
    x = x + dense(attended, b["attn"]["out"]) * b.get("scale1", 1) * factors[0]
    branch = mlp(c, norm(c, x, b["norm2"]), b["mlp"], c.mlp == "gated")
    x = x + branch * b.get("scale2", 1) * factors[1]
  return pool(c, p, x, first), x[first:]


def pool(c, p, x, first):
  if c.pool == "gap":
    return norm(c, x[first:].mean(0), p["norm"])
  x = norm(c, x, p["norm"])
  if c.pool in ("mean", "tok", "last"):
    return {"mean": x[first:].mean(0), "tok": x[0], "last": x[-1]}[c.pool]
  w, heads = p["pool"], c.pool_heads or c.num_heads
  if c.pool == "attend":
    keys, values = dense(x, w["key"]), dense(x, w["value"])
    return dense(attend(w["query"][None], keys, values, heads), w["out"])[0]
  a = w["attn"]
  attended = attend(
    dense(w["probe"][None], a["query"]), dense(x, a["key"]), dense(x, a["value"]), heads
  )
  out = dense(attended, a["out"])
  return (out + mlp(c, norm(c, out, w["norm"]), w["mlp"]))[0]


def inputs(config, height=12, width=12):
  params = random_params(config)
  images = np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)
  return params, images, jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def close(got, expected):
  # float32 sums of up to 48 terms of order 1: 1e-6 each; two blocks.
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", CASES)
def test_option(name):
  config = dataclasses.replace(BASE, **CASES[name])
  params, images, exact = inputs(config)
  out = bind(config, params)(images)
  expected = [tower(config, exact, image) for image in images.astype(np.float64)]
  close(out.pooled, np.stack([p for p, _ in expected]))
  close(out.tokens, np.stack([t for _, t in expected]))
  default = tower(BASE, {**exact, "cls": np.zeros(16)}, images[0]) if name == "epsilon" else None
  assert default is None or np.abs(default[1] - expected[0][1]).max() > 1e-3  # the test can fail


@pytest.mark.parametrize("kind", ["dinov3", "pe", "mrope"])
def test_rotary_of_an_oblong_grid_and_of_masked_patches(kind):
  config = dataclasses.replace(
    BASE, rotary=kind, position="none", mask_ratio=0.5, pool="tok", scan=True
  )
  params, images, exact = inputs(config, 8, 16)
  whole = [tower(config, exact, image)[0] for image in images.astype(np.float64)]
  close(bind(config, params)(images).pooled, np.stack(whole))
  key = jax.random.key(3)
  index = masking.random_index(key, 2, 8, 4, ordered=True)
  kept = [tower(config, exact, image, rows) for image, rows in zip(images, np.asarray(index))]
  out = bind(config, params)(images, key)
  close(out.tokens, np.stack([t for _, t in kept]))
  assert np.abs(out.pooled - np.stack(whole)).max() > 1e-3


def test_drop_path_and_rotary_rescaling():
  config = dataclasses.replace(
    BASE, rotary="dinov3", position="none", rotary_rescale=2.0, drop_path=0.5, pool="tok"
  )
  params, images, exact = inputs(config)
  key = jax.random.key(5)
  out = bind(config, params)(images, key)
  keep = drop_path(jax.random.fold_in(key, 1), np.array([0.0, 0.5]), 2, jnp.float32)
  limit = math.log(2)
  scale = float(
    jnp.exp(jax.random.uniform(jax.random.fold_in(key, 2), (), minval=-limit, maxval=limit))
  )
  expected = [
    tower(config, exact, image, keep=np.asarray(keep)[:, :, row, 0, 0], scale=scale)[0]
    for row, image in enumerate(images.astype(np.float64))
  ]
  close(out.pooled, np.stack(expected))


def test_drop_path_keeps_the_mean():
  rates = np.array([0.0, 0.25, 0.9])
  factors = np.asarray(drop_path(jax.random.key(0), rates, 4000, jnp.float32))[..., 0, 0]
  # Standard error of the mean of 8000 factors: sqrt(p / (1 - p) / 8000) = 0.034 for p = 0.9.
  np.testing.assert_allclose(factors.mean((1, 2)), 1.0, atol=0.11)
  zero = (factors == 0).mean((1, 2))
  np.testing.assert_allclose(zero, rates, atol=0.02)
  np.testing.assert_allclose(np.unique(factors[1]), [0, 1 / 0.75], rtol=1e-6)


def test_scan_and_rematerialisation_do_not_change_gradients():
  params, images, _ = inputs(ALL)

  def gradient(config):
    loss = lambda p: (bind(config, p)(images, jax.random.key(2)).pooled ** 2).sum()
    return jax.jit(jax.grad(loss))(params)

  first = gradient(ALL)
  chex.assert_tree_all_finite(first)
  for change in ({"scan": True}, {"remat": "full"}):
    chex.assert_trees_all_close(gradient(dataclasses.replace(ALL, **change)), first, atol=2e-5)
  used = jax.tree.map(lambda g: float(np.abs(g).max()) > 0, first)
  unused = [p for p, ok in jax.tree_util.tree_leaves_with_path(used) if not ok]
  assert not unused


def test_bfloat16_blocks_are_close_and_norms_of_the_input_are_float32():
  params, images, _ = inputs(ALL)
  full = bind(ALL, params)(images)
  half = bind(dataclasses.replace(ALL, dtype="bfloat16"), params)(images)
  assert half.pooled.dtype == half.tokens.dtype == jnp.bfloat16
  scale = np.abs(full.tokens).max()
  # 2^-8 for each of about ten roundings.
  np.testing.assert_allclose(half.tokens.astype(jnp.float32), full.tokens, atol=0.05 * scale)


def test_every_parameter_has_an_axis_name_for_each_dimension():
  shapes = jax.tree.map(lambda a: len(a.shape), abstract_params(ALL))
  names = jax.tree.map(len, logical_axes(ALL), is_leaf=lambda x: isinstance(x, tuple))
  assert shapes == names
  attend_pool = dataclasses.replace(ALL, pool="attend")
  assert logical_axes(attend_pool)["pool"]["key"]["kernel"] == ("embed", "mlp")


def test_flops_count_gates_and_pools():
  flops = functional._stack_flops
  plain = flops(BASE, 7)
  gated = flops(dataclasses.replace(BASE, mlp="gated", activation="silu"), 7)
  assert gated - plain == 2 * 2 * 7 * 16 * 24  # layers, operations, tokens, D, F
  assert flops(dataclasses.replace(BASE, attention_gate=True), 7) - plain == 2 * 2 * 7 * 16 * 16
  pools = functional._pool_flops
  assert pools(BASE, 7) == 0
  config = dataclasses.replace(BASE, pool="map", pool_mlp_dim=20)
  # keys and values of 7 tokens; query, output and MLP of one; scores and values.
  assert pools(config, 7) == 2 * (7 * 2 * 256 + 2 * 256 + 2 * 16 * 20) + 2 * 2 * 7 * 16
  config = dataclasses.replace(BASE, pool="attend")
  assert pools(config, 7) == 2 * (7 * 2 * 256 + 256) + 2 * 2 * 7 * 16


def test_resampled_positions_skip_registers_and_can_be_bicubic():
  config = dataclasses.replace(BASE, registers=2, position_resize="bicubic")
  params, images, _ = inputs(config, 24, 24)
  table = params["position_embedding"]
  grid = jax.image.resize(table[1:].reshape(3, 3, 16), (6, 6, 16), "bicubic")
  larger = dataclasses.replace(config, image_size=24)
  at_size = params | {"position_embedding": jnp.concatenate([table[:1], grid.reshape(36, 16)])}
  close(bind(config, params)(images).tokens, bind(larger, at_size)(images).tokens)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pool": "tok", "cls_token": False}, "pool='tok' reads the cls token"),
    ({"rotary": "pe", "num_heads": 8}, "multiple of 4 channels, but width=16 with num_heads=8"),
    ({"rotary_rescale": 2.0}, "rotary_rescale=2.0 with rotary='none'"),
    ({"pool_heads": 4}, "pool_heads=4 has no effect with pool='gap'"),
    ({"pool": "map", "pool_heads": 3}, "pool_heads=3 does not divide width=16"),
    ({"activation": "relu"}, "activation='relu' is unknown"),
    ({"registers": -1}, "registers=-1 must be a positive integer"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 is out of range"),
    ({"mlp_bias": 1}, "mlp_bias=1; expected True or False"),
  ],
)
def test_invalid_options(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(BASE, **changes)
