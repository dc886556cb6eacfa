import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import types

from absl import logging
import numpy as np
import pytest

from apps.trainer import sinks
from apps.trainer.errors import UserError
from apps.trainer.sinks import MetricWriter, compare_metrics, read_metrics


def _write(workdir, steps, resume_step=None, speed=1.0):
  with MetricWriter(workdir, resume_step=resume_step) as writer:
    for step in steps:
      rate = speed * step
      writer.write(step, {"train/loss": np.float32(1 / step), "train/images_per_second": rate})
      if step % 4 == 0:
        writer.write(step, {"eval/caption_nll": math.exp(-step)})


def test_one_json_object_per_line(tmp_path):
  _write(tmp_path, range(1, 5))
  lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
  assert lines[2] == {
    "step": 3,
    "train/loss": float(np.float32(1 / 3)),
    "train/images_per_second": 3,
  }
  assert lines == read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("stopped, resumed", [(3, 2), (8, 4), (9, 8), (5, 5), (2, None)])
def test_resumed_file_equals_uninterrupted_one(tmp_path, stopped, resumed):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  whole.mkdir()
  parts.mkdir()
  _write(whole, range(1, 13))
  _write(parts, range(1, stopped + 1), speed=7.0)
  with open(parts / "metrics.jsonl", "a") as file:
    file.write('{"step": 2, "train/lo')  # the line a kill tore
  _write(parts, range((resumed or 0) + 1, 13), resume_step=resumed)
  paths = whole / "metrics.jsonl", parts / "metrics.jsonl"
  assert compare_metrics(*paths) == []
  assert len(read_metrics(paths[1])) == 15
  assert list(parts.iterdir()) == [parts / "metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path):
  _write(tmp_path, range(1, 5))
  MetricWriter(tmp_path).close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_every_line_survives_kill_9(tmp_path):
  worker = textwrap.dedent(
    """
    import os, signal, sys
    from apps.trainer.sinks import MetricWriter
    writer = MetricWriter(sys.argv[1])
    for step in range(1, 501):
      writer.write(step, {"train/loss": 1 / step})
    os.kill(os.getpid(), signal.SIGKILL)
    """
  )
  command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{worker}"]
  done = subprocess.run([*command, str(tmp_path)], timeout=60)
  assert done.returncode == -signal.SIGKILL
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 500


def test_comparison_sees_the_last_bit_and_missing_values(tmp_path):
  for name, loss in (("a", 0.1), ("b", np.nextafter(0.1, 1))):
    (tmp_path / name).mkdir()
    with MetricWriter(tmp_path / name) as writer:
      writer.write(1, {"train/loss": loss})
      if name == "b":
        writer.write(2, {"train/loss": loss})
  paths = [str(tmp_path / name / "metrics.jsonl") for name in "ab"]
  differences = compare_metrics(*paths)
  assert differences[0] == "1 lines against 2 lines"
  assert "train/loss 0.1 against 0.1000000000000000" in differences[1]
  assert sinks._main(paths) == 1 and sinks._main([paths[0], paths[0]]) == 0


def test_nan_and_inf_are_written_as_null(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": -math.inf, "c": np.float64(2)})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert text == '{"step": 1, "a": null, "b": null, "c": 2.0}\n'
  assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["a"])


def test_non_numeric_metric_is_an_error(tmp_path):
  with MetricWriter(tmp_path) as writer, pytest.raises(TypeError, match="'train/loss'"):
    writer.write(1, {"train/loss": np.zeros(2)})


def test_other_processes_write_nothing(tmp_path):
  with MetricWriter(tmp_path, active=False, tensorboard=True, wandb_project="x") as writer:
    writer.write(1, {"a": 1})
    writer.flush()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_events(tmp_path):
  with MetricWriter(tmp_path, tensorboard=True) as writer:
    writer.write(1, {"train/loss": 0.5})
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes()


def test_wandb_missing_or_without_key(tmp_path, monkeypatch):
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  monkeypatch.delenv("WANDB_MODE", raising=False)
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="not installed"):
    MetricWriter(tmp_path, wandb_project="ov")
  monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
  with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
    MetricWriter(tmp_path, wandb_project="ov")
  assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_continues_the_run_of_the_workdir(tmp_path, monkeypatch):
  inits, logged = [], []

  def init(**arguments):
    inits.append(arguments)
    return types.SimpleNamespace(
      log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  monkeypatch.setenv("WANDB_API_KEY", "secret")
  for resume in (None, 1):
    with MetricWriter(tmp_path, resume_step=resume, wandb_project="ov", config={"lr": 1}) as writer:
      writer.write(2, {"a": 1.5})
  assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
  assert logged == [(2, {"a": 1.5})] * 2
  assert "secret" not in str(inits)
  assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())


