"""A curriculum moves from 8 devices to 4 and back, both times in the middle of its second stage."""

import numpy as np

from apps.trainer.sinks import read_metrics
from tests.end_to_end import runner
from tests.end_to_end.curricula import STEPS, Curriculum
from tools.python import simulated_devices

CURRICULUM = Curriculum(
  runner.CAPTION_TRAIN,
  ("small", "large"),
  (
    *runner.TINY,
    "--config.eval.caption_examples=0",
    "--config.stages=({'name': 'small'},"
    " {'name': 'large', 'model.image_size': 48, 'optimizer.learning_rate': 1e-3})",
  ),
)
SPLIT = "--config.mesh.fsdp=2"


def column(workdir, name):
  """Return the values of a metric ordered by step."""
  lines = read_metrics(workdir / "metrics.jsonl")
  return np.array([line[name] for line in lines if name in line])


def simulated(devices):
  """Return the environment variable that simulates this number of CPU devices."""
  return {"XLA_FLAGS": simulated_devices.xla_flags(devices)}


def test_examples_and_schedule_do_not_change(tmp_path):
  """Examples and learning rates are equal, and losses agree within the tolerance.

  As in devices_test, only the order of float32 sums over the batch differs. The relative error of
  2^-24 per sum is amplified by 32 AdamW steps. A wrong batch or rate changes losses by 1e-2.
  """
  single, moved, cache = (tmp_path / name for name in ("single", "moved", "home"))
  CURRICULUM.run(single, cache=cache)
  CURRICULUM.kill(1, moved, SPLIT, cache=cache, **simulated(8))
  left = CURRICULUM.kill(1, moved, cache=cache, **simulated(4))
  printed = CURRICULUM.run(moved, SPLIT, cache=cache, **simulated(8))
  assert f"large: restoring step {left}" in printed
  for exact in ("step", "train/learning_rate", "train/examples"):
    np.testing.assert_array_equal(column(moved, exact), column(single, exact))
  assert CURRICULUM.metadata(moved)["loader"] == CURRICULUM.metadata(single)["loader"]
  losses = column(single, "train/loss")
  difference = np.abs(column(moved, "train/loss") / losses - 1).max()
  print(f"8 -> 4 -> 8 devices: largest relative difference of a loss {difference:.1e}")
  assert difference < 5e-5
  assert losses[0] > 1.3 * losses[STEPS - 1], "nothing was learnt, so nothing was compared"
