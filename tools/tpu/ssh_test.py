"""Tests of the program for ssh hosts, with a fake ssh and a small app."""

import ast
from collections.abc import Callable, Iterator
import contextlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import uuid

import pytest

from tools.tpu import fake_ssh, job, ssh_program
from tools.tpu.job import Job

HOSTS = ("a", "b", "c", "me@d")

# Records its identity, starts a child, waits for a file. On SIGTERM it exits after a short delay.
_APP = """\
import json, os, pathlib, signal, subprocess, sys, time
folder, me = pathlib.Path({folder!r}), os.environ["OV_PROCESS_ID"]
def stop(*_):
  print("saved", flush=True)
  time.sleep(0.2)
  os._exit(143)
signal.signal(signal.SIGTERM, signal.SIG_IGN if (folder / "DEAF").exists() else stop)
child = subprocess.Popen(["sleep", "200"])
names = ("OV_COORDINATOR", "OV_NUM_PROCESSES", "JAX_PLATFORMS", "PYTHONPATH")
note = {{"me": me, "pids": [os.getpid(), child.pid], "arguments": sys.argv[1:]}}
note |= {{name: os.environ[name] for name in names}}
part = folder / f"part-{{me}}"
part.write_text(json.dumps(note))
part.rename(folder / f"up-{{os.getpid()}}")
print("up\\u00e9", flush=True)
end = time.monotonic() + 200  # should a test fail
while not (folder / "FINISH").exists() and time.monotonic() < end:
  code = folder / f"CODE-{{me}}"
  if code.exists():
    sys.exit(int(code.read_text()))
  time.sleep(0.02)
"""


