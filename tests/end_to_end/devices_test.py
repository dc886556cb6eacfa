"""A run on one device, on eight, and on two processes of two devices gives the same losses.

Tolerance: data and random numbers are equal. Only the order of float32 sums over the batch differs,
with a relative error of 2^-24 per sum, which 20 AdamW steps amplify. Where a gradient is near zero,
the sign of Adam's update depends on rounding. 3e-6 was measured after 20 steps; 5e-5 leaves room. A
wrong batch order, mask or gradient mean changes losses by 1e-2.
"""

import numpy as np
import pytest

from apps.trainer.sinks import read_metrics
from tests.end_to_end import runner
from tests.multiprocess import launcher

FLAGS = (*runner.TINY, "--config.total_steps=20", "--config.checkpoint.every=20")


def losses(workdir):
  lines = read_metrics(workdir / "metrics.jsonl")
  return np.array([line["train/loss"] for line in lines if "train/loss" in line])


def train(workdir, processes, devices, *flags):
  home = workdir.parent / f"home{processes}x{devices}"
  flags += (runner.NO_COMPILE_CACHE,) if processes > 1 else ()
  launcher.launch(
    [str(runner.CAPTION_TRAIN), *FLAGS, f"--workdir={workdir}", *flags],
    processes=processes,
    devices=devices,
    timeout=280,
    env=runner.environment(home),
  )
  return losses(workdir)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  return train(tmp_path_factory.mktemp("single") / "run", 1, 1)


@pytest.mark.parametrize(
  ("processes", "devices", "mesh"),
  [
    (1, 8, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
    (2, 2, ("--config.mesh.fsdp=2",)),
  ],
)
def test_losses_agree(single, tmp_path, processes, devices, mesh):
  several = train(tmp_path / "run", processes, devices, *mesh)
  assert len(single) == 20
  difference = np.abs(several / single - 1).max()
  print(f"{processes} x {devices}: largest relative difference {difference:.1e} over 20 steps")
  assert difference < 5e-5
  assert single[0] > 1.3 * single[-1], "nothing was learnt, so nothing was compared"
