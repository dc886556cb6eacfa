"""Tests that scripts run offline with the configured interpreter, with readable failures."""

import pathlib
import sys

import pytest

from ov_convert import client_env


@pytest.fixture
def script(tmp_path, monkeypatch):
  """Writes a script and makes its folder that of the scripts."""
  monkeypatch.setattr(client_env, "SCRIPTS", tmp_path)

  def write(text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return "script.py"

  return write


def test_the_interpreter_is_named_by_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv("OV_CLIENTS_PYTHON", raising=False)
  with pytest.raises(FileNotFoundError, match="OV_CLIENTS_PYTHON is not set; set it to the Python"):
    client_env.find_python()
  runfiles = tmp_path / "export.runfiles"
  (runfiles / "clients").mkdir(parents=True)
  (runfiles / "clients" / "interpreter.txt").write_text(f"{sys.executable}\n")
  monkeypatch.setattr(client_env, "__file__", str(runfiles / "openvision" / "client_env.py"))
  assert client_env.find_python() == pathlib.Path(sys.executable)
  monkeypatch.setenv("OV_CLIENTS_PYTHON", str(tmp_path / "python"))  # goes before
  with pytest.raises(FileNotFoundError, match="OV_CLIENTS_PYTHON=.*: no such file"):
    client_env.find_python()


def test_scripts_run_offline_and_without_our_paths(script, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", "/somewhere")
  name = script(
    "import os, sys\n"
    "print(os.environ['HF_HUB_OFFLINE'], os.environ.get('PYTHONPATH'), sys.dont_write_bytecode)\n"
    "print(sys.argv[1:])\n"
  )
  printed = client_env.run_client(name, ["a b", pathlib.Path("c")], python=sys.executable)
  assert printed.splitlines() == ["1 None True", "['a b', 'c']"]


def test_failures_tell_their_last_lines(script):
  name = script("import sys\nprint('x ' * 5, file=sys.stderr)\nsys.exit('weights.bin holds code')")
  with pytest.raises(
    client_env.ClientError, match="(?s)script.py failed: .*weights.bin holds code"
  ):
    client_env.run_client(name, [], python=sys.executable)
  name = script("raise KeyError('architecture')")
  with pytest.raises(client_env.ClientError, match="KeyError: 'architecture'"):
    client_env.run_client(name, [], python=sys.executable)


def test_a_timeout_stops_the_script(script):
  name = script("import time\ntime.sleep(60)")
  with pytest.raises(client_env.ClientError, match="did not finish within 1 s"):
    client_env.run_client(name, [], python=sys.executable, timeout=1)