BAD = {
  "a byte that is no UTF-8": b'{"step": 3, "train/l\xf3ss": 0.5}',
  "no JSON": b'{"step": 3, "train/loss" 0.5}',
  "a list": b"[3]",
  "no step": b'{"stop": 3}',
  "a step that is no integer": b'{"step": true}',
  "a negative step": b'{"step": -3}',
  "a step of text": b'{"step": "3"}',
  "a value of text": b'{"step": 3, "train/loss": "0.5"}',
  "deep nesting": b"[" * 100_000,
  "an empty line": b"",
}


@pytest.mark.parametrize("bad", BAD)
def test_damaged_lines_are_moved_aside(tmp_path, bad, caplog):
  logging.use_python_logging(quiet=True)
  path = tmp_path / "metrics.jsonl"
  _write(tmp_path, range(1, 10))
  lines = path.read_bytes().splitlines()
  path.write_bytes(b"\n".join([*lines[:2], BAD[bad], *lines[3:]]) + b"\n")
  assert len(read_metrics(path)) == len(lines) - 1
  assert "skipped 1 damaged line (3)" in caplog.text
  MetricWriter(tmp_path, resume_step=8).close()
  assert "1 damaged line (3), moved to metrics.jsonl.damaged-1" in caplog.text
  assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == BAD[bad] + b"\n"
  assert [line["step"] for line in read_metrics(path)] == [1, 2, 4, 4, 5, 6, 7, 8, 8]


def test_damaged_lines_are_never_overwritten(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for number in range(3):
    path.write_text(f'{{"step": 1}}\ndamage {number}\n')
    MetricWriter(tmp_path, resume_step=1).close()
  kept = [(tmp_path / f"metrics.jsonl.damaged-{n}").read_text() for n in (1, 2, 3)]
  assert kept == ["damage 0\n", "damage 1\n", "damage 2\n"]


def test_changed_step_is_moved_aside(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 92}\n{"step": 3}\n{"step": 4}\n{"step": 5}\n')
  MetricWriter(tmp_path, resume_step=3).close()
  assert [line["step"] for line in read_metrics(path)] == [1, 3]
  assert (tmp_path / "metrics.jsonl.damaged-1").read_text() == '{"step": 92}\n'


def test_removed_or_replaced_file_is_an_error(tmp_path):
  for change in (
    lambda path: path.unlink(),
    lambda path: path.rename(tmp_path / "elsewhere"),
    lambda path: (path.unlink(), path.write_text("")),
  ):
    with MetricWriter(tmp_path) as writer:
      writer.write(1, {"a": 1})
      writer.flush()
      change(tmp_path / "metrics.jsonl")
      writer.write(2, {"a": 1})
      with pytest.raises(UserError, match="was removed or replaced while the run writes it"):
        writer.flush()


def test_truncation_is_atomic(tmp_path, monkeypatch):
  _write(tmp_path, range(1, 5))
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def fail(*_):
    raise OSError("disk is gone")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError):
    MetricWriter(tmp_path, resume_step=1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
