"""Runs of apps: each a session of its own under ~/ov-run/NAME, noted by more than a number."""

from __future__ import annotations

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from tools.tpu.worker import common

_RESTART_PAUSE = 20  # seconds: the other workers must have ended before any is started again
_USER_MISTAKE = 2  # the apps' exit code; trying again would not help


def start(run: str, restarts: str, app: str, *arguments: str) -> dict[str, Any]:
  """Starts an app in a session of its own, which outlives this connection."""
  folder = common.RUNS / run
  if members(_record(folder)):
    raise common.Refused(f"run {run} is alive already; stop it, or choose another --run")
  module = common.needs(common.CODE, "tpu sync") / "apps" / f"{app}.py"
  if not module.is_file():
    raise common.Refused(f"there is no app {app} in ov-code/apps")
  command = [common.python(), "-m", "apps." + app, *arguments]
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("exit", "stopping"):
    (folder / name).unlink(missing_ok=True)
  with open(folder / "worker.log", "ab") as log:
    process = subprocess.Popen(
      [sys.executable, os.path.abspath(sys.argv[0]), "supervise", run, restarts, *command],
      stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=common.CODE,
    )  # fmt: skip
  record = {
    "pid": process.pid,
    "pgid": process.pid,
    "start": _start_time(process.pid),
    "boot": _boot(),
    "command": command,
    "workdir": _flag(arguments, "workdir"),
  }
  (folder / "run.json").write_text(json.dumps(record))
  return {"run": run, "pid": process.pid}


def supervise(run: str, restarts: str, *command: str) -> None:
  """Waits for the app, starts it again where it failed, notes its exit code."""
  # A function, not SIG_IGN: the app would inherit that, and must hear SIGTERM.
  signal.signal(signal.SIGTERM, lambda *_: None)
  folder = common.RUNS / run
  for left in range(int(restarts), -1, -1):
    code = subprocess.call(list(command), env=common.environment(), cwd=common.CODE)
    if code in (0, _USER_MISTAKE) or not left or (folder / "stopping").exists():
      break
    print(f"ov-worker: ended with code {code}; {left} more tries", flush=True)
    time.sleep(_RESTART_PAUSE)
    if (folder / "stopping").exists():
      break
  (folder / "exit").write_text(str(code))


def status(run: str) -> dict[str, Any]:
  """Whether it runs, how far it is, what it said last."""
  folder = common.RUNS / run
  record = _record(folder)
  if not record:
    there = sorted(f.name for f in common.RUNS.iterdir()) if common.RUNS.is_dir() else []
    raise common.Refused(f"no run {run} here; there are: {', '.join(there) or 'none'}")
  ended = (folder / "exit").read_text() if (folder / "exit").exists() else None
  workdir = common.CODE / Path(record["workdir"] or ".").expanduser()
  metrics = common.last_lines(workdir / "metrics.jsonl")
  log = common.last_lines(folder / "worker.log")
  return {
    "alive": bool(members(record)),
    "exit": None if ended is None else int(ended),
    "step": next((s for s in map(_step, reversed(metrics)) if s is not None), None),
    "last": log[-1][:300] if log else "",
  }


def terminate(run: str) -> dict[str, Any]:
  """Sends SIGTERM to the recorded process group, and does not wait."""
  record, marker = _record(common.RUNS / run), common.RUNS / run / "stopping"
  if not record or not members(record):
    marker.unlink(missing_ok=True)  # of an earlier signal
    return {"terminated": False}
  marker.touch()  # so that it is not started again; its time is the signal's
  os.killpg(record["pgid"], signal.SIGTERM)
  return {"terminated": True}


def stop(run: str, grace: str) -> dict[str, Any]:
  """Waits until `grace` seconds after SIGTERM, and ends with SIGKILL what is left of the group."""
  record, marker = _record(common.RUNS / run), common.RUNS / run / "stopping"
  if not record or not marker.exists():
    return {"stopped": "was not running"}
  deadline = marker.stat().st_mtime + float(grace)
  while members(record):
    if time.time() >= deadline:
      os.killpg(record["pgid"], signal.SIGKILL)
      return {"stopped": "SIGKILL"}
    time.sleep(0.1)
  return {"stopped": "SIGTERM"}


def alive() -> list[str]:
  """Names of the runs that are alive."""
  folders = sorted(common.RUNS.iterdir()) if common.RUNS.is_dir() else []
  return [folder.name for folder in folders if members(_record(folder))]


def members(record: dict[str, Any] | None) -> list[int]:
  """The live processes of the recorded group; none where its number now means another."""
  if not record or record["boot"] != _boot():
    return []
  leader = _start_time(record["pid"])
  if leader is not None and leader != record["start"]:
    return []  # the number was given away again, which happens only once the group is empty
  numbers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
  found = {number: stat(number) for number in numbers}
  group = str(record["pgid"])
  return [n for n, fields in found.items() if fields and fields[2] == group and fields[0] != "Z"]


def state(pid: int) -> str | None:
  """A letter, Z for what has ended and nobody asked for; None for what is not there."""
  fields = stat(pid)
  return fields[0] if fields else None


def stat(pid: int, proc: Path = Path("/proc")) -> list[str] | None:
  """Return the fields of PID/stat after the name, which may hold anything; None without one."""
  try:
    return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
  except OSError:
    return None


def run_of(pid: int) -> str:
  """Return the name of the run that a process belongs to, or ""."""
  folders = common.RUNS.iterdir() if common.RUNS.is_dir() else ()
  return next((folder.name for folder in folders if pid in members(_record(folder))), "")


def _start_time(pid: int) -> int | None:
  """In clock ticks since the machine started."""
  fields = stat(pid)
  return int(fields[19]) if fields else None


def _boot() -> str:
  return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _record(folder: Path) -> dict[str, Any] | None:
  path = folder / "run.json"
  return json.loads(path.read_text()) if path.exists() else None


def _flag(arguments: tuple[str, ...], name: str) -> str | None:
  """The value of --name=VALUE or --name VALUE among the app's arguments."""
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and flag == name:
      return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else None)
  return None


def _step(line: str) -> int | None:
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return None  # torn, or no line of metrics
