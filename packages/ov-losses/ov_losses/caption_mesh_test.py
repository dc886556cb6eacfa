"""Tests of the caption loss on 8 simulated devices."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_losses import caption_cross_entropy, sequence_log_likelihood
from ov_losses.testing import naive

AXES = ("data", "fsdp", "tensor")
HEAD = P("fsdp", "tensor")


def make_mesh(shape):
  assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(mesh, batch_spec, sizes, batch_shards, dtype=jnp.float32):
  b, t, d, v = sizes
  rows, head = NamedSharding(mesh, batch_spec), NamedSharding(mesh, HEAD)

  def loss(hidden, head, labels, mask):
    result = caption_cross_entropy(
      hidden, head, labels, mask, label_smoothing=0.1, z_loss=1e-2, batch_shards=batch_shards
    )
    return result.loss, result

  step = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
    in_shardings=(rows, head, rows, rows),
  )
  return step.lower(
    jax.ShapeDtypeStruct((b, t, d), dtype),
    jax.ShapeDtypeStruct((d, v), jnp.float32),
    jax.ShapeDtypeStruct((b, t), jnp.int32),
    jax.ShapeDtypeStruct((b, t), jnp.bool_),
  ).compile()


def collectives_in_loops(hlo):
  """Return the result shapes of all collectives in while loop bodies."""
  bodies = set(re.findall(r"\bbody=%?([\w.-]+)", hlo))
  assert bodies
  found = []
  for block in re.split(r"\n\n", hlo):
    name = re.match(r"\s*(?:ENTRY )?%?([\w.-]+)", block)
    if name and name.group(1) in bodies:
      found += re.findall(
        r"= \(?(\w+\[[\d,]*\])\S* (?:all-reduce|all-gather|reduce-scatter|all-to-all)", block
      )
  return found


@pytest.mark.parametrize(
  "shape, batch_spec, batch_shards",
  [
    ((8, 1, 1), P(AXES), 1),
    ((8, 1, 1), P(AXES), 8),
    ((2, 4, 1), P(AXES), 8),
    ((2, 2, 2), P(AXES), 8),
    ((2, 2, 2), P(("data", "fsdp")), 4),
  ],
)
def test_equals_one_device(shape, batch_spec, batch_shards):
  mesh = make_mesh(shape)
  b, t, d, v = sizes = (16, 13, 24, 102)  # 13 tokens: one tile; V divides by tensor=2
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (b, t, d))
  head = jax.random.normal(keys[1], (d, v)) / d**0.5
  labels = jax.random.randint(keys[2], (b, t), 0, v)
  mask = jax.random.bernoulli(keys[3], 0.6, (b, t)).at[3].set(False)
  rows, columns = NamedSharding(mesh, batch_spec), NamedSharding(mesh, HEAD)
  placed = jax.device_put((hidden, head, labels, mask), (rows, columns, rows, rows))

  (loss, result), grads = compiled(mesh, batch_spec, sizes, batch_shards)(*placed)
  expected, expected_grads = jax.value_and_grad(naive.naive_loss, argnums=(0, 1))(
    hidden, head, labels, mask, 0.1, 1e-2
  )
  # Different order of float32 sums, as in caption_test.
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert result.num_tokens == mask.sum()
  for got, want in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
  assert grads[0].sharding.is_equivalent_to(rows, 3)

  scores = jax.jit(sequence_log_likelihood)(*placed)
  on_one_device = sequence_log_likelihood(hidden, head, labels, mask)
  np.testing.assert_allclose(scores, on_one_device, rtol=1e-5, atol=1e-6)
  assert scores.sharding.is_equivalent_to(rows, 1)


def test_batch_shards_moves_the_all_reduce_out_of_the_scan():
  mesh = make_mesh((2, 4, 1))
  sizes = (16, 64, 32, 128)  # 4 tiles
  per_tile = collectives_in_loops(compiled(mesh, P(AXES), sizes, 1).as_text())
  assert any(shape.endswith("32,128]") for shape in per_tile), per_tile
  assert collectives_in_loops(compiled(mesh, P(AXES), sizes, 8).as_text()) == []


def test_each_device_holds_one_partial_head_gradient():
  # Unsharded [batch_shards,D,V] sums would put 8 partial sums on each device.
  mesh = make_mesh((8, 1, 1))
  sizes = (8, 64, 256, 1024)
  head_bytes = 256 * 1024 * 4
  one = compiled(mesh, P(AXES), sizes, 1).memory_analysis().temp_size_in_bytes
  eight = compiled(mesh, P(AXES), sizes, 8).memory_analysis().temp_size_in_bytes
  assert eight < one + 2 * head_bytes


def test_vocabulary_stays_split_over_tensor():
  mesh = make_mesh((2, 2, 2))
  sizes = (16, 64, 32, 128)
  found = collectives_in_loops(compiled(mesh, P(("data", "fsdp")), sizes, 4).as_text())
  # Per tile: maxima and sums over V [4 rows, 16 columns] and the hidden gradient [4,16,32], but
  # nothing with a vocabulary dimension (64 = V / tensor, or 128).
  assert found
  assert not [shape for shape in found if re.search(r"\b(64|128)\]", shape)], found
