"""Checkpoints: bit for bit, never half, readable errors."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import pytest

from apps.trainer import checkpoint_manifest
from apps.trainer import state as state_lib
from apps.trainer.checkpoint import (
  CheckpointError,
  Checkpoints,
  check_restorable,
  find_checkpoint,
  read_metadata,
  restore_arrays,
  saved_arrays,
  saved_checkpoint,
)
from apps.trainer.checkpoint_folder import fault
from apps.trainer.optimizer import OptimizerConfig, make_optimizer

PARAMS = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "frozen": jnp.ones(3)}
METADATA = {"stage": "84px", "data": {"position": 640}, "config": {"lr": 1e-3}}


def make_state(seed=0, size=(8, 4), ema=True):
  """A state with every kind of leaf (bfloat16 moments, counts, holes for frozen parameters)."""
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


def test_restores_every_bit_and_the_metadata(tmp_path):
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


def test_a_save_holds_the_state_of_its_moment_although_the_step_donates_it(tmp_path):
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
    assert checkpoints.all_steps() == [4, 6, 7]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6", "7"]


def some_array_file(checkpoint: pathlib.Path) -> pathlib.Path:
  return max((p for p in checkpoint.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(checkpoint):
  file = some_array_file(checkpoint)
  file.write_bytes(file.read_bytes()[:-1])


def copy_first(checkpoint):
  shutil.rmtree(checkpoint)
  shutil.copytree(checkpoint.with_name("1"), checkpoint)


DAMAGE = {
  "an array file is gone": lambda c: some_array_file(c).unlink(),
  "an array file is cut": cut,
  "the metadata is gone": lambda c: (c / "metadata" / "metadata").unlink(),
  "the tree description is gone": lambda c: (c / "state" / "_METADATA").unlink(),
  "the manifest is gone": lambda c: (c / "manifest.json").unlink(),
  "the manifest is cut": lambda c: (c / "manifest.json").write_text("{"),
  "the manifest is a list": lambda c: (c / "manifest.json").write_text("[]"),
  "the manifest is empty": lambda c: (c / "manifest.json").write_text("{}"),
  "it is a copy of another step": copy_first,
  "the directory is empty": lambda c: [p.unlink() for p in c.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_never_restored(tmp_path, damage, caplog):
  first, second = make_state(1), make_state(2)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, first, METADATA)
    checkpoints.save(2, second, METADATA)
  DAMAGE[damage](tmp_path / "2")
  assert find_checkpoint(tmp_path).name == "1"  # reads only: step 2 stays where it is
  with pytest.raises(CheckpointError, match="no intact checkpoint of step 2"):
    find_checkpoint(tmp_path, step=2)
  logging.use_python_logging(quiet=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert "2 is damaged" in caplog.text and "damaged-2" in caplog.text
    assert_bitwise(checkpoints.restore(abstract(first)).state, first)
    checkpoints.save(2, second, METADATA)
  with Checkpoints(tmp_path) as checkpoints:
    assert_bitwise(checkpoints.restore(abstract(second)).state, second)


def test_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
  """A process that dies with files written and the final name not given."""
  program = """
    import os, signal, sys
    import jax.numpy as jnp
    from apps.trainer.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"w": jnp.full(1000, 1.0)}, {})
    checkpoints.wait()
    checkpoints._manager._checkpointer._post_finalization_callback = (
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


def test_a_failing_background_save_surfaces(tmp_path, monkeypatch, capfd):
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
  assert [p.name for p in tmp_path.iterdir()] == ["1"]  # what it left takes no space
  captured = capfd.readouterr()
  assert "Traceback" not in captured.err + captured.out


def test_a_folder_that_cannot_be_written_fails_at_once(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "checkpoints").touch()
  with pytest.raises(CheckpointError, match=r"step 1 .*newest complete checkpoint is \(none\)"):
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  names = [thread.name for thread in threading.enumerate() if not thread.daemon]
  assert not [name for name in names if "array_type_handler" in name or "metadata" in name], names


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "b?", "c\\d", "e.__lock", "f\udc80"])
def test_a_path_whose_checkpoints_cannot_be_read_is_refused(tmp_path, name):
  with pytest.raises(CheckpointError, match="choose a path"):
    Checkpoints(tmp_path / name / "checkpoints")
  assert not (tmp_path / name).exists()


def test_unusual_paths_restore(tmp_path):
  folder = tmp_path / "100% \u00e9 {a} 'b' #1 ~ ]"
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {"w": jnp.arange(3.0)}, {})
  restored = restore_arrays(find_checkpoint(folder), abstract({"w": jnp.zeros(3)}))
  np.testing.assert_array_equal(restored["w"], [0, 1, 2])


def test_a_save_that_would_not_restore_fails(tmp_path, monkeypatch):
  """As where orbax skips the index of all arrays, with a warning only."""
  folder = "orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files"

  async def skip(*_, **__):
    pass

  monkeypatch.setattr(folder, skip)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="manifest.ocdbt was not written"):
      checkpoints.wait()
  assert not (tmp_path / "1").exists()


