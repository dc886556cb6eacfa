"""Run the app as a user does."""

import functools
import json
from pathlib import Path

import pytest

from tools.preflight import preflight
from tools.testing import program

TINY = "img=mu/16,txt_decoder_name=Ti,res=32,token_len=16,vocab_size=512,batch_size=8"
CONFIG = "apps/configs/openvision2.py"


_app = functools.partial(program.run, preflight, cwd=Path.cwd())


def test_two_configurations_on_this_machine(tmp_path: Path):
  out = tmp_path / "numbers.json"
  done = _app(
    f"--config={CONFIG}:{TINY}",
    "--config.model.decoder_options={'depth': 1}",
    f"--compare={CONFIG}:{TINY},dtype=bfloat16",
    "--topology=here",
    f"--json={out}",
  )
  assert done.returncode == 0, done.stderr
  head, *rows = done.stdout.splitlines()
  assert head.split() == ["1:openvision2/main", "2:openvision2/main"]
  found = {row[:26].strip(): row[26:].split() for row in rows}
  assert found["compute dtype"] == ["float32", "bfloat16"]
  assert found["fits"] == ["yes", "yes"]
  first, second = json.loads(out.read_text())
  assert first["peak_bytes_per_device"] > first["argument_bytes"] > 0
  # Changes on the command line apply to both.
  assert first["num_params"] == second["num_params"]
  assert "compiling for" in done.stderr


def test_absent_gpus_get_estimates_without_compilation(tmp_path: Path):
  out = tmp_path / "numbers.json"
  done = _app(f"--config={CONFIG}:{TINY}", "--topology=h100-8", "--mfu=0.5", f"--json={out}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("nothing was compiled: programs for 8 x NVIDIA H100")
  (found,) = json.loads(out.read_text())
  assert found["peak_bytes_per_device"] is None and found["params_bytes"] > 0
  assert found["mfu"] == pytest.approx(0.5) and found["hours"] > 0


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "give --config"),
    ((f"--config={CONFIG}",), "--topology=v4-512 or --topology=here"),
    ((f"--config={CONFIG}", "--topology=v4-7"), "v4 comes in the sizes 8, 16"),
    ((f"--config={CONFIG}", "--topology=v4-8", "--mfu=2"), "--mfu=2.0; expected a fraction"),
    ((f"--config={CONFIG}", "--topology=here", "--compare=none.py"), "none.py: expected a"),
    (
      (f"--config={CONFIG}", "--topology=here", "--compare=apps/configs/base.py"),
      "base.py: module 'configuration' has no attribute 'get_config'",
    ),
    ((f"--config={CONFIG}", "--topology=here", "--json=/no/x.json"), "--json=/no/x.json; expected"),
    ((f"--config={CONFIG}", "--topology=here", "--config.foo=1"), "has no setting 'foo'"),
    (
      (f"--config={CONFIG}:{TINY}", "--topology=here", "--find_batch"),
      "is unknown, or nothing can",
    ),
  ],
)
def test_mistakes_give_one_line_errors(arguments: tuple[str, ...], message: str):
  done = _app(*arguments)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1] and not done.stdout