class Hosts:
  """Four hosts, which are all this machine, and a running script for them."""

  def __init__(self, folder: Path, restarts: int = 3, grace: int = 20):
    self.folder = folder
    app = folder / "app.py"
    app.write_text(_APP.format(folder=str(folder)))
    checkout = fake_ssh.install(folder, sys.executable, str(app))
    # A unique job name, because a host runs each job only once and tests may run concurrently.
    self.job = Job(
      f"t{uuid.uuid4().hex}", "caption_train", "my config.py", "/d", ("--x=$(id) 'y'",), grace,
      restarts,
    )  # fmt: skip
    script = folder / "job.py"
    script.write_text(job.ssh_script(self.job, HOSTS, "", 8476, str(checkout), "cpu"))
    env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    self.log = folder / "log.txt"
    with self.log.open("wb") as log:
      self.process = subprocess.Popen(
        [sys.executable, script], stdout=log, env=env, start_new_session=True
      )

  def up(self, starts: int = 1) -> list[dict]:
    """Return the records of all apps once each has started `starts` times."""
    _wait(lambda: len(list(self.folder.glob("up-*"))) >= starts * len(HOSTS), self.said)
    notes = sorted(self.folder.glob("up-*"), key=lambda note: note.stat().st_mtime_ns)
    return [json.loads(note.read_text()) for note in notes]

  @contextlib.contextmanager
  def one_more(self, number: str, **silence: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start the program of a host directly, without ssh and without input."""
    variables = dict.fromkeys(("OV_COORDINATOR", "OV_NUM_PROCESSES", "JAX_PLATFORMS"), "")
    variables["OV_PROCESS_ID"] = number
    checkout = str(self.folder / "checkout")
    command = ssh_program.on_host(self.job.name, checkout, "a.lock", [], variables, **silence)
    with subprocess.Popen(command, stdin=subprocess.PIPE) as far:
      yield far

  def finish(self) -> None:
    (self.folder / "FINISH").touch()

  def ends(self) -> tuple[int, str]:
    """Return exit code and output, and check that no process of any host is alive."""
    code = self.process.wait(timeout=60)
    pids = [pid for note in self.up() for pid in note["pids"]]
    _wait(lambda: not any(map(_alive, pids)), self.said, seconds=10)  # SIGKILL is asynchronous
    return code, self.said()

  def said(self) -> str:
    return self.log.read_text()


@contextlib.contextmanager
def _hosts(folder: Path, **options: int) -> Iterator[Hosts]:
  hosts = Hosts(folder, **options)
  try:
    yield hosts
  finally:
    hosts.process.kill()
    hosts.process.wait()


def _wait(true: Callable[[], bool], said: Callable[[], str] = str, seconds: float = 60) -> None:
  deadline = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < deadline, said()
    time.sleep(0.02)


def _alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def test_all_restart_when_one_is_killed(tmp_path: Path):
  with _hosts(tmp_path) as hosts:
    first = hosts.up()
    assert sorted(note["me"] for note in first) == ["0", "1", "2", "3"]
    for note in first:
      assert note["OV_COORDINATOR"] == "a:8476" and note["OV_NUM_PROCESSES"] == "4"
      assert note["JAX_PLATFORMS"] == "cpu"
      root = f"{tmp_path}/checkout"
      assert note["PYTHONPATH"] == f"{root}:{root}/packages/ov-data/"
      assert note["arguments"][-3:] == ["--config=my config.py", "--workdir=/d", "--x=$(id) 'y'"]
    killed = next(note for note in first if note["me"] == "2")
    os.kill(killed["pids"][0], signal.SIGKILL)
    second = hosts.up(2)[4:]
    assert not [pid for note in first for pid in note["pids"] if _alive(pid)]
    assert sorted(note["me"] for note in second) == ["0", "1", "2", "3"]
    hosts.finish()
    code, said = hosts.ends()
  assert code == 0
  lines = said.splitlines()
  assert [line for line in lines if line == "me@d: up\xe9"] == ["me@d: up\xe9"] * 2
  assert "launch: c: ended with code 137, signal 9" in lines
  assert "launch: all restart in 2 s from the last checkpoint; 3 restarts left" in lines


def test_a_lost_connection_leaves_no_process(tmp_path: Path):
  with _hosts(tmp_path) as hosts:
    first = hosts.up()
    os.kill(int((tmp_path / "ssh-b").read_text()), signal.SIGKILL)
    hosts.up(2)
    assert not [pid for note in first for pid in note["pids"] if _alive(pid)]
    hosts.finish()
    code, said = hosts.ends()
  assert code == 0 and "launch: b: its ssh was ended by signal 9" in said


def test_an_unreachable_host(tmp_path: Path):
  (tmp_path / "OFF-b").touch()
  with _hosts(tmp_path, restarts=1) as hosts:
    code = hosts.process.wait(timeout=60)
  notes = [json.loads(note.read_text()) for note in tmp_path.glob("up-*")]
  assert not [pid for note in notes for pid in note["pids"] if _alive(pid)]
  assert code == 255
  lines = hosts.said().splitlines()
  assert lines.count("b: ssh: no route to host") == 2
  assert lines.count("launch: b: the connection was lost, or could not be made") == 2
  assert lines[-1] == "launch: not restarted: no restarts left"


def test_an_invalid_setting_is_not_retried(tmp_path: Path):
  with _hosts(tmp_path) as hosts:
    hosts.up()
    (tmp_path / "CODE-1").write_text("2")
    code, said = hosts.ends()
  assert code == 2 and len(list(tmp_path.glob("up-*"))) == 4
  assert said.endswith("launch: b: ended with code 2\nlaunch: not restarted: it would fail again\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded(tmp_path: Path, number: signal.Signals):
  """The signal goes to the process group, like Ctrl-C in a terminal; every ssh must forward it."""
  with _hosts(tmp_path) as hosts:
    hosts.up()
    os.killpg(hosts.process.pid, number)
    code, said = hosts.ends()
  assert code == 128 + number
  assert sorted(line for line in said.splitlines() if "saved" in line) == [
    f"{host}: saved" for host in HOSTS
  ]
  assert said.endswith(f"launch: stopped by {number.name}; start again to resume\n")


def test_processes_are_killed_after_the_grace_period(tmp_path: Path):
  (tmp_path / "DEAF").touch()
  with _hosts(tmp_path, grace=1) as hosts:
    hosts.up()
    hosts.process.terminate()
    code, said = hosts.ends()
  assert code == 143 and "saved" not in said


def test_the_processes_end_when_the_script_is_killed(tmp_path: Path):
  with _hosts(tmp_path) as hosts:
    first = hosts.up()
    hosts.process.kill()
    _wait(lambda: not [pid for note in first for pid in note["pids"] if _alive(pid)])


def test_a_host_ends_its_process_after_a_silence(tmp_path: Path):
  """When the network fails, the host receives no end of file."""
  with _hosts(tmp_path) as hosts:
    hosts.up()
    with hosts.one_more("4", silence=1) as far:
      assert far.wait(timeout=30) == 137
    hosts.finish()
    assert hosts.ends()[0] == 0


def test_a_host_runs_a_process_once(tmp_path: Path):
  """A process of an earlier start must end first, because its memory and port are needed."""
  with _hosts(tmp_path) as hosts:
    hosts.up()
    with hosts.one_more("3") as far:
      time.sleep(1)
      assert far.poll() is None and len(hosts.up()) == 4
      hosts.finish()
      # It starts now, and does not end with the script.
      assert far.wait(timeout=60) == 0 and len(hosts.up()) == 5
      assert hosts.ends()[0] == 0


def test_the_script_runs_on_old_pythons():
  ast.parse(job.HEAD, feature_version=(3, 8))
