"""Tests that every model has the same values in all JAX contexts, such as shard_map.

Runs on two devices and with any supported jax; `tests/standalone/jax_versions_check.py` runs it
with the oldest and the newest.
"""

import functools
import os

from flax.core import freeze
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import ov_models
from ov_models.testing import random_params

SMALL = {"width": 8, "depth": 1, "mlp_dim": 16, "num_heads": 2}
VIT = ov_models.ViTConfig(**SMALL, patch_size=4, image_size=8)
TEXT = ov_models.TextConfig(**SMALL, vocab_size=11, max_len=5)
DECODER = ov_models.DecoderConfig(**SMALL, vocab_size=11, max_len=6)
QUERIES = ov_models.QueryDecoderConfig(**SMALL, vocab_size=11, num_queries=3)
CAPTIONER = ov_models.VisionLanguageConfig(encoder=VIT, decoder=DECODER, keep_ratio=0.5)
TOWERS = ov_models.VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=QUERIES, embed_dim=8)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
IDS = RNG.integers(3, 11, (4, 5)).astype(np.int32)


def encode(params, images, ids):
  del ids
  return ov_models.bind(VIT, params)(images).pooled


def embed_text(params, images, ids):
  del images
  return ov_models.bind(TEXT, params)(ids).pooled


def caption(params, images, ids):
  return ov_models.bind(CAPTIONER, params)(images, ids).hidden


def towers(params, images, ids):
  model = ov_models.bind(TOWERS, params)
  image, text = model.encode_image(images), model.encode_text(ids)
  hidden = model.caption_hidden(image.tokens, text_tokens=text.tokens)
  return jnp.concatenate([image.unit, text.unit, hidden[:, 0] @ model.head_kernel], axis=1)


def generate(method, params, images, ids):
  del ids
  out = ov_models.generate(
    ov_models.bind(CAPTIONER, params), images, max_len=4, bos_id=1, eos_id=2, pad_id=0,
    method=method, num_beams=2, key=jax.random.key(0),
  )  # fmt: skip
  assert out.ids.dtype == out.length.dtype == jnp.int32
  return jnp.concatenate([out.log_prob[:, None], out.ids, out.length[:, None]], axis=1)


MODELS = {
  "encoder": (VIT, encode),
  "text": (TEXT, embed_text),
  "captioner": (CAPTIONER, caption),
  "two towers": (TOWERS, towers),
  "greedy": (CAPTIONER, functools.partial(generate, "greedy")),
  "sample": (CAPTIONER, functools.partial(generate, "sample")),
  "beam": (CAPTIONER, functools.partial(generate, "beam")),
}
DIFFERENTIABLE = ["encoder", "text", "captioner", "two towers"]


def mesh_of(kind):
  assert jax.device_count() >= 2, "run with --xla_force_host_platform_device_count=2"
  return jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])


def put(tree, mesh, spec):
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)


def on_mesh(kind, split, run, params, *batch):
  mesh = mesh_of(kind)
  spec = lambda p: P("data") if split and p.ndim and p.shape[0] % 2 == 0 else P()
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda p: put(p, mesh, spec(p)), params)
    return jax.jit(run)(params, *put(batch, mesh, P("data")))


def explicit_arrays(run, params, *batch):
  mesh = mesh_of(AxisType.Explicit)
  return jax.jit(run)(put(params, mesh, P()), *put(batch, mesh, P("data")))


def mapped(check_vma, run, params, *batch):
  mesh, split = mesh_of(AxisType.Auto), P("data")
  run = jax.shard_map(
    run, mesh=mesh, in_specs=(P(), split, split), out_specs=split, check_vma=check_vma
  )
  return jax.jit(run)(params, *batch)


def params_that_vary(run, params, *batch):
  mesh = mesh_of(AxisType.Auto)
  local = lambda params, *batch: run(jax.tree.map(lambda p: p[0], params), *batch)[None]
  on_each = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
  both = jax.jit(on_each)(jax.tree.map(lambda p: jnp.stack([p, p]), params), *batch)
  np.testing.assert_array_equal(both[0], both[1])
  return both[0]


def halves(transform, run, params, *batch):
  parts = [x.reshape(2, 2, *x.shape[1:]) for x in batch]
  return np.concatenate(transform(run)(params, *parts))


CONTEXTS = {
  "eager": lambda run, *args: run(*args),
  "auto mesh": functools.partial(on_mesh, AxisType.Auto, False),
  "explicit mesh": functools.partial(on_mesh, AxisType.Explicit, False),
  "explicit mesh, split params": functools.partial(on_mesh, AxisType.Explicit, True),
  "explicit arrays": explicit_arrays,
  "shard_map": functools.partial(mapped, True),
  "shard_map unchecked": functools.partial(mapped, False),
  "shard_map, split params": params_that_vary,
  "vmap": functools.partial(halves, lambda run: jax.vmap(run, (None, 0, 0))),
  "pmap": functools.partial(
    halves, lambda run: jax.pmap(run, in_axes=(None, 0, 0), devices=jax.devices()[:2])
  ),
  "frozen params": lambda run, params, *batch: jax.jit(run)(freeze(params), *batch),
  "numpy params": lambda run, params, *batch: run(jax.tree.map(np.asarray, params), *batch),
}


