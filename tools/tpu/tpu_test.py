"""Tests of the tool with a fake gcloud: dry runs, failures, and the lifecycle of a run."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
from pathlib import Path
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import TypeVar

import pytest

from tools.tpu import fake_gcloud, tpu

_T = TypeVar("_T")

_DATA = Path(__file__).parent / "testdata"
_WHERE = ["--name=pod", "--zone=us-central2-b"]


class World:
  """A checkout, a fake gcloud, and the homes of two workers."""

  def __init__(self, folder: Path):
    self.fake, self.checkout = folder / "fake", folder / "checkout"
    fake_gcloud.install(self.fake)
    files = {
      "apps/__init__.py": "",
      "apps/demo.py": _APP,
      "apps/caption_train.py": "",
      "jax.py": "class D: platform = 'tpu'\n"
      "device_count = lambda: 8\nlocal_device_count = lambda: 4\ndevices = lambda: [D]\n",
      "packages/ov-sharding/pyproject.toml": "",
      "packages/ov-sharding/ov_sharding.py": "def initialize(): pass",
      "tools/python/environment.py": "import os, sys\nprint(os.environ['HOME'] + '/venv')\n"
      "assert all(os.path.exists(lock) for lock in sys.argv[1:])",
      "tools/python/requirements.lock": "",
      "tools/python/requirements-tpu.lock": "",
      ".gitignore": "ignored\n",
      "ignored": "",
    }
    for name, text in files.items():
      path = self.checkout / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    subprocess.run(["git", "init", "-q", str(self.checkout)], check=True)
    for number in (0, 1):  # the environment that `environment.py` creates
      python = self.fake / f"worker-{number}/venv/bin/python3"
      fake_gcloud.script(python, sys.executable)

  def __call__(
    self,
    *arguments: str,
    path: str | None = None,
    stdin: int = subprocess.DEVNULL,
    folder: Path | None = None,
  ) -> subprocess.CompletedProcess[str]:
    modules = os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)
    env = {
      **os.environ,
      "PYTHONPATH": modules,
      "BUILD_WORKING_DIRECTORY": str(folder or self.checkout),
      "PATH": path or f"{self.fake}/bin:{os.environ['PATH']}",
    }
    return subprocess.run(
      [sys.executable, "-m", tpu.__name__, *arguments], env=env, stdin=stdin,
      capture_output=True, text=True, check=False,
    )  # fmt: skip

  def verb(self, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return self(name, *_WHERE, *flags)

  def rows(self, name: str, *flags: str) -> list[dict[str, object]]:
    done = self.verb(name, "--json", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["rows"]


_APP = """
import pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print("arguments", sys.argv[1:], flush=True)
workdir = pathlib.Path(sys.argv[1].partition("=")[2])
workdir.mkdir(exist_ok=True)
(workdir / "metrics.jsonl").write_text('{"step": 20}\\n{"step": 40}\\n{"ste')
while not stopped and "--end" not in sys.argv: time.sleep(0.02)
print("stopped after a checkpoint", flush=True)
sys.exit(3 if "--end" in sys.argv else 0)
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
  yield World(tmp_path)
  for path in tmp_path.glob("fake/worker-*/ov-run/*/run.json"):  # processes left by a failed test
    with contextlib.suppress(ProcessLookupError):
      os.killpg(json.loads(path.read_text())["pid"], signal.SIGKILL)


