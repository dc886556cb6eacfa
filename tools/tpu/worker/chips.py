"""The processes that have a chip of this machine open: who they are, and how they are ended."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import pwd
import re
import signal
import sys
import time
from typing import Any

from tools.tpu.worker import common, runs

_CHIP = re.compile(r"/dev/(accel\d+|vfio/\d+)$")
# A unit of the system: of these, ssh holds the sessions of people on machines without logind.
_SERVICE = re.compile(r"/system\.slice/(?:.*/)?([^/]+\.service)")
_SESSIONS = ("ssh.service", "sshd.service")
_FIRST_USER = 1000  # below are accounts of the system, and root
_KILLED_SECONDS = 5.0  # until a process that got SIGKILL must be gone
_COMMAND_LENGTH = 160


def holders(root: str = "/") -> dict[str, Any]:
  """The processes that have a chip open, and how many could not be looked into."""
  found: list[dict[str, Any]] = []
  hidden = 0
  for process in (Path(root) / "proc").iterdir():
    if not process.name.isdigit():
      continue
    try:
      for descriptor in (process / "fd").iterdir():
        if _CHIP.search(os.readlink(descriptor)):
          found.append({"pid": int(process.name), "name": (process / "comm").read_text().strip()})
          break
    except PermissionError:
      hidden += 1
    except OSError:
      pass  # it ended meanwhile
  return {"holders": found, "hidden": hidden}


def as_root(*arguments: str) -> None:
  """Starts this program again with sudo, unless it is root: only root sees all processes."""
  if os.geteuid():
    home = f"HOME={common.HOME}"  # whose runs are looked at
    program = [sys.executable, os.path.abspath(sys.argv[0])]
    os.execvp("sudo", ["sudo", "-n", "env", home, *program, *arguments])


def held(root: str = "/") -> dict[str, Any]:
  """The holders with user, command and start time; `kept` says why one must not be ended."""
  as_root("held")
  seen = holders(root)
  described = [_describe(Path(root) / "proc", holder["pid"]) for holder in seen["holders"]]
  return {"holders": [d for d in described if d], "hidden": seen["hidden"]}


def kill(grace: str, *wanted: str, root: str = "/") -> dict[str, Any]:
  """Ends holders: SIGTERM, and SIGKILL for what is left after a grace period.

  Args:
    grace: seconds between both.
    *wanted: PID:START of each, as `held` gives them. A number that now means another process, that
      holds no chip any more, or that must be kept, is left alone.
    root: the root folder.

  Returns:
    `ended`: PID and signal of each that is gone; `holders`: what has a chip open now.
  """
  as_root("kill", grace, *wanted)
  proc = Path(root) / "proc"
  targets = [
    holder
    for holder in held(root)["holders"]
    if f"{holder['pid']}:{holder['start']}" in wanted and not holder["kept"]
  ]
  ended: dict[int, str] = {}
  for number, seconds in ((signal.SIGTERM, float(grace)), (signal.SIGKILL, _KILLED_SECONDS)):
    for target in targets:
      with contextlib.suppress(ProcessLookupError):
        os.kill(target["pid"], number)
    deadline = time.monotonic() + seconds
    while True:
      left = [target for target in targets if _same(proc, target)]
      for target in targets:
        if target not in left:
          ended[target["pid"]] = number.name
      targets = left
      if not targets or time.monotonic() >= deadline:
        break
      time.sleep(0.05)
  return {"ended": [f"{pid} ({name})" for pid, name in ended.items()], **held(root)}


def _describe(proc: Path, pid: int) -> dict[str, Any] | None:
  """A holder for people; None if it ended meanwhile."""
  folder = proc / str(pid)
  try:
    words = (folder / "cmdline").read_bytes().split(b"\0")
    uid = folder.stat().st_uid
    cgroup = (folder / "cgroup").read_text() if (folder / "cgroup").exists() else ""
  except OSError:
    return None
  fields = runs.stat(pid, proc)
  if fields is None:
    return None
  command = " ".join(word.decode("utf-8", "replace") for word in words if word)
  try:
    user = pwd.getpwuid(uid).pw_name
  except KeyError:
    user = str(uid)
  kept = _why_kept(pid, uid, command, cgroup)
  return {
    "pid": pid, "user": user, "command": command[:_COMMAND_LENGTH] or "-", "start": int(fields[19]),
    "kept": kept,
  }  # fmt: skip


def _why_kept(pid: int, uid: int, command: str, cgroup: str) -> str:
  """Why a process is not ended; "" for one that is."""
  if pid == 1 or not command:
    return "a process of the system"
  if pid in _ancestors(os.getpid()):
    return "this command itself"
  if 0 < uid < _FIRST_USER:
    return "an account of the system"
  for unit in _SERVICE.findall(cgroup):
    if unit not in _SESSIONS:
      return f"a service of the system; first: sudo systemctl stop {unit}"
  run = runs.run_of(pid)
  return f"run {run}; first: tpu stop --run={run}" if run else ""


def _ancestors(pid: int) -> set[int]:
  """A process and all that it was started by."""
  found: set[int] = set()
  while pid > 0 and pid not in found:
    found.add(pid)
    fields = runs.stat(pid)
    pid = int(fields[1]) if fields else 0
  return found


def _same(proc: Path, target: dict[str, Any]) -> bool:
  """Whether a process is still there, and no other has its number; a zombie has ended."""
  fields = runs.stat(target["pid"], proc)
  return fields is not None and fields[0] != "Z" and int(fields[19]) == target["start"]
