"""Tests of the comparison of objectives: results, resuming, equal processor time, and the table."""

import json
import sys

import pytest

from apps.trainer.errors import UserError
from tools.bench import objectives
from tools.bench.objectives import Run, read_results, steps_within, table, train

FAKE = """
import json, pathlib, sys
flags = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(flags["--workdir"])
if "--config.eval_only" in flags:
  if (folder / "fail").exists():
    sys.exit("no memory")
  result = {"name": "txt2img_r1", "value": 0.25}
  (folder / "evaluation.json").write_text(json.dumps({"results": [result]}))
else:
  assert flags["--config.input.eval_data_dir"] == ""
  with open(folder / "trained", "a") as file:
    file.write(flags["--config.total_steps"] + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  program = tmp_path / "fake.py"
  program.write_text(FAKE)
  real = Run.command
  command = lambda *a: [sys.executable, str(program), *real(*a)[2:]]
  monkeypatch.setattr(Run, "command", command)
  return tmp_path


def test_commands_choose_app_objective_and_optimizer(tmp_path):
  command = Run("siglip", "muon", "2", "50 steps").command(tmp_path, tmp_path / "d", 50, ["--x=1"])
  text = " ".join(command)
  assert "clip_train.py" in text and f"icons_clip.py:data={tmp_path / 'd'},loss=siglip" in text
  assert "optimizer.name=muon" in text and "seed=2" in text and "warmup_steps=10" in text
  assert "total_steps=50" in text and command[-1] == "--x=1"
  text = " ".join(Run("openvision2", "adamw", "0", "1 CPU min").command(tmp_path, tmp_path, 5, []))
  assert "caption_train.py" in text and "icons_caption.py" in text and "loss=" not in text


def test_a_result_is_kept_and_an_interrupted_evaluation_does_not_train_again(fake):
  run, results = Run("clip", "adamw", "0", "7 steps"), fake / "results.jsonl"
  workdir = run.workdir(fake)
  workdir.mkdir()
  (workdir / "fail").touch()
  with pytest.raises(UserError, match=r"clip-adamw-0-7_steps ended with exit code 1: no memory"):
    train(run, 7, fake, fake, results, [])
  assert not read_results(results)
  (workdir / "fail").unlink()
  train(run, 7, fake, fake, results, ["--config.batch_size=8"])
  assert (workdir / "trained").read_text() == "7\n"
  row = read_results(results)[run]
  assert row["steps"] == 7 and row["rate"] == "1e-3" and row["metrics"] == {"txt2img_r1": 0.25}
  assert row["train CPU s"] > 0 and row["arguments"] == ["--config.batch_size=8"]


def test_damaged_results_are_reported(tmp_path):
  file = tmp_path / "results.jsonl"
  assert read_results(file) == {}
  for text in ("{}\n", "x\n", "[1]\n"):
    file.write_text(text)
    with pytest.raises(ValueError, match="line 1 is not a result"):
      read_results(file)


def row(objective, seed, value, cpu, steps=100, budget="100 steps", metric="txt2img_r1"):
  return {
    "objective": objective, "optimizer": "adamw", "seed": seed, "budget": budget, "steps": steps,
    "train CPU s": cpu, "metrics": {metric: value},
  }  # fmt: skip


def test_equal_processor_time_is_derived_from_the_median_cost_of_a_step():
  rows = [row("clip", str(i), 0.1, cpu) for i, cpu in enumerate((100, 120, 900))]
  rows.append(row("clip", "0", 0.1, 1, budget="10 CPU min"))
  assert steps_within(600, "clip", "adamw", rows) == 500
  with pytest.raises(UserError, match="no run of cappa with adamw is finished; run with --steps"):
    steps_within(600, "cappa", "adamw", rows)


def test_the_table_has_means_and_spreads_over_seeds():
  rows = [row("clip", "0", 0.1, 100), row("clip", "1", 0.2, 120)]
  rows.append(row("cappa", "0", 2.5, 90, metric="nll_per_token"))
  assert table(rows).splitlines()[2:] == [
    "| clip | adamw | 100 steps | 2 | 100 | 110 |  | 15.00 ± 7.1 |  |  |",
    "| cappa | adamw | 100 steps | 1 | 100 | 90 |  |  |  | 2.50 |",
  ]


def test_a_comparison_from_the_command_line(fake, monkeypatch, capsys):
  flags = objectives.flags.FLAGS
  values = {"data": str(fake), "out": str(fake / "out"), "steps": 3, "objectives": ["clip"]}
  flags(["objectives", "--optimizers=muon", "--seeds=0,1"])
  for name, value in values.items():
    monkeypatch.setattr(flags[name], "value", value)
  objectives.main([])
  lines = (fake / "out" / "results.jsonl").read_text().splitlines()
  assert [json.loads(line)["seed"] for line in lines] == ["0", "1"]
  first = capsys.readouterr().out
  objectives.main([])
  assert capsys.readouterr().out.splitlines() == first.splitlines()[2:]  # nothing trains again
  monkeypatch.setattr(flags["objectives"], "value", ["glip"])
  with pytest.raises(UserError, match="--objectives=glip; expected some of clip, siglip"):
    objectives.main([])
