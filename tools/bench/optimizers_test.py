"""Tests of the optimizer comparison: training, skipping finished runs, resuming, and the table."""

import json
import subprocess
import sys

import pytest

from apps.trainer.errors import UserError
from tools.bench import optimizers
from tools.bench.optimizers import Run, table, train

_BLOCK = "{'width': 32, 'depth': 1, 'mlp_dim': 64, 'num_heads': 2}"
TINY = [
  "--config=:runlocal",
  "--config.compile_cache=",  # Bazel's sandbox has a read-only home directory
  "--config.model.encoder=mu/16",
  "--config.model.encoder_options={}",
  f"--config.model.decoder_options={_BLOCK}",
  "--config.model.image_size=32",
  "--config.input.demo.image_size=32",
  "--config.input.demo.train_examples=200",
  "--config.input.demo.eval_examples=16",
  "--config.input.demo.zero_shot_examples=8",
  "--config.batch_size=16",
  "--config.total_steps=8",
  "--config.eval.batch_size=16",
  "--config.eval.caption_examples=16",
]


def write(run, out, value):
  run.result(out).parent.mkdir(parents=True, exist_ok=True)
  name = optimizers.APPS[run.app][2]
  rows = [{"name": name, "value": value}, {"name": name, "value": 99.0}]  # other examples
  run.result(out).write_text(json.dumps({"results": rows}))


def test_the_table_has_mean_and_spread_and_marks_the_best_rate(tmp_path):
  runs = optimizers.plan(["clip"], ["adamw"], ["1e-3", "2e-3", "4e-3"], ["0", "1"])
  values = {("1e-3", "0"): 0.5, ("1e-3", "1"): 0.7, ("2e-3", "0"): 0.6, ("2e-3", "1"): 0.8}
  values["4e-3", "0"] = 0.9  # the other seed is not finished
  for (rate, seed), value in values.items():
    write(Run("clip", "adamw", rate, seed), tmp_path, value)
  lines = table(runs, tmp_path).splitlines()
  assert lines[2:] == [
    "| clip | adamw | 1e-3 | img2txt_r1 | 0.6000 | 0.5000 | 0.7000 | 0.1414 | 2 |",
    "| clip | adamw | **2e-3** | img2txt_r1 | 0.7000 | 0.6000 | 0.8000 | 0.1414 | 2 |",
    "| clip | adamw | 4e-3 | img2txt_r1 | 0.9000 | 0.9000 | 0.9000 | nan | 1 |",
  ]


def test_a_failed_run_names_its_log_and_a_finished_run_is_skipped(tmp_path, monkeypatch):
  monkeypatch.setattr(Run, "command", lambda *_: [sys.executable, "-c", "print('why'); exit(3)"])
  run = Run("caption", "muon", "1e-3", "0")
  with pytest.raises(UserError, match=r"muon-1e-3-0 ended with exit code 3: why; see .*log.txt"):
    train(run, tmp_path, [])
  assert (run.workdir(tmp_path) / "log.txt").read_text() == "why\n"
  write(run, tmp_path, 0.5)
  train(run, tmp_path, [])


def test_a_tiny_comparison_from_the_command_line(tmp_path):
  command = [
    sys.executable, optimizers.__file__, f"--out={tmp_path}", "--apps=caption", "--rates=2e-3",
    "--seeds=0", "--", *TINY,
  ]  # fmt: skip
  first = subprocess.run(command, capture_output=True, text=True)
  assert first.returncode == 0, first.stderr
  run = Run("caption", "muon", "2e-3", "0")
  saved = json.loads((run.workdir(tmp_path) / "config.json").read_text())
  assert saved["optimizer"]["name"] == "muon" and saved["optimizer"]["learning_rate"] == 2e-3
  assert not (run.workdir(tmp_path) / "data").exists()
  before = (run.workdir(tmp_path) / "log.txt").read_text()
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.stdout == first.stdout and "| caption | muon | **2e-3** |" in again.stdout
  assert (run.workdir(tmp_path) / "log.txt").read_text() == before
