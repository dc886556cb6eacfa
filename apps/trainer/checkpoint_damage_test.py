"""Damaged checkpoints are detected, not restored and not deleted."""

import json
import pathlib
import random
import shutil

from absl import logging
import chex
from etils import epath
import jax
import jax.numpy as jnp
import pytest

from apps.trainer import checkpoint_manifest
from apps.trainer.checkpoint import (
  CheckpointError,
  Checkpoints,
  find_checkpoint,
  read_metadata,
  saved_checkpoint,
)
from apps.trainer.checkpoint_folder import find_damage

METADATA = {"stage": "84px", "data": {"position": 640}}


def make_state(seed=0):
  return {"w": jax.random.normal(jax.random.key(seed), (32, 16)), "step": jnp.int32(seed)}


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


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
def test_damaged_checkpoint_is_not_restored(tmp_path, damage, caplog):
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
    chex.assert_trees_all_equal(checkpoints.restore(abstract(first)).state, first)
    checkpoints.save(2, second, METADATA)
  with Checkpoints(tmp_path) as checkpoints:
    chex.assert_trees_all_equal(checkpoints.restore(abstract(second)).state, second)


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
      assert find_damage(checkpoint) is not None, path
      path.write_bytes(original)
  assert find_damage(checkpoint) is None


def test_damaged_checkpoint_is_not_deleted(tmp_path):
  state = {"w": jnp.zeros(2)}
  for number in range(3):
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.latest_step() == (1 if number else None)
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


def test_manifest_without_checksums(tmp_path, caplog):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  path = tmp_path / "1" / "manifest.json"
  sizes = {name: size for name, (size, _) in json.loads(path.read_text())["files"].items()}
  path.write_text(json.dumps(sizes))
  logging.use_python_logging(quiet=True)
  assert find_checkpoint(tmp_path).name == "1"
  assert "without checksums" in caplog.text
  cut(tmp_path / "1")
  assert "bytes instead of" in find_damage(epath.Path(tmp_path / "1"))


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
def test_malformed_metadata(tmp_path, damage):
  """Checkpoints of earlier versions have no checksum that would detect it first."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
  (tmp_path / "1" / "metadata" / "metadata").write_text(damage)
  checkpoint_manifest.write(epath.Path(tmp_path / "1"))
  with pytest.raises(CheckpointError) as error:
    read_metadata(epath.Path(tmp_path / "1"))
  assert "\n" not in str(error.value) and "metadata/metadata cannot be used" in str(error.value)
  assert "cannot be used" in find_damage(epath.Path(tmp_path / "1"))
  with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged, such as 1: "):
    saved_checkpoint(tmp_path)


def test_counters_contradict_history(tmp_path):
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
