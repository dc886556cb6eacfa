"""A killed or stopped run resumes with the same results as an uninterrupted run."""

import json
import os
import random
import signal
import time

import pytest

from apps.trainer.sinks import compare_metrics, read_metrics
from tests.end_to_end import runner

KILLS = int(os.environ.get("OV_KILLS", "2"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("undisturbed")
  code, printed = runner.run(*runner.TINY, f"--workdir={workdir}", cache=cache)
  assert code == 0, printed
  return workdir


def test_a_run_writes_the_files_listed_in_the_readme(undisturbed):
  metrics = read_metrics(undisturbed / "metrics.jsonl")
  names = {name for line in metrics for name in line}
  assert {"train/loss", "train/images_per_second", "train/input_wait"} <= names
  assert {"eval/caption_nll", "eval/attribute_accuracy", "eval/zero_shot_top1"} <= names
  assert [line["step"] for line in metrics if "train/loss" in line] == list(range(1, 31))
  assert metrics[0]["train/loss"] > 1.3 * metrics[-2]["train/loss"]
  page = (undisturbed / "report.html").read_text()
  assert "attribute_accuracy" in page or "attribute accuracy" in page.lower()
  assert "http://" not in page.replace("http://www.w3.org", "")


def test_kill_9_at_random_points_changes_no_metric(undisturbed, tmp_path, cache):
  dice = random.Random(os.environ.get("OV_KILL_SEED", "kill"))
  flags = (*runner.TINY, f"--workdir={tmp_path}")
  killed = []
  for step in sorted(dice.sample(range(1, 30), KILLS)):
    process = runner.start(*flags, cache=cache)
    runner.wait_for_step(tmp_path, step, process)
    time.sleep(dice.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    killed.append(lines[-1]["step"] if lines else 0)
  code, printed = runner.run(*flags, cache=cache)
  assert code == 0, printed
  print(f"killed after steps {killed}")
  assert any(0 < step < 30 for step in killed)
  assert not compare_metrics(undisturbed / "metrics.jsonl", tmp_path / "metrics.jsonl")


def test_sigterm_saves_and_the_same_command_resumes(undisturbed, tmp_path, cache):
  flags = (*runner.TINY, f"--workdir={tmp_path}")
  process = runner.start(*flags, cache=cache)
  runner.wait_for_step(tmp_path, 9, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 143, err
  assert "SIGTERM: stopped after a checkpoint of step" in err
  code, printed = runner.run(*flags, cache=cache)
  assert code == 0, printed
  assert not compare_metrics(undisturbed / "metrics.jsonl", tmp_path / "metrics.jsonl")


def test_restarting_a_finished_run_changes_nothing(undisturbed, cache):
  before = (undisturbed / "metrics.jsonl").read_bytes()
  report = json.loads((undisturbed / "report.json").read_text())
  assert report["data"]["Training, stage main"]["examples read"] == 480
  code, printed = runner.run(*runner.TINY, f"--workdir={undisturbed}", cache=cache)
  assert code == 0, printed
  assert (undisturbed / "metrics.jsonl").read_bytes() == before
  again = json.loads((undisturbed / "report.json").read_text())
  for name in ("data", "skipped", "summary"):
    assert again[name] == report[name], name
