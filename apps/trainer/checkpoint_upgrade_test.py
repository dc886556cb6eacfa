"""Tests of restoring checkpoints of the version that saved the optimizer state by index.

testdata/state_by_index was written by it: step 3 of a small tree with stacked blocks, a frozen
array, clipping, layer-wise decay and an average; arrays.npz has the same arrays,
bfloat16 as uint16.
"""

from pathlib import Path
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apps.trainer import state as state_lib
from apps.trainer.checkpoint import (
  CheckpointError,
  Checkpoints,
  check_restorable,
  find_checkpoint,
  restore_arrays,
)
from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.optimizers import Lion
from apps.trainer.optimizers.update_rule import named_chain
from apps.trainer.paths import flatten_paths
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.schedules import make_schedule

FIXTURE = Path(__file__).parent / "testdata" / "state_by_index"
SCHEDULE = ScheduleSettings(warmup_steps=2)
CONFIG = OptimizerConfig(
  1e-2,
  SCHEDULE,
  grad_clip_norm=1.0,
  layer_decay=0.5,
  layer_decay_regex="^encoder/",
  frozen=("cls",),
  ema_decay=0.9,
)
PARAMS = {
  "encoder": {
    "cls": jnp.zeros(3),
    "blocks": {"mlp": {"kernel": jnp.zeros((2, 3, 4)), "bias": jnp.zeros((2, 4))}},
    "norm": {"scale": jnp.zeros(3)},
  },
  "head": {"kernel": jnp.zeros((3, 5))},
}
NEW_NAMES = {"opt/1/": "opt/adamw/", "opt/5/": "opt/schedule/"}


@pytest.fixture
def folder(tmp_path):
  return Path(shutil.copytree(FIXTURE, tmp_path / "checkpoints"))


def abstract(config=CONFIG):
  state = state_lib.new_state(PARAMS, make_optimizer(config, PARAMS, 10).tx, ema=True)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def saved():
  """Return path -> saved array, with current names."""
  arrays = {}
  for path, array in np.load(FIXTURE / "arrays.npz").items():
    for old, new in NEW_NAMES.items():
      path = path.replace(old, new)
    arrays[path] = array.view(jnp.bfloat16) if array.dtype == np.uint16 else array
  return arrays


def assert_bitwise(got, expected):
  assert got.keys() == expected.keys()
  for path, array in expected.items():
    assert got[path].dtype == array.dtype, path
    assert np.asarray(got[path]).tobytes() == np.asarray(array).tobytes(), path


def chain_by_index(multipliers):
  """Return the optimizer chain of that version."""
  trainable = jax.tree.map(lambda _: True, PARAMS)
  trainable["encoder"]["cls"] = False
  decayed = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", PARAMS)
  scale = lambda u, _: jax.tree.map(lambda x, m: x if np.all(m == 1) else x * m, u, multipliers)
  return optax.chain(
    optax.masked(optax.clip_by_global_norm(1.0), trainable),
    optax.masked(optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=jnp.bfloat16), trainable),
    optax.add_decayed_weights(0.2, mask=decayed),
    optax.scale(1e-2),
    optax.stateless(scale),
    optax.scale_by_schedule(make_schedule(SCHEDULE, 10)),
    optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, trainable)),
    optax.scale(-1.0),
  )


def advance(tx, params, opt):
  for step in range(3):
    grads = jax.tree.map(lambda p, step=step: jnp.cos(5 * p) + step, params)
    updates, opt = jax.jit(tx.update)(grads, opt, params)
    params = optax.apply_updates(params, updates)
  return params, opt


def test_indexed_state_is_restored_by_name(folder):
  with Checkpoints(folder) as checkpoints:
    restored, metadata = checkpoints.restore(abstract())
  assert jax.tree.structure(restored) == jax.tree.structure(abstract())
  assert_bitwise(flatten_paths(restored), saved())
  assert metadata["step"] == int(restored["step"]) == 3


def test_training_resumes_like_earlier_version(folder):
  state = restore_arrays(find_checkpoint(epath.Path(folder)), abstract())
  by_layer = np.float32([[0.25], [0.5]])
  one = np.float32(1.0)
  old = chain_by_index(
    {
      "encoder": {
        "cls": np.float32(0.125),
        "blocks": {"mlp": {"kernel": by_layer[..., None], "bias": by_layer}},
        "norm": {"scale": one},
      },
      "head": {"kernel": one},
    }
  )
  opt = list(old.init(PARAMS))
  opt[1] = opt[1]._replace(inner_state=state["opt"]["adamw"].inner_state)
  opt[5] = state["opt"]["schedule"]
  expected, expected_opt = advance(old, state["params"], tuple(opt))
  tx = make_optimizer(CONFIG, PARAMS, 10).tx
  params, opt = advance(tx, state["params"], state["opt"])
  assert_bitwise(flatten_paths(params), flatten_paths(expected))
  by_name = {
    path.replace("1/", "adamw/", 1).replace("5/", "schedule/", 1): array
    for path, array in flatten_paths(expected_opt).items()
  }
  assert_bitwise(flatten_paths(opt), by_name)


def test_params_are_restored_without_optimizer(folder):
  part = {"params": abstract()["params"]}
  restored = restore_arrays(find_checkpoint(epath.Path(folder)), part, partial=True)
  expected = {path: x for path, x in saved().items() if path.startswith("params/")}
  assert_bitwise(flatten_paths(restored), expected)


def test_another_optimizer_is_rejected(folder):
  lion = OptimizerConfig(1e-2, SCHEDULE, Lion(), frozen=("cls",), ema_decay=0.9)
  with pytest.raises(CheckpointError) as error:
    check_restorable(
      find_checkpoint(epath.Path(folder)),
      abstract(lion),
      config={"optimizer": {"name": "lion", "mu_dtype": "bfloat16"}},
      saved_config={"optimizer": {"mu_dtype": "bfloat16"}},
    )
  message = str(error.value)
  assert "\n" not in message and "has a different optimizer state than this run" in message
  assert 'config.optimizer.name: saved "adamw", now "lion"' in message


def test_stateless_transformation_keeps_keys(tmp_path):
  """A state saved by name can be restored into a chain with one more transformation."""
  parts = [("adamw", optax.scale_by_adam()), ("rate", optax.scale(0.1))]
  more = [("noise", optax.identity()), ("clip", optax.clip_by_global_norm(1.0)), *parts]
  state = {"opt": named_chain(*parts).init(PARAMS)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.eval_shape(named_chain(*more).init, PARAMS)
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), {"opt": wanted}
    )
    restored = checkpoints.restore(target).state
  assert_bitwise(flatten_paths(restored), flatten_paths(state))
