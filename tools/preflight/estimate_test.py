"""Memory of programs whose arrays can be counted by hand, and of a step that is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.caption_task import CaptionTask
from apps.configs import openvision2
from apps.trainer.stages import Stage
import ov_sharding
from tools.preflight import estimate
from tools.preflight.compile import Plan, compile_step, make_plan, stand_in_tokenizer

TINY = "img=Ti/16,txt_decoder_name=Ti,res=64,token_len=16,vocab_size=512"


def _most(function, *shapes):
  """Bytes of the temporaries at the fullest moment, for one size."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  program = jax.make_jaxpr(function)(*arguments).jaxpr
  return np.max(estimate.live_bytes([program]))


def _plan(options: str, images: int) -> Plan:
  config = openvision2.get_config(f"{TINY},{options},batch_size={images}")
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])
  stage = Stage(0, "main", config, 0)
  return make_plan(stage, CaptionTask.from_config, stand_in_tokenizer(config), mesh)


def _twice(x):
  """x used in two places; the sum is a scalar, far below an array."""
  return jnp.sum(x), x + 1


# Arrays [8, 8] in float32 are 256 bytes.
@pytest.mark.parametrize(
  "function, arrays",
  [
    (lambda x: jnp.tanh(x) * 2 + x, 0),  # one pass, straight into the result
    (lambda x: (x @ x) @ x, 2),  # a product and the next
    (lambda x: jnp.tanh(x @ x) @ x, 2),  # what the next product reads is in place of the first
    (lambda x: (x @ x) + (x @ x).T, 2),
    (lambda x: x @ (x + 1), 2),  # a product reads arrays
    (lambda x: _twice(x * 2), 0),  # cheap: made for the sum and for the result
    (lambda x: _twice(jnp.exp(x)), 1),  # much work
    (lambda x: _twice(x * x.T), 1),  # two arrays to read
    (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], 2),
    (lambda x: jax.lax.scan(lambda c, _: (c @ x, c), x, None, length=5)[1], 7),  # stacked results
    (jax.jit(lambda x: jnp.tanh(x @ x) @ x), 2),  # calls are looked into
  ],
)
def test_arrays_of_small_programs(function, arrays):
  assert _most(function, (8, 8)) // 256 == arrays


def test_what_a_loop_stacks_has_its_place_early_unless_it_grows():
  def function(x, w):
    y = (x @ w) @ w  # [n, 8]
    return jax.lax.scan(lambda c, _: (c, (c.T @ c, c)), y, None, length=5)[1]

  programs = [
    jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (rows, 8))).jaxpr
    for rows in (8, 16)
  ]
  found = estimate.live_bytes(programs)
  # At the first product and the second: five [8, 8], not the five [n, 8] that come later.
  np.testing.assert_array_equal(found[:, 1], [5 * 256 + 256, 5 * 256 + 512])
  np.testing.assert_array_equal(found[:, 2], [5 * 256 + 512, 5 * 256 + 1024])


def test_arrays_on_the_host_do_not_count():
  def there_and_back(x):
    host = jax.device_put(x @ x, jax.memory.Space.Host)
    return jax.device_put(host, jax.memory.Space.Device) @ x

  assert _most(there_and_back, (8, 8)) == 2 * 256


def test_sizes_must_be_all_that_differs():
  programs = [
    jax.make_jaxpr(f)(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr for f in (jnp.sin, jnp.cos)
  ]
  with pytest.raises(ValueError, match="differ in more than sizes"):
    estimate.live_bytes(programs)


def test_the_largest_batch_is_the_last_that_fits():
  found = estimate.Estimate(
    state=100, image=2, fixed=np.array([50.0, 0.0]), per_image=np.array([0.0, 10.0])
  )
  assert found.peak(1) == 152 and found.peak(10) == 220
  assert found.largest(220) == 10 and found.largest(219) == 9
  assert found.largest(151) == 0 and found.largest(90) == 0
  assert found.temporaries(1, share=0.1) == 10


def test_policies_keep_what_they_say():
  kept = {
    remat: estimate.kept_bytes(functools.partial(_plan, f"dtype=bfloat16,remat={remat}"))
    for remat in ("none", "dots", "full", "offload")
  }
  assert kept["none"][0] > kept["dots"][0] > kept["full"][0]
  # Full keeps the input of each of the encoder's 12 blocks: 17 tokens of width 192, 2 bytes each.
  assert kept["full"][0] > 12 * 17 * 192 * 2
  # What is offloaded are the products that dots keeps.
  assert sum(kept["offload"]) == sum(kept["dots"]) and kept["offload"][0] == kept["full"][0]
  assert kept["none"][1] == kept["dots"][1] == kept["full"][1] == 0


def test_a_compiled_step_takes_as_much():
  """Within a fifth: the compiler's order and fusions are its own."""
  of_batch = functools.partial(_plan, "dtype=float32,remat=dots")
  memory = compile_step(of_batch(64)).memory
  assert memory is not None
  assert estimate.estimate(of_batch).peak(64) == pytest.approx(memory.peak, rel=0.2)
