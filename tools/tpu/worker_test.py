"""Tests of the worker program on local folders."""

import ast
import json
import os
from pathlib import Path
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from tools.tpu import worker


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  for name, path in {"CODE": "ov-code", "RUNS": "ov-run", "PYTHON": "ov-python"}.items():
    monkeypatch.setattr(worker, name, tmp_path / path)
  (tmp_path / "ov-code/apps").mkdir(parents=True)
  (tmp_path / "ov-run").mkdir()
  return tmp_path


def _record(home: Path, process: subprocess.Popen[bytes], **changes: object) -> Path:
  folder = home / "ov-run/one"
  folder.mkdir()
  found = {
    "pid": process.pid,
    "start": int(worker.stat(process.pid)[19]),
    "boot": worker.BOOT.read_text(),
    "workdir": str(home / "out"),
  }
  (folder / "run.json").write_text(json.dumps(found | changes))
  return folder


@pytest.fixture
def stubborn():
  """Start a process group with a child, both of which ignore SIGTERM."""
  code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
  process = subprocess.Popen(
    ["/bin/sh", "-c", f'trap "" TERM; "$0" -c "{code}" & wait; wait', sys.executable],
    stdout=subprocess.PIPE, start_new_session=True,
  )  # fmt: skip
  assert process.stdout
  process.stdout.readline()  # the child ignores SIGTERM by now
  yield process
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def test_the_program_runs_on_the_python_of_a_new_machine():
  """Ubuntu 20.04 has Python 3.8, 22.04 has 3.10; all imports exist there."""
  tree = ast.parse(Path(worker.__file__).read_text(), feature_version=(3, 8))
  modules = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
  modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
  assert modules <= sys.stdlib_module_names - {"tomllib", "zoneinfo", "graphlib"}


def test_the_program_runs_alone(tmp_path: Path):
  """Files with the names of modules in the home folder have no effect."""
  shutil.copyfile(worker.__file__, tmp_path / "ov-worker.py")
  (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
  done = subprocess.run(
    [sys.executable, "-I", "-S", "ov-worker.py", "status", "one"], cwd=tmp_path,
    env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  missing = {"error": "there is no run one on this worker, only: none"}
  assert json.loads(done.stdout) == missing, done.stderr


def test_stop_kills_the_whole_group_after_the_grace_period(
  home: Path, stubborn: subprocess.Popen[bytes]
):
  folder = _record(home, stubborn)
  members = worker.members(folder)
  assert len(members) == 2 and stubborn.pid in members
  began = time.time()
  assert worker.terminate("one") == {"terminated": True}
  assert worker.stop("one", "0.5") == {"stopped": "SIGKILL"}
  # File timestamps have a resolution of some milliseconds.
  assert time.time() - began >= 0.48
  stubborn.wait()
  deadline = time.monotonic() + 10
  while worker.members(folder) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert worker.members(folder) == []


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "another"}])
def test_stop_ignores_a_reused_process_id(
  home: Path, stubborn: subprocess.Popen[bytes], change: dict[str, object]
):
  _record(home, stubborn, **change)
  assert worker.terminate("one") == {"terminated": False}
  assert worker.stop("one", "0") == {"stopped": "was not running"}
  assert stubborn.poll() is None


def test_a_child_that_outlives_its_leader_is_a_member(home: Path):
  process = subprocess.Popen(
    ["/bin/sh", "-c", "sleep 60 & exit 0"], start_new_session=True, stdout=subprocess.DEVNULL
  )
  folder = _record(home, process)
  process.wait()
  assert len(worker.members(folder)) == 1
  assert worker.terminate("one") == {"terminated": True}
  assert worker.stop("one", "10") == {"stopped": "SIGTERM"}