def flip(path, dice):
  content = bytearray(path.read_bytes())
  bit = dice.randrange(8 * len(content))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_every_flipped_bit_is_detected(tmp_path):
  dice = random.Random(0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), METADATA)
  checkpoint = find_checkpoint(tmp_path)
  files = [p for item in ("state", "metadata") for p in (tmp_path / "1" / item).rglob("*")]
  files = [p for p in files if p.is_file()] + [tmp_path / "1" / "manifest.json"]
  assert len(files) > 8
  for path in files:
    original = path.read_bytes()
    for _ in range(30):
      flip(path, dice)
      assert fault(checkpoint) is not None, path
      path.write_bytes(original)
  assert fault(checkpoint) is None


def test_a_damaged_checkpoint_is_never_deleted(tmp_path):
  state = {"w": jnp.zeros(2)}
  for number in range(3):
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.all_steps() == ([1] if number else [])
      checkpoints.save(1, state, {})
      checkpoints.save(2, state, {"number": number})
    flip(tmp_path / "2" / "metadata" / "metadata", random.Random(number))
  Checkpoints(tmp_path).close()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "1",
    "damaged-2",
    "damaged-2-2",
    "damaged-2-3",
  ]


def test_opening_read_only_changes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  (tmp_path / "1" / "manifest.json").unlink()
  (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # another program is saving
  Checkpoints(tmp_path, read_only=True).close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]


def test_a_manifest_of_sizes_is_still_read(tmp_path, caplog):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  path = tmp_path / "1" / "manifest.json"
  sizes = {name: size for name, (size, _) in json.loads(path.read_text())["files"].items()}
  path.write_text(json.dumps(sizes))
  logging.use_python_logging(quiet=True)
  assert find_checkpoint(tmp_path).name == "1"
  assert "without checksums" in caplog.text
  cut(tmp_path / "1")
  assert "bytes instead of" in fault(find_path(tmp_path))


@pytest.mark.parametrize(
  "damage",
  [
    "[]",
    "{}",
    "{",
    "[" * 100_000,
    '{"step": 1, "format": 1, "versions": []}',
    '{"step": 1e300, "format": 1, "versions": {}}',
    '{"step": -1, "format": 1, "versions": {}}',
    '{"step": 1, "format": 1, "versions": {}, "loader": []}',
    '{"step": 1, "format": 1, "versions": {}, "stage": 3}',
    '{"step": 1, "format": 1, "versions": {}, "history": [{"stage": "main"}]}',
  ],
)
def test_metadata_of_a_wrong_shape_are_damage(tmp_path, damage):
  """Where no checksum finds it first, as in a checkpoint of an earlier version."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  (tmp_path / "1" / "metadata" / "metadata").write_text(damage)
  checkpoint_manifest.write(find_path(tmp_path))
  with pytest.raises(CheckpointError) as error:
    read_metadata(find_path(tmp_path))
  assert "\n" not in str(error.value) and "metadata/metadata cannot be used" in str(error.value)
  assert "cannot be used" in fault(find_path(tmp_path))
  with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged, such as 1: "):
    saved_checkpoint(tmp_path)


def test_counters_that_contradict_the_history_are_damage(tmp_path):
  history = [{"stage": "main", "first_step": 0, "examples": 0, "position": 0, "batch_size": 64}]
  loader = {"position": 128, "fingerprint": "f", "order": {}, "skipped": {}}
  good = {"stage": "main", "loader": loader, "examples": 128, "history": history}
  for change, message in (
    ({}, None),
    ({"loader": {**loader, "position": 192}}, "loader.position is 192, but its history counts 128"),
    ({"examples": 64}, "examples is 64, but its history counts 128"),
    ({"stage": "other"}, "does not fit its history"),
  ):
    with Checkpoints(tmp_path / str(message)) as checkpoints:
      if message is None:
        checkpoints.save(2, {"w": jnp.zeros(2)}, good)
        checkpoints.wait()
      else:
        checkpoints.save(2, {"w": jnp.zeros(2)}, {**good, **change})
        with pytest.raises(CheckpointError, match=message):
          checkpoints.wait()


def find_path(folder):
  return epath.Path(folder / "1")


def test_a_state_of_another_model_is_refused_in_one_line(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), METADATA)
    other = make_state(size=(8, 6), ema=False)
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore(abstract(other))
  message = str(error.value)
  assert "\n" not in message and len(message) < 1000
  assert "params/dense/kernel: saved float32[8, 4], expected float32[8, 6]" in message
  assert "does not fit this run in 9 arrays" in message and "init_from" in message


def test_an_average_that_is_added_or_dropped_names_its_setting(tmp_path):
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


def test_find_checkpoint_takes_a_workdir_its_checkpoints_or_one_step(tmp_path):
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


def test_parts_can_be_read_alone(tmp_path):
  state = make_state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, METADATA)
  checkpoint = find_checkpoint(tmp_path)
  assert saved_arrays(checkpoint)["params/dense/kernel"].shape == (8, 4)
  part = {"params": {"dense": {"bias": abstract(state)["params"]["dense"]["bias"]}}}
  read = restore_arrays(checkpoint, part, partial=True)
  assert_bitwise(read, {"params": {"dense": {"bias": state["params"]["dense"]["bias"]}}})


def test_errors_name_value_and_remedy(tmp_path):
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
