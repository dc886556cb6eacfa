"""The program of the workers, where the folders of this machine stand for theirs."""

import ast
import json
import os
from pathlib import Path
import pwd
import re
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest

from tools.tpu.worker import chips, common, machine, main, runs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  for name, path in {"CODE": "ov-code", "RUNS": "ov-run", "PYTHON": "ov-python"}.items():
    monkeypatch.setattr(common, name, tmp_path / path)
  (tmp_path / "ov-code/apps").mkdir(parents=True)
  (tmp_path / "ov-run").mkdir()
  return tmp_path


def _record(home: Path, process: subprocess.Popen[bytes], **changes: object) -> Path:
  folder = home / "ov-run/one"
  folder.mkdir()
  found = {
    "pid": process.pid,
    "pgid": process.pid,
    "start": runs._start_time(process.pid),
    "boot": runs._boot(),
    "workdir": str(home / "out"),
  }
  (folder / "run.json").write_text(json.dumps(found | changes))
  return folder


@pytest.fixture
def stubborn():
  """A process of its own group that does not hear SIGTERM, and its child."""
  code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
  process = subprocess.Popen(
    ["/bin/sh", "-c", f'trap "" TERM; "$0" -c "{code}" & wait; wait', sys.executable],
    stdout=subprocess.PIPE, start_new_session=True,
  )  # fmt: skip
  assert process.stdout
  process.stdout.readline()  # the child is deaf by now
  yield process
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


@pytest.mark.parametrize("module", [chips, common, machine, main, runs], ids=lambda m: m.__name__)
def test_runs_on_the_python_of_a_fresh_machine(module: ModuleType):
  """Ubuntu 20.04 has 3.8, 22.04 has 3.10; nothing is imported that they lack."""
  tree = ast.parse(Path(str(module.__file__)).read_text(), feature_version=(3, 8))
  modules = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
  modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
  foreign = {m for m in modules if not m.startswith("tools.tpu.worker")}
  assert foreign <= sys.stdlib_module_names - {"tomllib", "zoneinfo", "graphlib"}


def test_the_program_runs_alone(tmp_path: Path):
  """In a home folder whose files have the names of modules."""
  main.pack(tmp_path / "ov-worker.pyz")
  (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
  done = subprocess.run(
    [sys.executable, "-S", "ov-worker.pyz", "status", "one"], cwd=tmp_path,
    env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert json.loads(done.stdout) == {"error": "no run one here; there are: none"}, done.stderr


def test_stop_kills_the_whole_group_after_the_grace_period(
  home: Path, stubborn: subprocess.Popen[bytes]
):
  folder = _record(home, stubborn)
  members = runs.members(runs._record(folder))
  assert len(members) == 2 and stubborn.pid in members
  began = time.time()
  assert runs.terminate("one") == {"terminated": True}
  assert runs.stop("one", "0.5") == {"stopped": "SIGKILL"}
  # The file system's clock ticks in steps of some milliseconds.
  assert time.time() - began >= 0.48
  stubborn.wait()
  deadline = time.monotonic() + 10
  while runs.members(runs._record(folder)) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert runs.members(runs._record(folder)) == []


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "another"}])
def test_a_number_that_now_means_another_process_is_left_alone(
  home: Path, stubborn: subprocess.Popen[bytes], change: dict[str, object]
):
  _record(home, stubborn, **change)
  assert runs.terminate("one") == {"terminated": False}
  assert runs.stop("one", "0") == {"stopped": "was not running"}
  assert stubborn.poll() is None


def test_a_child_that_outlives_its_leader_still_counts(home: Path):
  process = subprocess.Popen(
    ["/bin/sh", "-c", "sleep 60 & exit 0"], start_new_session=True, stdout=subprocess.DEVNULL
  )
  folder = _record(home, process)
  process.wait()
  assert len(runs.members(runs._record(folder))) == 1
  assert runs.terminate("one") == {"terminated": True}
  assert runs.stop("one", "10") == {"stopped": "SIGTERM"}


def test_status_reads_what_is_whole(home: Path, stubborn: subprocess.Popen[bytes]):
  folder = _record(home, stubborn)
  (folder / "worker.log").write_bytes(b"first\nbar 10%\rbar 20%\xff\n\n")
  (home / "out").mkdir()
  (home / "out/metrics.jsonl").write_text('{"step": 7}\n{"step": 9, "x": 1}\n{"st')
  found = runs.status("one")
  assert found == {"alive": True, "exit": None, "step": 9, "last": "bar 20%\ufffd"}
  (folder / "exit").write_text("3")
  assert runs.status("one")["exit"] == 3
  with pytest.raises(common.Refused, match="no run two here; there are: one"):
    runs.status("two")