_DRY = [
  "create --name=pod --zone=us-central2-b --topology=v4-512",
  "create --name=pod --zone=us-east5-a --project=my-project --topology=v5p-128 --spot",
  "create --name=pod --zone=us-east1-d --topology=v6e-256 --spot --queued",
  "list --zone=us-central2-b",
  "sync --name=pod --zone=us-central2-b --topology=v4-16",
  "setup --name=pod --zone=us-central2-b --topology=v4-16 --libtpu=gs://my-bucket/libtpu.so",
  "setup --name=pod --zone=us-central2-b --topology=v4-16 --libtpu=/tmp/libtpu.so --worker=1",
  "run --name=pod --zone=us-central2-b --topology=v4-16 --run=l14 --restarts=3 -- "
  "caption_train --config=apps/configs/openvision2.py:img=L/14,res=224 '--workdir=/data/my run'",
  "status --name=pod --zone=us-central2-b --topology=v4-16 --run=l14",
  "logs --name=pod --zone=us-central2-b --topology=v4-16 --run=l14 --out=/tmp/logs",
  "check --name=pod --zone=us-central2-b --topology=v4-16 --bucket=gs://my-bucket/runs",
  "clean --name=pod --zone=us-central2-b --topology=v4-16",
  "kill --name=pod --zone=us-central2-b --topology=v4-16",
  "stop --name=pod --zone=us-central2-b --topology=v4-16 --run=l14 --grace=120 --internal_ip",
  "ssh --name=pod --zone=us-central2-b --worker=1",
  "delete --name=pod --zone=us-central2-b",
  "delete --name=pod --zone=us-central2-b --queued",
]


def test_dry_runs(world: World):
  """Dry runs of all verbs match the transcript and never call gcloud."""
  text = ""
  for line in _DRY:
    verb, *rest = shlex.split(line)
    done = world(verb, "--dry_run", *rest)
    assert done.returncode == 0, done.stderr
    text += f"$ tpu {line} --dry_run\n" if " -- " not in line else f"$ tpu --dry_run {line}\n"
    text += done.stderr + done.stdout + "\n"
  assert text == (_DATA / "dry_run.txt").read_text(), text
  assert fake_gcloud.calls(world.fake) == []
  assert {line.split()[0] for line in _DRY} == set(tpu.VERBS) - {"launch"}


def _lines_of_the_readme() -> list[list[str]]:
  """Return the commands in the code blocks of README.md, split like in a shell."""
  page = (_DATA.parent / "README.md").read_text()
  block = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
  variables, found = {}, []
  for line in block.replace("\\\n", " ").splitlines():
    if setting := re.fullmatch(r'(\w+)="(.*)"', line):
      variables[setting[1]] = setting[2]
    elif line.strip():
      filled = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
      tool, words = ["tools/bazel", "run", "//tools/tpu", "--"], shlex.split(filled, comments=True)
      assert words[: len(tool)] == tool
      found.append(words[len(tool) :])
  return found


@pytest.mark.parametrize("line", _lines_of_the_readme(), ids=lambda line: line[0])
@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_readme_commands_as_dry_runs(world: World, line: list[str], where: str, tmp_path: Path):
  """--dry_run works after the verb and at the end of the line, inside and outside a checkout."""
  folder = world.checkout if where == "checkout" else tmp_path
  printed = []
  for words in ([line[0], "--dry_run", *line[1:]], [*line, "--dry_run"]):
    done = world(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus ") and "dry_run" not in done.stdout
    printed.append(done.stdout)
  assert printed[0] == printed[1]
  assert fake_gcloud.calls(world.fake) == []


def test_all_commands_of_the_readme_are_found():
  assert [line[0] for line in _lines_of_the_readme()][:4] == ["create", "sync", "setup", "check"]


def test_a_dry_run_of_one_worker_without_a_topology(world: World):
  done = world.verb("setup", "--dry_run", "--worker=3")
  assert done.returncode == 0 and done.stdout.count("--worker=3") == 1, done.stderr
  assert "count" not in done.stdout  # devices are counted by all workers together


_HOLDERS = [
  {"pid": 41, "user": "anna", "command": "python3 old.py", "start": 7, "kept": ""},
  {"pid": 42, "user": "root", "command": "agent", "start": 8, "kept": "a process of the system"},
]


def _held(*holders: dict[str, object], verb: str = "held", **more: object) -> dict[str, object]:
  answer = json.dumps({"holders": holders, "hidden": 0, **more})
  return {"match": [f"--command=python3 -I ov-worker.py {verb}"], "code": 0, "stdout": answer}


def test_kill_lists_processes_and_asks_first(world: World):
  ended = _held(_HOLDERS[1], verb="kill 10 41:7", ended=["41 (SIGTERM)"])
  fake_gcloud.rules(world.fake, _held(*_HOLDERS), ended)
  done = world.verb("kill", "--worker=1")
  assert done.returncode == 2 and "End 1 processes on 1 workers?" in done.stderr
  assert re.search("41 +anna +python3 old.py +-", done.stderr)
  assert re.search("42 +root +agent +a process of the system", done.stderr)
  assert not any("kill" in " ".join(call) for call in fake_gcloud.calls(world.fake))
  done = world.verb("kill", "--worker=1", "--yes", "--json")
  (row,) = json.loads(done.stdout)["rows"]
  assert row["ended"] == ["41 (SIGTERM)"]
  # The exit code reports that the chip is not free.
  assert done.returncode == 1 and row["holds the chip"] == ["42: a process of the system"]


def test_kill_without_holders_does_nothing(world: World):
  fake_gcloud.rules(world.fake, _held())
  done = world.verb("kill")
  assert (done.returncode, done.stdout) == (0, "no process has a chip open\n"), done.stderr


@pytest.mark.parametrize("grace", ["-1", "nan", "inf"])
def test_an_invalid_grace_period(world: World, grace: str):
  for verb in ("kill", "stop"):
    done = world.verb(verb, f"--grace={grace}", "--yes")
    assert done.returncode == 2 and "expected seconds from 0 to 86400" in done.stderr


def test_a_dry_run_as_json(world: World):
  done = world.verb("delete", "--dry_run", "--json")
  (command,) = json.loads(done.stdout)["commands"]
  assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "pod"]