def test_status_ignores_incomplete_lines(home: Path, stubborn: subprocess.Popen[bytes]):
  folder = _record(home, stubborn)
  (folder / "worker.log").write_bytes(b"first\nbar 10%\rbar 20%\xff\n\n")
  (home / "out").mkdir()
  (home / "out/metrics.jsonl").write_text('{"step": 7}\n{"step": 9, "x": 1}\n{"st')
  found = worker.status("one")
  assert found == {"alive": True, "exit": None, "step": 9, "last": "bar 20%\ufffd"}
  (folder / "exit").write_text("3")
  assert worker.status("one")["exit"] == 3
  with pytest.raises(worker.Refused, match="no run two on this worker, only: one"):
    worker.status("two")


@pytest.mark.parametrize(
  "codes, restarts, expected, starts",
  [
    ([0], 3, 0, 1),
    ([1, 1, 0], 3, 0, 3),
    ([1, 1, 1], 1, 1, 2),
    ([2, 0], 3, 2, 1),  # an error of the user is not retried
    ([-9, 0], 1, 0, 2),
  ],
)
def test_supervise_restarts_after_a_failure(
  home: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], restarts: int, expected: int,
  starts: int,
):  # fmt: skip
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(worker, "RESTART_PAUSE", 0)
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  begun: list[list[str]] = []

  def call(command: list[str], **_: object) -> int:
    begun.append(command)
    return codes[len(begun) - 1]

  monkeypatch.setattr(subprocess, "call", call)
  worker.supervise("one", str(restarts), "python", "x")
  assert (home / "ov-run/one/exit").read_text() == str(expected)
  assert begun == [["python", "x"]] * starts


def test_supervise_does_not_restart_a_stopped_app(home: Path, monkeypatch: pytest.MonkeyPatch):
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  monkeypatch.setattr(time, "sleep", None)  # no pause, because there is no restart

  def call(*_: object, **__: object) -> int:
    (home / "ov-run/one/stopping").touch()
    return 143

  monkeypatch.setattr(subprocess, "call", call)
  worker.supervise("one", "5", "python")
  assert (home / "ov-run/one/exit").read_text() == "143"


def test_supervise_stops_during_the_pause(home: Path, monkeypatch: pytest.MonkeyPatch):
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  monkeypatch.setattr(time, "sleep", lambda _: (home / "ov-run/one/stopping").touch())
  begun: list[int] = []
  monkeypatch.setattr(subprocess, "call", lambda *_, **__: begun.append(1) or 1)
  worker.supervise("one", "5", "python")
  assert begun == [1]


def _process(root: Path, pid: int, target: str) -> None:
  folder = root / f"proc/{pid}"
  (folder / "fd").mkdir(parents=True)
  (folder / "comm").write_text("python3\n")
  (folder / "fd/3").symlink_to(target)


def test_clean_requires_a_free_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  _process(tmp_path, 41, "/dev/null")
  _process(tmp_path, 42, "/dev/accel0")
  lock, logs = tmp_path / "tmp/libtpu_lockfile", tmp_path / "tmp/tpu_logs"
  logs.mkdir(parents=True)
  (logs / "a.log").touch()
  lock.touch()
  with pytest.raises(worker.Refused, match=r"held by python3 \(pid 42\); nothing was removed"):
    worker.clean(str(tmp_path))
  assert lock.exists() and logs.exists()
  (tmp_path / "proc/42/fd/3").unlink()
  assert worker.clean(str(tmp_path)) == {"removed": ["/tmp/libtpu_lockfile", "/tmp/tpu_logs"]}
  assert not lock.exists() and not logs.exists()
  assert worker.clean(str(tmp_path)) == {"removed": []}


@pytest.mark.parametrize("target", ["/dev/vfio/0", "/dev/vfio/12", "/dev/accel3"])
def test_chips(tmp_path: Path, target: str):
  _process(tmp_path, 7, target)
  assert worker.holders(str(tmp_path)) == {7: "python3"}