@pytest.mark.parametrize(
  "codes, restarts, expected, starts",
  [
    ([0], 3, 0, 1),
    ([1, 1, 0], 3, 0, 3),
    ([1, 1, 1], 1, 1, 2),
    ([2, 0], 3, 2, 1),  # a user's mistake stays one
    ([-9, 0], 1, 0, 2),
  ],
)
def test_supervise_starts_again_what_failed(
  home: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], restarts: int, expected: int,
  starts: int,
):  # fmt: skip
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(runs, "_RESTART_PAUSE", 0)
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  begun: list[list[str]] = []

  def call(command: list[str], **_: object) -> int:
    begun.append(command)
    return codes[len(begun) - 1]

  monkeypatch.setattr(subprocess, "call", call)
  runs.supervise("one", str(restarts), "python", "x")
  assert (home / "ov-run/one/exit").read_text() == str(expected)
  assert begun == [["python", "x"]] * starts


def test_supervise_leaves_a_stopped_app_alone(home: Path, monkeypatch: pytest.MonkeyPatch):
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  monkeypatch.setattr(time, "sleep", None)  # nobody waits for what is not started again

  def call(*_: object, **__: object) -> int:
    (home / "ov-run/one/stopping").touch()
    return 143

  monkeypatch.setattr(subprocess, "call", call)
  runs.supervise("one", "5", "python")
  assert (home / "ov-run/one/exit").read_text() == "143"


def test_supervise_heeds_a_stop_during_the_pause(home: Path, monkeypatch: pytest.MonkeyPatch):
  (home / "ov-run/one").mkdir()
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  monkeypatch.setattr(time, "sleep", lambda _: (home / "ov-run/one/stopping").touch())
  begun: list[int] = []
  monkeypatch.setattr(subprocess, "call", lambda *_, **__: begun.append(1) or 1)
  runs.supervise("one", "5", "python")
  assert begun == [1]


def _process(root: Path, pid: int, target: str) -> None:
  folder = root / f"proc/{pid}"
  (folder / "fd").mkdir(parents=True)
  (folder / "comm").write_text("python3\n")
  (folder / "fd/3").symlink_to(target)


def test_clean_only_where_nobody_holds_the_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  _process(tmp_path, 41, "/dev/null")
  _process(tmp_path, 42, "/dev/accel0")
  lock, logs = tmp_path / "tmp/libtpu_lockfile", tmp_path / "tmp/tpu_logs"
  logs.mkdir(parents=True)
  (logs / "a.log").touch()
  lock.touch()
  with pytest.raises(common.Refused, match=r"held by python3 \(pid 42\); nothing was removed"):
    machine.clean(str(tmp_path))
  assert lock.exists() and logs.exists()
  (tmp_path / "proc/42/fd/3").unlink()
  assert machine.clean(str(tmp_path)) == {"removed": ["/tmp/libtpu_lockfile", "/tmp/tpu_logs"]}
  assert not lock.exists() and not logs.exists()
  assert machine.clean(str(tmp_path)) == {"removed": []}


@pytest.mark.parametrize("target", ["/dev/vfio/0", "/dev/vfio/12", "/dev/accel3"])
def test_chips(tmp_path: Path, target: str):
  _process(tmp_path, 7, target)
  assert [holder["pid"] for holder in chips.holders(str(tmp_path))["holders"]] == [7]


@pytest.mark.parametrize("target", ["/dev/vfio/vfio", "/dev/accelerator", "/data/dev/accel0x"])
def test_no_chips(tmp_path: Path, target: str):
  _process(tmp_path, 7, target)
  assert chips.holders(str(tmp_path)) == {"holders": [], "hidden": 0}


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A file that stands for a chip, and root's view of this machine."""
  file = tmp_path / "accel0"
  file.touch()
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  monkeypatch.setattr(chips, "_CHIP", re.compile(re.escape(str(file)) + "$"))
  return file


@pytest.fixture
def hold(chip: Path):
  """Starts processes that have the chip open, some of them deaf to SIGTERM."""
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
  return [f"{h['pid']}:{h['start']}" for h in chips.held()["holders"] if h["pid"] in pids]


def test_kill_ends_holders_of_the_chip_and_nothing_else(home: Path, hold):
  polite, deaf, other = hold(), hold(deaf=True), hold()
  shown = {holder["pid"]: holder for holder in chips.held()["holders"]}
  assert set(shown) == {polite.pid, deaf.pid, other.pid}
  assert "import signal, time" in shown[deaf.pid]["command"] and shown[deaf.pid]["kept"] == ""
  assert shown[deaf.pid]["user"] == pwd.getpwuid(os.getuid()).pw_name
  began = time.monotonic()
  answer = chips.kill("0.5", *_wanted(polite, deaf))
  assert time.monotonic() - began >= 0.5  # the deaf one got its grace period
  assert answer["ended"] == [f"{polite.pid} (SIGTERM)", f"{deaf.pid} (SIGKILL)"]
  assert [holder["pid"] for holder in answer["holders"]] == [other.pid]
  assert (polite.wait(), deaf.wait(), other.poll()) == (-15, -9, None)


