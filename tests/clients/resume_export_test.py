"""Test of the shortest workflow: train, stop, resume, export, import."""

import json
import signal

import pytest

from tests.end_to_end import runner

EXPORT = runner.CAPTION_TRAIN.parent / "export.py"  # importing it would define --workdir twice


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


def run(*flags, cache, app):
  code, printed = runner.run(*flags, cache=cache, app=app)
  assert code == 0, printed
  return printed


def test_a_resumed_run_is_exported_and_imported(cache, tmp_path):
  workdir, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
  flags = (*runner.TINY, f"--workdir={workdir}")
  process = runner.start(*flags, cache=cache)
  runner.wait_for_step(workdir, 9, process)
  process.send_signal(signal.SIGTERM)
  _, printed = process.communicate(timeout=120)
  assert process.returncode == 143, printed
  assert "restoring step" in run(*flags, cache=cache, app=runner.CAPTION_TRAIN)

  formats = ("safetensors", "transformers")
  run(
    f"--workdir={workdir}", f"--format={','.join(formats)}", f"--out={out}", cache=cache, app=EXPORT
  )
  for name in formats:
    rows = json.loads((out / name / "parity.json").read_text())["rows"]
    assert "image/pooled" in {row["name"] for row in rows} and all(row["ok"] for row in rows)
    assert "samples seen | 480" in (out / name / "README.md").read_text()

  run(f"--from=safetensors:{out}/safetensors", f"--to_workdir={back}", cache=cache, app=EXPORT)
  run(f"--workdir={back}", f"--out={tmp_path / 'again'}", cache=cache, app=EXPORT)
  again = tmp_path / "again" / "safetensors" / "model.safetensors"
  assert again.read_bytes() == (out / "safetensors" / "model.safetensors").read_bytes()
