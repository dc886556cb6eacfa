"""The captioner on 8 simulated devices: shardings of all parameters, equal loss and gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import ov_losses
import ov_models
import ov_sharding

TI = ov_models.VisionLanguageConfig.openvision2("Ti/16", "Ti", image_size=160)
SMALL = ov_models.VisionLanguageConfig(
  encoder=ov_models.ViTConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8, image_size=32
  ),
  decoder=ov_models.DecoderConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, vocab_size=128, max_len=9
  ),
)
FSDP, BOTH, BACK = P(None, "fsdp"), P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")

# Suffix of a parameter path -> its spec on a 2x2x2 mesh; the first match applies.
EXPECTED = [
  ("attn/query/kernel", BOTH),
  ("attn/key/kernel", BOTH),
  ("attn/value/kernel", BOTH),
  ("attn/out/kernel", BACK),
  ("mlp/up/kernel", BOTH),
  ("mlp/down/kernel", BACK),
  ("embed/embedding", P("tensor", "fsdp")),
  ("head/kernel", P("fsdp", "tensor")),
  ("position_embedding", FSDP),
  ("norm1/scale", P(None, "tensor")),
  ("norm2/scale", P(None, "tensor")),
  ("norm/scale", P("tensor")),
  ("image_proj/kernel", P("fsdp", None)),
  ("patch_embed/kernel", P(None, None, None, "fsdp")),
  ("cls", P(None)),
  ("bias", None),  # replicated, any rank
]


def place(config, *sizes):
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(*sizes))
  shapes = ov_models.abstract_params(config)
  axes = ov_models.logical_axes(config)
  return mesh, shapes, ov_sharding.tree_shardings(axes, shapes, mesh, ov_models.RULES)


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_specs_of_every_parameter(caplog):
  _, _, shardings = place(TI, 2, 2, 2)
  assert not caplog.records  # sharded dimensions are divisible
  seen = set()
  for path, sharding in by_path(shardings).items():
    end, spec = next((e for e in EXPECTED if path.endswith(e[0])), (None, None))
    assert end is not None, f"{path} {sharding.spec}: not in the table"
    seen.add(end)
    assert sharding.is_fully_replicated if spec is None else sharding.spec == spec, path
  assert len(seen) > 12


def test_optimizer_state_is_sharded_like_the_params():
  mesh, shapes, shardings = place(TI, 1, 8, 1)
  adam = jax.eval_shape(optax.adamw(1e-3, mu_dtype=jnp.bfloat16).init, shapes)
  of_state = ov_sharding.state_shardings(adam, shapes, shardings, mesh)
  for moment in (of_state[0].mu, of_state[0].nu):
    assert jax.tree.leaves(moment) == jax.tree.leaves(shardings)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(adam))
  held = ov_sharding.bytes_per_device(adam, of_state)
  # An eighth, plus replicated norms, biases, patch embedding and projection: 3% of Ti.
  assert whole / 8 < held < whole / 8 * 1.25


@functools.cache
def example():
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.standard_normal((16, 32, 32, 3), dtype=np.float32),
    "ids": rng.integers(1, 128, (16, 9), dtype=np.int32),
  }
  batch["ids"][:5, 6:] = 0
  return jax.jit(functools.partial(ov_models.init, SMALL))(jax.random.key(0)), batch


def value_and_grad(batch_shards, **jit_options):
  def loss(params, batch):
    model = ov_models.bind(SMALL, params)
    hidden = model(batch["image"], batch["ids"]).hidden
    targets, mask = ov_losses.shift_left(batch["ids"], pad_id=0)
    return ov_losses.caption_cross_entropy(
      hidden, model.head_kernel, targets, mask, batch_shards=batch_shards
    ).loss

  return jax.jit(jax.value_and_grad(loss), **jit_options)


@functools.cache
def on_one_device():
  return jax.device_get(value_and_grad(1)(*example()))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
def test_loss_and_gradients_equal_one_device(sizes):
  mesh, _, shardings = place(SMALL, *sizes)
  params, batch = example()
  batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
  step = value_and_grad(batch_shards, out_shardings=(ov_sharding.replicated(mesh), shardings))
  with jax.set_mesh(mesh):
    loss, grads = step(jax.device_put(params, shardings), ov_sharding.global_batch(batch, mesh))
  expected_loss, expected = on_one_device()
  # All float32; sums over 16 rows and 128 tokens differ in order, which gives errors of a few 6e-8.
  # Some gradients, such as those of key biases, are rounding errors, so the scale is the maximum.
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  got, want = by_path(ov_sharding.to_host(grads)), by_path(expected)
  scale = max(np.abs(x).max() for x in want.values())
  for path in want:
    np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-6 * scale, err_msg=path)