_FULL = {"match": ["create"], "code": 1, "stderr": "ERROR: There is no more capacity in the zone\n"}
_HELD = '{"error": "the chip is held by python3 (pid 41); nothing was removed"}'
_POD = "--name=pod --zone=us-central2-b"
_NEW = f"create {_POD} --topology=v4-16"
# Command line, and behavior of gcloud.
_FAILURES: list[tuple[str, list[dict[str, object]]]] = [
  ("strat --zone=us-central2-b", []),
  ("check '--name=x; rm -rf /' --zone=us-central2-b", []),
  (f"check {_POD} --topology=v4-17", []),
  (_NEW, []),
  (f"{_NEW} --yes --attempts=1", [_FULL]),
  (
    f"{_NEW} --yes",
    [{"match": ["create"], "code": 1, "stderr": "x\nPERMISSION_DENIED: tpu.nodes.create\n"}],
  ),
  (
    f"{_NEW} --yes",
    [{"match": ["create"], "code": 1, "stderr": "ALREADY_EXISTS: Resource 'pod'\n"}],
  ),
  (f"{_NEW} --yes --timeout=0.5", [{"match": ["create"], "sleep": 30}]),
  (
    f"status {_POD}",
    [{"match": ["describe"], "code": 1, "stderr": "NOT_FOUND: Resource 'pod' was not found\n"}],
  ),
  (f"run {_POD} -- no_app --x", []),
  (f"status {_POD}", [{"match": ["describe"], "code": 0, "stdout": "<html>"}]),
  (
    f"status {_POD} --worker=1",
    [{"match": ["ssh"], "code": 255, "stderr": "Connection closed by remote host\n"}],
  ),
  (f"stop {_POD}", []),
  (f"clean {_POD} --yes", [{"match": ["ssh"], "code": 0, "stdout": _HELD}]),
]


def test_failures(world: World):
  """Each failure gives one line with the finding and a remedy."""
  text = ""
  for line, rules in _FAILURES:
    fake_gcloud.rules(world.fake, *rules)
    done = world(*shlex.split(line))
    mistakes = [row for row in done.stderr.splitlines() if "error:" in row]
    assert (done.returncode, len(mistakes)) in ((2, 1), (1, 0)), done.stderr
    text += f"$ tpu {line}\n{done.stderr}{done.stdout}(exit code {done.returncode})\n\n"
  done = world(*shlex.split(_NEW), "--yes", path=str(world.checkout))
  text += f"$ tpu {_NEW} --yes    # no gcloud\n{done.stderr}(exit code {done.returncode})\n"
  text = re.sub(" +$", "", text, flags=re.MULTILINE)  # rows of the table
  assert text == (_DATA / "failures.txt").read_text(), text