def test_kill_leaves_a_number_that_now_means_another_process(home: Path, hold):
  process = hold()
  assert chips.kill("0", f"{process.pid}:1")["ended"] == []
  assert process.poll() is None


def test_kill_leaves_a_holder_that_must_be_kept(home: Path, hold, monkeypatch: pytest.MonkeyPatch):
  process = hold()
  monkeypatch.setattr(chips, "_why_kept", lambda *_: "a process of the system")
  assert chips.kill("0", *_wanted(process))["ended"] == []
  assert process.poll() is None


@pytest.mark.parametrize(
  "uid, command, cgroup, reason",
  [
    (0, "python3 train.py", "0::/user.slice/user-0.slice/session-1.scope", ""),
    (1001, "python3 train.py", "0::/user.slice/user-1001.slice/session-4.scope", ""),
    (0, "python3", "0::/system.slice/docker-0a1b.scope", ""),
    (1001, "python3", "0::/system.slice/ssh.service", ""),
    (0, "", "0::/", "a process of the system"),  # of the kernel
    (33, "python3", "0::/", "an account of the system"),
    (0, "agent", "0::/system.slice/a.service", "first: sudo systemctl stop a.service"),
    (0, "agent", "1:name=systemd:/system.slice/b.service", "sudo systemctl stop b.service"),
  ],
)
def test_who_is_kept(home: Path, uid: int, command: str, cgroup: str, reason: str):
  found = chips._why_kept(2**22 + 1, uid, command, cgroup)
  assert found.endswith(reason) and bool(found) == bool(reason)


def test_the_command_itself_the_first_process_and_our_runs_are_kept(
  home: Path, stubborn: subprocess.Popen[bytes]
):
  for pid in (os.getpid(), os.getppid()):
    assert chips._why_kept(pid, 0, "python3", "") in (
      "this command itself",
      "a process of the system",
    )
  assert chips._why_kept(1, 0, "init", "") == "a process of the system"
  _record(home, stubborn)
  assert chips._why_kept(stubborn.pid, 0, "sh", "") == "run one; first: tpu stop --run=one"


def test_links_out_of_the_log_folder_are_not_followed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(os, "geteuid", lambda: 0)
  for folder in ("proc", "tmp", "home"):
    (tmp_path / folder).mkdir()
  (tmp_path / "home/kept").touch()
  (tmp_path / "tmp/tpu_logs").symlink_to(tmp_path / "home")
  assert machine.clean(str(tmp_path)) == {"removed": ["/tmp/tpu_logs"]}
  assert (tmp_path / "home/kept").exists()


def test_damage_on_the_way_is_seen(home: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(common, "HOME", home)
  (home / "ov-code/apps/old.py").touch()
  (home / "ov-code.tgz").write_bytes(b"half")
  with pytest.raises(common.Refused, match="arrived damaged"):
    machine.unpack("ov-code.tgz", "0" * 64)
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
  assert runs._flag(arguments, "workdir") == expected


def _count(home: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
  for kind in ("json", "log", "pid"):
    name = "COUNT" if kind == "json" else f"COUNT_{kind.upper()}"
    monkeypatch.setattr(machine, name, home / f"ov-count.{kind}")
  (home / "python").write_text(f"#!/bin/sh\n{program}\n")
  (home / "python").chmod(0o755)
  common.PYTHON.write_text(str(home / "python"))
  machine.count()


def test_counting_does_not_wait(home: Path, monkeypatch: pytest.MonkeyPatch):
  began = time.monotonic()
  _count(home, monkeypatch, """sleep 1; echo '{"devices": 8}' > "$3" """)
  assert time.monotonic() - began < 0.9  # of the second that the program takes
  assert machine.counted("20") == {"devices": 8}


def test_counting_that_fails_or_hangs(home: Path, monkeypatch: pytest.MonkeyPatch):
  _count(home, monkeypatch, "echo 'the TPU is in use' >&2; exit 1")
  with pytest.raises(common.Refused, match="could not count its devices: the TPU is in use"):
    machine.counted("20")
  _count(home, monkeypatch, "echo waiting; sleep 60")
  with pytest.raises(common.Refused, match="for over 0.3 s: waiting"):
    machine.counted("0.3")
  pid = int(machine.COUNT_PID.read_text())
  assert os.waitpid(pid, 0)[1] == signal.SIGKILL
