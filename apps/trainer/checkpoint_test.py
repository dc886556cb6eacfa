"""Tests of checkpoints: exact restore, atomic saves, error messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import pytest

from apps.trainer import state as state_lib
from apps.trainer.checkpoint import (
  CheckpointError,
  Checkpoints,
  check_restorable,
  find_checkpoint,
  read_metadata,
  restore_arrays,
  saved_arrays,
)
from apps.trainer.optimizer import OptimizerConfig, make_optimizer

PARAMS = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "frozen": jnp.ones(3)}
METADATA = {"stage": "84px", "data": {"position": 640}, "config": {"lr": 1e-3}}


def make_state(seed=0, size=(8, 4), ema=True):
  """Return a state with all kinds of leaves (bfloat16 moments, counts, holes if frozen)."""
  params = {**PARAMS, "dense": {"kernel": jnp.ones(size), "bias": jnp.zeros(size[1])}}
  optimizer = make_optimizer(OptimizerConfig(1e-3, frozen=("frozen",)), params, 10)
  state = state_lib.new_state(params, optimizer.tx, ema=ema)
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  fill = lambda x: (
    jax.random.normal(next(keys), x.shape, x.dtype) if x.dtype != jnp.int32 else x + seed
  )
  return jax.tree.map(fill, state)


def abstract(state):
  sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_bitwise(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_restore_is_bitwise_exact(tmp_path):
  state = make_state()
  state["params"]["dense"]["bias"] = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)
  assert state["opt"]["adamw"].inner_state.mu["dense"]["kernel"].dtype == jnp.bfloat16
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.save(5, state, METADATA)
    assert not checkpoints.save(5, state, METADATA)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 5
    restored = checkpoints.restore(abstract(state))
  assert_bitwise(restored.state, state)
  assert restored.metadata.items() >= {**METADATA, "step": 5}.items()
  assert restored.metadata["versions"]["jax"] == jax.__version__


def test_saved_state_survives_donation(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"params": {"w": jnp.zeros((512, 1024))}, "step": jnp.int32(0)}
  with Checkpoints(tmp_path, keep_last=4) as checkpoints:
    for i in range(1, 5):
      state = step(state)
      checkpoints.save(i, state, {})
      for _ in range(3):  # while the save runs
        state = step(state)
    for i in range(1, 5):
      saved = checkpoints.restore(abstract(state), step=i).state
      expected = 4 * (i - 1) + 1
      assert int(saved["step"]) == expected
      np.testing.assert_array_equal(saved["params"]["w"], expected)


def test_keeps_the_last_and_every_kth(tmp_path):
  state = {"w": jnp.zeros(2)}
  with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, state, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 7
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6", "7"]


def test_interrupted_deletion_is_completed(tmp_path):
  state = {"w": jnp.zeros(2)}
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state, {})
  shutil.rmtree(tmp_path / "1/state")
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    checkpoints.save(3, state, {})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_restore_deletes_nothing(tmp_path):
  with Checkpoints(tmp_path, keep_last=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {"w": jnp.full(2, float(step))}, {})
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    restored = checkpoints.restore(abstract({"w": jnp.zeros(2)}), step=1)
  np.testing.assert_array_equal(restored.state["w"], 1)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_old_checkpoint_is_deleted_before_the_next_save(tmp_path):
  seen = []
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    verify = checkpoints._verify
    checkpoints._checkpointer._post_finalization_callback = lambda: (
      verify(),
      seen.append(sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit())),
    )
    for step in (1, 2, 3):
      checkpoints.save(step, {"w": jnp.zeros(2)}, {})
  assert seen == [[], ["1"], ["2"]]


def test_failed_deletion_is_logged(tmp_path, monkeypatch, caplog):
  def refuse(self, missing_ok=False):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"w": jnp.zeros(2)}, {})
  assert f"{tmp_path / '1'} is not kept, but cannot be deleted" in caplog.text
  assert find_checkpoint(tmp_path).name == "2"


def test_kill_during_save_keeps_previous_checkpoint(tmp_path):
  """The process dies after the files are written, before the rename."""
  program = """
    import os, signal, sys
    import jax.numpy as jnp
    from apps.trainer.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"w": jnp.full(1000, 1.0)}, {})
    checkpoints.wait()
    checkpoints._checkpointer._post_finalization_callback = (
        lambda: os.kill(os.getpid(), signal.SIGKILL))
    checkpoints.save(2, {"w": jnp.full(1000, 2.0)}, {})
    checkpoints.wait()
  """
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    check=False,
  )
  assert run.returncode == -signal.SIGKILL
  left = {p.name for p in tmp_path.iterdir()}
  assert "1" in left and "2" not in left and len(left) == 2  # 1 and a temporary directory
  target = abstract({"w": jnp.zeros(1000)})
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    np.testing.assert_array_equal(checkpoints.restore(target).state["w"], 1.0)
    checkpoints.save(2, {"w": jnp.full(1000, 3.0)}, {})
  assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}
  np.testing.assert_array_equal(restore_arrays(find_checkpoint(tmp_path), target)["w"], 3.0)


def test_failed_background_save_raises(tmp_path, monkeypatch, capfd):
  state = {"w": jnp.zeros(2)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, {})
  checkpoints.wait()

  def no_space(checkpoint):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("apps.trainer.checkpoint_manifest.write", no_space)
    checkpoints.save(2, state, {})
    with pytest.raises(CheckpointError, match="step 2 .*No space left .*newest .* is of step 1;"):
      checkpoints.wait()
  checkpoints.close()
  assert [p.name for p in tmp_path.iterdir()] == ["1"]  # its files are removed
  captured = capfd.readouterr()
  assert "Traceback" not in captured.err + captured.out


def test_unwritable_folder_fails_at_once(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "checkpoints").touch()
  with pytest.raises(CheckpointError, match=r"step 1 .*newest complete checkpoint is \(none\)"):
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  names = [thread.name for thread in threading.enumerate() if not thread.daemon]
  assert not [name for name in names if "array_type_handler" in name or "metadata" in name], names


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "b?", "c\\d", "e.__lock", "f\udc80"])
def test_path_with_wildcards_is_rejected(tmp_path, name):
  with pytest.raises(CheckpointError, match="choose a path"):
    Checkpoints(tmp_path / name / "checkpoints")
  assert not (tmp_path / name).exists()


def test_unusual_paths_restore(tmp_path):
  folder = tmp_path / "100% \u00e9 {a} 'b' #1 ~ ]"
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {"w": jnp.arange(3.0)}, {})
  restored = restore_arrays(find_checkpoint(folder), abstract({"w": jnp.zeros(3)}))
  np.testing.assert_array_equal(restored["w"], [0, 1, 2])


def test_incomplete_save_fails(tmp_path, monkeypatch):
  """Orbax can skip the index of all arrays with only a warning."""
  verify = Checkpoints._verify

  def lose_index(checkpoints):
    (index,) = tmp_path.glob("1.*/state/manifest.ocdbt")
    index.unlink()
    verify(checkpoints)

  monkeypatch.setattr(Checkpoints, "_verify", lose_index)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="manifest.ocdbt was not written"):
      checkpoints.wait()
  assert not (tmp_path / "1").exists()


def test_opening_read_only_changes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  (tmp_path / "1" / "manifest.json").unlink()
  (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # another program is saving
  Checkpoints(tmp_path, read_only=True).close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]


def test_state_of_another_model(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), METADATA)
    other = make_state(size=(8, 6), ema=False)
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore(abstract(other))
  message = str(error.value)
  assert "\n" not in message and len(message) < 1000
  assert "params/dense/kernel: saved float32[8, 4], expected float32[8, 6]" in message
  assert "does not fit this run in 9 arrays" in message and "init_from" in message


def test_changed_ema_setting(tmp_path):
  saved, now = {"optimizer": {"ema_decay": None}}, {"optimizer": {"ema_decay": 0.999}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(ema=False), METADATA)
  target = abstract(make_state(ema=True))
  with pytest.raises(CheckpointError) as error:
    check_restorable(find_checkpoint(tmp_path), target, config=now, saved_config=saved)
  assert "Settings that differ: config.optimizer.ema_decay: saved null, now 0.999." in str(
    error.value
  )
  with pytest.raises(CheckpointError, match="Keep config.optimizer.ema_decay as it was"):
    check_restorable(find_checkpoint(tmp_path), target)


def test_find_checkpoint_accepts_workdir_checkpoints_or_step(tmp_path):
  directory = tmp_path / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(3, {"w": jnp.zeros(2)}, {})
    checkpoints.save(4, {"w": jnp.zeros(2)}, {})
  assert find_checkpoint(tmp_path) == find_checkpoint(directory) == directory / "4"
  assert find_checkpoint(directory / "3") == find_checkpoint(tmp_path, step=3) == directory / "3"
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .* there are \[3, 4\]"):
    find_checkpoint(tmp_path, step=7)
  with pytest.raises(CheckpointError, match="expected a run's workdir"):
    find_checkpoint(tmp_path / "elsewhere")


def test_partial_restore(tmp_path):
  state = make_state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, METADATA)
  checkpoint = find_checkpoint(tmp_path)
  assert saved_arrays(checkpoint)["params/dense/kernel"].shape == (8, 4)
  part = {"params": {"dense": {"bias": abstract(state)["params"]["dense"]["bias"]}}}
  read = restore_arrays(checkpoint, part, partial=True)
  assert_bitwise(read, {"params": {"dense": {"bias": state["params"]["dense"]["bias"]}}})


def test_error_messages(tmp_path):
  with pytest.raises(ValueError, match="keep_last=0"):
    Checkpoints(tmp_path, keep_last=0)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="JSON"):
      checkpoints.save(1, {"w": jnp.zeros(2)}, {"bad": np.zeros(2)})
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
      checkpoints.restore(abstract({"w": jnp.zeros(2)}))
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  file = tmp_path / "1" / "metadata" / "metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), "format": 9}))
  with pytest.raises(CheckpointError, match="format 9"):
    read_metadata(tmp_path / "1")
