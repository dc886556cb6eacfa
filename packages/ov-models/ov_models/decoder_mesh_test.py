"""Tests that the decoders have the same values and gradients on eight devices as on one."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_models import RULES, Decoder, DecoderConfig, QueryDecoder, QueryDecoderConfig
from ov_models.testing import random_like

SIZES = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "vocab_size": 24}
B, K, T = 8, 6, 5


def queries():
  config = QueryDecoderConfig(num_queries=T, **SIZES)
  make = lambda: QueryDecoder(config, 24, 16, rngs=nnx.Rngs(0))
  return make, jax.random.normal(jax.random.key(1), (B, 4, 16))


def parallel():
  config = DecoderConfig(max_len=T, parallel=True, **SIZES)
  make = lambda: Decoder(config, 24, rngs=nnx.Rngs(0))
  return make, jax.random.randint(jax.random.key(1), (B, T), 0, 24), jnp.arange(B) % 3 > 0


def shardings(mesh, state):
  """Return the shardings by the default rules."""
  flat = dict(nnx.to_flat_state(state))

  def sharding(path, _):
    names = tuple(entry.key for entry in path)
    axes = flat[names].get_metadata()["logical_axes"]
    stacked = ("layers",) if "blocks" in names else ()
    return NamedSharding(mesh, P(*(RULES.get(axis) or None for axis in (*stacked, *axes))))

  return jax.tree_util.tree_map_with_path(sharding, nnx.to_pure_dict(state))


@pytest.mark.parametrize("build", [queries, parallel])
def test_sharded_equals_single_device(build):
  make, *args = build()
  graphdef, state = nnx.split(nnx.eval_shape(make))
  params = random_like(nnx.to_pure_dict(state))
  image = jax.random.normal(jax.random.key(0), (B, K, 24))

  def run(params, image, args):
    def loss(params, image):
      return (nnx.merge(graphdef, params)(image, *args) ** 3).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))(params, image)

  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  batch = NamedSharding(mesh, P(("data", "fsdp")))
  put = jax.device_put(params, shardings(mesh, state)), *jax.device_put((image, args), batch)
  with jax.default_matmul_precision("highest"):
    loss, grads = jax.jit(run)(params, image, args)
    with jax.set_mesh(mesh):
      sharded, sharded_grads = jax.jit(run)(*put)
  assert sharded_grads[1].sharding.spec == P(("data", "fsdp"))
  # Different order of float32 sums over devices.
  np.testing.assert_allclose(sharded, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(sharded_grads), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max() + 1e-8)