@functools.cache
def reference(name):
  config, run = MODELS[name]
  params = random_params(config)
  return params, jax.jit(run)(params, IMAGES, IDS)


# All pairs take minutes. Without OV_ALL_CONTEXTS=1, all models run in the contexts with stricter
# array types, and two models in all contexts.
PAIRS = [
  (name, context)
  for name in MODELS
  for context in CONTEXTS
  if os.environ.get("OV_ALL_CONTEXTS") == "1"
  or context in ("explicit mesh", "shard_map")
  or name in ("encoder", "greedy")
]


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_value(name, context):
  params, expected = reference(name)
  found = CONTEXTS[context](MODELS[name][1], params, IMAGES, IDS)
  if name == "sample" and context in ("shard_map", "shard_map unchecked", "vmap", "pmap"):
    assert found.shape == expected.shape  # each device draws for its own rows
    return
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def refuses_erf():
  """Return whether jax rejects gradients of erf in shard_map, as 0.12.0 does."""
  grad = jax.shard_map(
    jax.grad(lambda x: jnp.sum(jax.lax.erf(x))),
    mesh=mesh_of(AxisType.Auto),
    in_specs=P("data"),
    out_specs=P("data"),
  )
  try:
    jax.jit(grad)(jnp.ones(2))
  except ValueError as error:
    assert "check_vma=False" in str(error), error  # the message contains the remedy
    return True
  return False


@pytest.mark.parametrize("context", ["explicit", "inside shard_map", "through shard_map"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient(name, context):
  params, _ = reference(name)
  loss = lambda *args: jnp.sum(MODELS[name][1](*args) ** 2)
  expected = jax.jit(jax.grad(loss))(params, IMAGES, IDS)
  if context == "explicit":
    found = on_mesh(AxisType.Explicit, False, jax.grad(loss), params, IMAGES, IDS)
  else:
    specs = {
      "mesh": mesh_of(AxisType.Auto),
      "in_specs": (P(), P("data"), P("data")),
      "out_specs": P(),
    }
    grad = jax.grad(loss)
    if refuses_erf():  # unchecked, the sum over the devices is the caller's
      specs["check_vma"] = False
      grad = lambda *args: jax.lax.psum(jax.grad(loss)(*args), "data")
    inside = jax.shard_map(grad, **specs)
    through = jax.grad(jax.shard_map(lambda *args: jax.lax.psum(loss(*args), "data"), **specs))
    found = jax.jit(inside if "inside" in context else through)(params, IMAGES, IDS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


@pytest.fixture
def x64():
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("wide", ["ids", "ids, images and params"])
@pytest.mark.parametrize("name", MODELS)
def test_x64_computes_in_float32(x64, name, wide):
  params, images, ids = random_params(MODELS[name][0]), IMAGES, IDS.astype(np.int64)
  if "params" in wide:
    images, params = jax.tree.map(lambda x: np.asarray(x, np.float64), (images, params))
  found = jax.jit(MODELS[name][1])(params, images, ids)
  assert found.dtype == jnp.float32
  jax.config.update("jax_enable_x64", False)
  _, expected = reference(name)
  if name != "sample":  # 64-bit samples differ
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CAPTIONER, TOWERS], ids=["captioner", "two towers"])
def test_x64_initializes_the_same_float32_params(x64, config):
  wide = ov_models.init(config, jax.random.key(0))
  assert {p.dtype for p in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
  assert {p.dtype for p in jax.tree.leaves(ov_models.abstract_params(config))} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_and_a_batch_of_one(name):
  params, expected = reference(name)
  run = jax.jit(MODELS[name][1])
  assert run(params, IMAGES[:0], IDS[:0]).shape == (0, *expected.shape[1:])
  one = run(params, IMAGES[:1], IDS[:1])
  if name != "sample":
    np.testing.assert_allclose(one, expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p: [p], r"params is a list; expected nested dicts of arrays"),
    (lambda p: None, r"params is a NoneType; expected nested dicts"),
    (lambda p: {"params": p}, r"missing \S+ .*; and \d+ more\.$"),
    (lambda p: p | {"cls": "x"}, r"cls is a str, expected an array\.$"),
    (lambda p: p | {"cls": p["cls"].astype(int)}, r"cls is int32, expected float32\.$"),
    (lambda p: p | {"cls": p["cls"][:3]}, r"cls is \(3,\), expected \(8,\)\.$"),
  ],
)
def test_mismatching_params_raise_a_one_line_error(change, message):
  with pytest.raises(ValueError, match=message) as e:
    ov_models.bind(VIT, change(random_params(VIT)))
  assert "\n" not in str(e.value) and len(str(e.value)) < 1000