def test_lifecycle_of_a_run(world: World):
  """Sync, setup, run, status, stop and logs work on two workers that are folders."""
  rows = world.rows("sync")
  assert [row["files"] for row in rows] == [10, 10]
  assert not (world.fake / "worker-0/ov-code/ignored").exists()
  rows = world.rows("setup")
  assert [(row["platform"], row["devices"], row["local"]) for row in rows] == [("tpu", 8, 4)] * 2

  odd = "--note=a b; $(id) 'ü'"
  done = world("run", *_WHERE, "--run=one", "--", "demo", "--workdir=out", odd)
  assert done.returncode == 0, done.stderr
  rows = _until(lambda: world.rows("status", "--run=one"), lambda r: r[0]["step"] and r[1]["step"])
  assert [(row["alive"], row["step"], row["exit"]) for row in rows] == [(True, 40, None)] * 2
  assert rows[0]["last"] == f"arguments {['--workdir=out', odd]}"

  # The code cannot be replaced during a run, and a run cannot be started twice.
  for verb, flags, word in [("sync", (), "one is alive"), ("run", ("--", "demo"), "alive already")]:
    done = world(verb, *_WHERE, *(("--run=one",) if verb == "run" else ()), *flags)
    assert done.returncode == 1 and done.stdout.count(word) == 2, done.stdout

  rows = world.rows("stop", "--run=one", "--yes")
  assert [row["stopped"] for row in rows] == ["SIGTERM"] * 2
  rows = world.rows("status", "--run=one")
  assert [(row["alive"], row["exit"]) for row in rows] == [(False, 0)] * 2
  assert rows[1]["last"] == "stopped after a checkpoint"
  rows = world.rows("logs", "--run=one", f"--out={world.fake}/logs")
  assert "stopped after a checkpoint" in Path(str(rows[1]["file"])).read_text()
  assert world.rows("stop", "--run=one", "--yes")[0]["stopped"] == "was not running"


@pytest.mark.parametrize("typed, code", [("y\n", 0), ("\n", 2), ("no\n", 2)])
def test_a_terminal_is_asked_for_confirmation(world: World, typed: str, code: int):
  master, terminal = os.openpty()
  os.write(master, typed.encode())
  done = world("delete", *_WHERE, stdin=terminal)
  os.close(terminal)
  os.close(master)
  assert done.returncode == code
  assert "Delete pod in us-central2-b, and all that is on its disks? [y/N]" in done.stderr
  assert len(fake_gcloud.calls(world.fake)) == (1 if code == 0 else 0)


def test_missing_devices(world: World):
  world.rows("sync")
  path = world.fake / "worker-1/ov-code/jax.py"
  path.write_text(path.read_text().replace("8", "7"))
  done = world.verb("setup")
  assert done.returncode == 1
  assert "jax sees 7 tpu devices; expected 8 tpu" in done.stdout
  assert "failed on worker 1 (1 of 2)" in done.stdout


def test_check_reports_problems(world: World):
  world.rows("sync")
  good = {
    "time": time.time(), "python": "3.12.1", "environment": "jax 0.10.2", "libtpu": "0.0.42.1",
    "disk_free_gb": 80.0, "bucket": "ok", "problems": [],
  }  # fmt: skip
  bad = good | {
    "time": time.time() - 100, "libtpu": "0.0.1", "problems": ["bucket"],
  }  # fmt: skip
  answer = lambda n, found: {
    "match": ["ssh", f"--worker={n}"], "code": 0, "stdout": json.dumps(found)
  }  # fmt: skip
  fake_gcloud.rules(world.fake, answer(0, good), answer(1, bad))
  done = world.verb("check", "--json")
  first, second = json.loads(done.stdout)["rows"]
  assert done.returncode == 1
  differ = "workers differ in Python or libtpu"
  assert first["problems"] == [differ] and second["problems"] == ["bucket", "clock", differ]
  # The clock is 100 s late; the bound leaves room for slow calls.
  assert -160 < second["clock_skew_s"] <= -99


def _until(ask: Callable[[], _T], good: Callable[[_T], object], seconds: float = 20.0) -> _T:
  """Repeat a query until its answer is accepted, and return the last answer."""
  deadline = time.monotonic() + seconds
  while not good(answer := ask()) and time.monotonic() < deadline:
    time.sleep(0.1)
  return answer