@pytest.mark.parametrize("target", ["/dev/vfio/vfio", "/dev/accelerator", "/data/dev/accel0x"])
def test_no_chips(tmp_path: Path, target: str):
  _process(tmp_path, 7, target)
  assert worker.holders(str(tmp_path)) == {}


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """Create a fake chip file, and give the program root's view of this worker."""
  file = tmp_path / "accel0"
  file.touch()
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  monkeypatch.setattr(worker, "CHIP", re.compile(re.escape(str(file)) + "$"))
  return file


@pytest.fixture
def hold(chip: Path):
  """Start processes with the chip open; some of them ignore SIGTERM."""
  started: list[subprocess.Popen[str]] = []

  def start(deaf: bool = False) -> subprocess.Popen[str]:
    ignore = "signal.signal(15, signal.SIG_IGN); " if deaf else ""
    code = (
      f"import signal, time; f = open({str(chip)!r}); {ignore}print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout
    process.stdout.readline()
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()


def _wanted(*processes: subprocess.Popen[str]) -> list[str]:
  pids = {process.pid for process in processes}
  return [f"{h['pid']}:{h['start']}" for h in worker.held()["holders"] if h["pid"] in pids]


def test_kill_ends_only_holders_of_the_chip(home: Path, hold):
  polite, deaf, other = hold(), hold(deaf=True), hold()
  shown = {holder["pid"]: holder for holder in worker.held()["holders"]}
  assert set(shown) == {polite.pid, deaf.pid, other.pid}
  assert "import signal, time" in shown[deaf.pid]["command"] and shown[deaf.pid]["kept"] == ""
  assert shown[deaf.pid]["user"] == pwd.getpwuid(os.getuid()).pw_name
  began = time.monotonic()
  answer = worker.kill("0.5", *_wanted(polite, deaf))
  assert time.monotonic() - began >= 0.5  # the process that ignores SIGTERM got its grace period
  assert answer["ended"] == [f"{polite.pid} (SIGTERM)", f"{deaf.pid} (SIGKILL)"]
  assert [holder["pid"] for holder in answer["holders"]] == [other.pid]
  assert (polite.wait(), deaf.wait(), other.poll()) == (-15, -9, None)


def test_kill_ignores_a_reused_process_id(home: Path, hold):
  process = hold()
  assert worker.kill("0", f"{process.pid}:1")["ended"] == []
  assert process.poll() is None


def test_kill_skips_a_holder_that_must_be_kept(home: Path, hold, monkeypatch: pytest.MonkeyPatch):
  process = hold()
  monkeypatch.setattr(worker, "why_kept", lambda *_: "a process of the system")
  assert worker.kill("0", *_wanted(process))["ended"] == []
  assert process.poll() is None


@pytest.mark.parametrize(
  "uid, command, cgroup, reason",
  [
    (0, "python3 train.py", "0::/user.slice/user-0.slice/session-1.scope", ""),
    (1001, "python3 train.py", "0::/user.slice/user-1001.slice/session-4.scope", ""),
    (0, "python3", "0::/system.slice/docker-0a1b.scope", ""),
    (1001, "python3", "0::/system.slice/ssh.service", ""),
    (0, "", "0::/", "a process of the system"),  # kernel process
    (33, "python3", "0::/", "a system account"),
    (0, "agent", "0::/system.slice/a.service", "first: sudo systemctl stop a.service"),
    (0, "agent", "1:name=systemd:/system.slice/b.service", "sudo systemctl stop b.service"),
  ],
)
def test_kept_processes(home: Path, uid: int, command: str, cgroup: str, reason: str):
  found = worker.why_kept(2**22 + 1, uid, command, cgroup)
  assert found.endswith(reason) and bool(found) == bool(reason)


def test_the_command_init_and_own_runs_are_kept(home: Path, stubborn: subprocess.Popen[bytes]):
  for pid in (os.getpid(), os.getppid()):
    assert worker.why_kept(pid, 0, "python3", "") in (
      "this command itself",
      "a process of the system",
    )
  assert worker.why_kept(1, 0, "init", "") == "a process of the system"
  _record(home, stubborn)
  assert worker.why_kept(stubborn.pid, 0, "sh", "") == "run one; first: tpu stop --run=one"


def test_links_out_of_the_log_folder_are_not_followed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  for folder in ("proc", "tmp", "home"):
    (tmp_path / folder).mkdir()
  (tmp_path / "home/kept").touch()
  (tmp_path / "tmp/tpu_logs").symlink_to(tmp_path / "home")
  assert worker.clean(str(tmp_path)) == {"removed": ["/tmp/tpu_logs"]}
  assert (tmp_path / "home/kept").exists()


def test_a_damaged_archive_is_detected(home: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(worker, "HOME", home)
  (home / "ov-code/apps/old.py").touch()
  (home / "ov-code.tgz").write_bytes(b"half")
  with pytest.raises(worker.Refused, match="arrived damaged"):
    worker.unpack("ov-code.tgz", "0" * 64)
  assert (home / "ov-code/apps/old.py").exists()


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (("--workdir=a=b",), "a=b"),
    (("--workdir", "x"), "x"),
    (("-workdir=x",), "x"),
    (("--config=workdir", "workdir=y"), None),
    (("--workdir",), None),
  ],
)
def test_the_workdir_among_the_arguments(arguments: tuple[str, ...], expected: str | None):
  assert worker.flag(arguments, "workdir") == expected


