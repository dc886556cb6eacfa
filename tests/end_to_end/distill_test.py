"""Distillation as a user runs it: online, from stored embeddings, resumed, and with wrong teachers.

Two epochs with crops and colour jitter. Online and stored embeddings come from the same program, so
all metrics and parameters are equal bit for bit.
"""

import shutil

import numpy as np
import pytest

from apps.demo.scene_shards import make_scenes_dataset
from apps.trainer.init_source import open_source
from apps.trainer.sinks import compare_metrics, read_metrics
from tests.end_to_end import runner

EPOCHS, RECORDS, BATCH = 2, 200, 16
STEPS = EPOCHS * RECORDS // BATCH
TIMEOUT = 800  # seconds of a run on a machine with other load
FLAGS = (
  *runner.tiny_clip("clip"),
  f"--config.total_steps={STEPS}",
  "--config.checkpoint.every=10",
  "--config.checkpoint.keep_last=9",
  "--config.input.demo.train_examples=0",  # the data of the fixture, without evaluations
  "--config.input.split=train",
  "--config.input.fit=crop",
  "--config.input.color_jitter=True",
)


def more(**where):
  """Return the flag of both distillation losses, with the same teacher or embeddings."""
  fields = {"weight": 0.5, **{name: str(path) for name, path in where.items()}}
  losses = {"distill": fields, "affinity": fields}
  return f"--config.loss.more={losses}"


def data(folder):
  return f"--config.input.data_dir={folder / 'data'}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
  """Return the folder of a teacher, of its embeddings, and of a run with each of them."""
  folder = tmp_path_factory.mktemp("runs")
  make_scenes_dataset(folder / "data", {"train": RECORDS}, image_size=32, workers=0)

  def run(name, *flags):
    given = (*FLAGS, data(folder), f"--workdir={folder / name}", *flags)
    code, printed = runner.run(*given, cache=cache, app=runner.CLIP_TRAIN, timeout=TIMEOUT)
    assert code == 0, printed
    return printed

  run("teacher", "--config.total_steps=6")
  printed = run("online", more(teacher=folder / "teacher"))
  assert f"teacher {folder / 'teacher'}, fingerprint " in printed
  run("online", more(teacher=folder / "teacher"), f"--store_teacher={folder / 'stored'}")
  run("offline", more(embeddings=folder / "stored"))
  return folder


def test_wrong_teachers_are_refused_before_compiling(runs, tmp_path, cache):
  def fails(said, *flags):
    code, printed = runner.run(
      *FLAGS, data(runs), *flags, cache=cache, app=runner.CLIP_TRAIN, timeout=TIMEOUT
    )
    runner.expect_one_line(printed, code, said)
    assert "compiling" not in printed

  old, new = tmp_path / "old", f"--workdir={tmp_path / 'new'}"
  shutil.copytree(runs / "online", old)
  teacher, stored = more(teacher=runs / "online"), more(embeddings=runs / "stored")
  fails("was trained with the teacher .*, and this run has the", teacher, f"--workdir={old}")
  fails("was trained with the teacher .* has no teacher", f"--workdir={old}")
  fails("more.distill.teacher=/no/such: no such folder", more(teacher="/no/such"), new)
  fails("holds 400 positions, and the run reads 480", stored, new, "--config.total_steps=30")
  fails("was stored with seed=0, and this run has 7", stored, new, "--config.seed=7")
  jitter = "--config.input.color_jitter=False"
  fails("was stored with color_jitter=True", stored, new, jitter)
  make_scenes_dataset(tmp_path / "data", {"train": RECORDS}, seed=1, image_size=32, workers=0)
  fails("was stored with data=", stored, new, data(tmp_path))
  fails("already holds embeddings", stored, new, f"--store_teacher={runs / 'stored'}")
  broken = tmp_path / "broken"
  shutil.copytree(runs / "stored", broken)
  np.save(broken / "embeddings.npy", np.zeros((400, 3), np.float32))
  fails(r"is float32\[400, 3\], and teacher.json", more(embeddings=broken), new)


def test_a_resumed_run_equals_an_uninterrupted_one(runs, tmp_path, cache):
  # The first steps with the teacher, the others from its stored embeddings.
  workdir = tmp_path / "resumed"
  shutil.copytree(runs / "online", workdir)
  for step in (workdir / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > 10:
      shutil.rmtree(step)
  flags = (*FLAGS, data(runs), more(embeddings=runs / "stored"), f"--workdir={workdir}")
  code, printed = runner.run(*flags, cache=cache, app=runner.CLIP_TRAIN, timeout=TIMEOUT)
  assert code == 0 and "restoring step 10" in printed, printed
  assert not compare_metrics(runs / "online/metrics.jsonl", workdir / "metrics.jsonl")
  assert_equal_params(runs / "online", workdir)


def test_stored_embeddings_equal_the_teacher_bit_for_bit(runs):
  online, offline = (read_metrics(runs / name / "metrics.jsonl") for name in ("online", "offline"))
  losses = [line["train/distill_loss"] for line in online if "train/distill_loss" in line]
  assert len(losses) == STEPS and losses[-1] < losses[0]
  assert len(online) == len(offline)
  assert not compare_metrics(runs / "online/metrics.jsonl", runs / "offline/metrics.jsonl")
  assert_equal_params(runs / "online", runs / "offline")
  with pytest.raises(AssertionError):  # the comparison can fail
    assert_equal_params(runs / "online", runs / "online/checkpoints/10")
  table = np.load(runs / "stored/embeddings.npy")
  assert table.shape == (EPOCHS * RECORDS, 32) and table.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)  # rounding of float32
  first, second = np.unique(table[:RECORDS], axis=0), np.unique(table[RECORDS:], axis=0)
  assert len(first) == len(second) == RECORDS  # each record once per epoch
  assert not np.isin(first[:, 0], second[:, 0]).all()  # other crops and colours


def assert_equal_params(first, second):
  one, two = (open_source(path) for path in (first, second))
  a, b = one.read(one.arrays), two.read(one.arrays)
  for name, array in a.items():
    np.testing.assert_array_equal(array, b[name], err_msg=name)
