"""clip_train on one device, on eight, and on two processes: the same losses and the same figures.

Tolerances as in devices_test; 20 steps at ten times the loss of a captioner. Ranks and classes are
counts, so that a figure that differs at all means an example lost, repeated or misread.
"""

import json

import numpy as np
import pytest

from apps.trainer.sinks import read_metrics
from tests.end_to_end import runner
from tests.multiprocess import launcher

FLAGS = (*runner.tiny_clip(), "--config.total_steps=20", "--config.checkpoint.every=20")


def run(workdir, processes, devices, *flags):
  launcher.launch(
    [str(runner.CLIP_TRAIN), *FLAGS, f"--workdir={workdir}", *flags],
    processes=processes,
    devices=devices,
    timeout=280,
    env=runner.environment(workdir.parent / f"home{processes}x{devices}"),
  )


def losses_of(workdir):
  lines = read_metrics(workdir / "metrics.jsonl")
  return np.array([line["train/loss"] for line in lines if "train/loss" in line])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("single") / "run"
  run(workdir, 1, 1)
  return workdir


@pytest.mark.parametrize(
  ("processes", "devices", "flags"),
  [
    (1, 8, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.loss.form=ring")),
    (2, 2, ("--config.mesh.fsdp=2", "--config.accumulate=2")),
  ],
)
def test_losses_agree(single, tmp_path, processes, devices, flags):
  run(tmp_path / "run", processes, devices, *flags)
  losses, several = losses_of(single), losses_of(tmp_path / "run")
  difference = np.abs(several / losses - 1).max()
  print(f"{processes} x {devices}: largest relative difference {difference:.1e} over 20 steps")
  assert len(losses) == 20
  assert difference < 5e-5
  assert losses[0] > 1.1 * losses[-1], "nothing was learnt, so nothing was compared"


def test_two_processes_find_the_same_figures(single, tmp_path):
  # 16 pairs and 32 labelled pictures in batches of 12: the last ones are not full.
  flags = ("--config.eval_only=True", f"--config.init_from.path={single}")
  found = []
  for processes, devices in ((1, 1), (2, 2)):
    again = tmp_path / str(processes)
    run(again, processes, devices, *flags, "--config.eval.batch_size=12")
    results = json.loads((again / "evaluation.json").read_text())["results"]
    found.append({result["name"]: result for result in results})
  one, two = found
  assert one.keys() == two.keys() and len(one) > 15
  for name, result in one.items():
    assert two[name]["count"] == result["count"], name
    if name in ("caption_nll", "caption_perplexity"):
      assert two[name]["value"] == pytest.approx(result["value"], rel=1e-6)
    else:
      assert two[name]["value"] == result["value"], name