def test_check_reports_problems(home: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(worker, "HOME", home)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3e9))
  monkeypatch.setattr(worker, "holders", lambda: {7: "python3"})
  monkeypatch.setenv("PATH", str(home))  # without gcloud
  found = worker.check("gs://my-bucket")
  assert [problem.split()[0] for problem in found["problems"]] == ["no", "less", "bucket", "chip"]
  assert found["bucket"] == "cannot write: there is no gcloud"
  assert found["problems"][-1] == "chip held by python3 (7)"

  monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=80e9))
  monkeypatch.setattr(worker, "holders", dict)
  for name in ("gcloud", "python"):
    (home / name).write_text('#!/bin/sh\necho \'["3.12.1", "0.10.2", "0.0.42"]\'\n')
    (home / name).chmod(0o755)
  worker.PYTHON.write_text(str(home / "python"))
  good = worker.check("gs://my-bucket")
  assert good.pop("time") == pytest.approx(time.time(), abs=60)
  assert good == {
    "python": "3.12.1", "environment": "jax 0.10.2", "libtpu": "0.0.42", "disk_free_gb": 80.0,
    "bucket": "ok", "problems": [],
  }  # fmt: skip


def _count(home: Path, program: str) -> int:
  """Start to count with a program that replaces Python."""
  (home / "python").write_text(f"#!/bin/sh\n{program}\n")
  (home / "python").chmod(0o755)
  worker.PYTHON.write_text(str(home / "python"))
  shutil.copyfile(worker.__file__, home / "ov-worker.py")
  return worker.count()["pid"]


@pytest.fixture
def alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """Create a worker whose program finds its files by HOME."""
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setattr(sys, "argv", [str(home / "ov-worker.py")])
  return home


def test_counting_does_not_wait(alone: Path):
  began = time.monotonic()
  _count(alone, """sleep 1; echo '{"devices": 8}'; echo 'a warning of libtpu' >&2""")
  assert time.monotonic() - began < 0.9  # less than the second that the program takes
  assert worker.counted("20") == {"devices": 8}


def test_counting_that_fails_or_hangs(alone: Path):
  pid = _count(alone, "echo 'the TPU is in use' >&2; exit 1")
  with pytest.raises(worker.Refused, match="could not count its devices: the TPU is in use"):
    worker.counted("20")
  os.waitpid(pid, 0)  # it writes its exit code before it ends
  pid = _count(alone, "echo waiting; sleep 60")
  with pytest.raises(worker.Refused, match="did not count its devices in 1 s: waiting"):
    worker.counted("1")
  assert os.waitpid(pid, 0)[1] == signal.SIGKILL
