"""Kill a run before each of its file changes, resume it, and compare it with an uninterrupted run.

  python -m tests.end_to_end.kill_points caption FOLDER [--every N] [--jobs N]

A kill leaves the current files on disk. So instead of repeating the run for every kill, the
workdir of one run is copied before each file change of Python and after each opening of a file for
writing, when the file is still empty. Each copy is the workdir of a killed run. The same command
runs in each copy. It must end with exit code 0, and its metrics, evaluations, report and arrays of
the last checkpoint must be equal, except for clock times.

TensorStore writes arrays in C++ threads, which Python's audit hooks do not see. The copy at the
next file change of Python includes their files.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import hashlib
import importlib
import json
import os
from pathlib import Path
import shutil
import sys
import threading
import time
from typing import Any, NamedTuple

from apps import launch
from apps.trainer.sinks import TIMING_NAMES, compare_metrics
from tests.end_to_end import runner

_STEPS = ("--config.total_steps=12", "--config.eval.every=6", "--config.checkpoint.keep_last=1")
FLAGS = {
  "caption": (*runner.TINY, *_STEPS),
  "clip": (*runner.tiny_clip(), *_STEPS),
}
# Imported before processes are forked, so that each starts within milliseconds. No import starts
# a thread or opens a device.
_HEAVY = (
  "jax", "orbax.checkpoint", "ov_models", "ov_losses", "ov_eval",
  "apps.evaluators", "apps.demo_data", "apps.trainer.check", "apps.trainer.loop",
  "apps.trainer.hosts",
)  # fmt: skip
_CHANGES = frozenset(
  {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
    "os.chmod",
  }
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Entries of the report that depend on timing.
_CLOCK_FACTS = frozenset({"training and evaluation time"})


class Point(NamedTuple):
  """A copy of the workdir before one file change.

  Attributes:
    folder: the copy.
    change: the next file change of the run.
  """

  folder: Path
  change: str


class _Recorder:
  """Audit hook that copies `workdir` to `copies` before each file change in it."""

  def __init__(self, workdir: Path, copies: Path):
    self._workdir, self._copies = workdir, copies
    self._lock = threading.Lock()  # file changes of other threads wait until a copy is complete
    self._here = threading.local()  # whether this thread is copying
    self._count = 0

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
      path, _, flags = args
      if not flags & _WRITES:
        return
    elif event in _CHANGES:
      path = args[0]
    else:
      return
    if not isinstance(path, str | os.PathLike | bytes):
      return
    name = Path(os.path.abspath(os.fsdecode(path)))
    if not name.is_relative_to(self._workdir) or getattr(self._here, "copies", False):
      return
    with self._lock:
      self._here.copies = True
      try:
        change = f"{event} {name.relative_to(self._workdir)}"
        copy = self._copy(change)
        if event == "open" and not name.exists() and name.parent.is_dir():
          opened = self._copy(f"write to {name.relative_to(self._workdir)}", copy)
          (opened / name.relative_to(self._workdir)).touch()
      finally:
        self._here.copies = False

  def _copy(self, change: str, source: Path | None = None) -> Path:
    target = self._copies / f"{self._count:04d}"
    self._count += 1
    while True:
      before = _stamps(self._workdir)
      with contextlib.suppress(shutil.Error, FileNotFoundError):  # changed by a C++ thread
        if self._workdir.is_dir():
          shutil.copytree(source or self._workdir, target, symlinks=True)
        else:
          target.mkdir()
        if source is not None or _stamps(self._workdir) == before:
          break
      shutil.rmtree(target, ignore_errors=True)
    (self._copies / f"{target.name}.change").write_text(change, "utf-8")
    return target


def record(app: str, folder: Path) -> list[Point]:
  """Run an app once in `folder`/undisturbed and copy its workdir before each file change.

  Args:
    app: "caption" or "clip".
    folder: an existing, empty folder.
  """
  workdir, copies = folder / "undisturbed", folder / "points"
  copies.mkdir()
  code, printed = run(app, workdir, folder, hook=_Recorder(workdir, copies))
  if code:
    raise RuntimeError(f"the undisturbed run ended with {code}:\n{printed}")
  return [
    Point(path.with_suffix(""), path.read_text("utf-8")) for path in sorted(copies.glob("*.change"))
  ]


def run(
  app: str, workdir: Path, home: Path, hook: Callable[[str, tuple[Any, ...]], None] | None = None
) -> tuple[int, str]:
  """Run an app in a forked process.

  Args:
    app: "caption" or "clip".
    workdir: workdir of the run.
    home: the home directory of the process, which holds the compile cache.
    hook: an audit hook of the process.

  Returns:
    The exit code and the output. A process is killed after five minutes, with exit code -9.
  """
  for name in _HEAVY:
    importlib.import_module(name)
  output = workdir.with_name(f"{workdir.name}.output")
  sys.stdout.flush()
  sys.stderr.flush()
  child = os.fork()
  if child == 0:
    _become(app, workdir, home, output, hook)
  end = time.monotonic() + 300
  while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status), output.read_text("utf-8", "replace")
    if time.monotonic() > end:
      os.kill(child, 9)
    time.sleep(0.02)


def _become(
  app: str,
  workdir: Path,
  home: Path,
  output: Path,
  hook: Callable[[str, tuple[Any, ...]], None] | None,
) -> None:
  """Run the app in this forked process; does not return."""
  code = 1
  try:
    with open(output, "wb") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # tests may replace them
    os.environ["HOME"] = str(home)
    module = importlib.import_module(f"apps.{app}_train")
    sys.argv = [module.__file__ or "", *FLAGS[app], f"--workdir={workdir}"]
    if hook is not None:
      sys.addaudithook(hook)
    launch.run(f"{app}_config")
    code = 0
  except SystemExit as ended:
    code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
  finally:
    if code == 0:
      digest = _arrays(workdir)
      workdir.with_name(f"{workdir.name}.arrays").write_text(digest, "utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def differences(undisturbed: Path, resumed: Path) -> list[str]:
  """Compare two finished runs and return one line for each difference."""
  found = compare_metrics(undisturbed / "metrics.jsonl", resumed / "metrics.jsonl")
  arrays = [path.with_name(f"{path.name}.arrays").read_text() for path in (undisturbed, resumed)]
  if arrays[0] != arrays[1]:
    found.append("the last checkpoints differ in their arrays")
  for name in _json_files(undisturbed):
    path = resumed / name
    if not path.exists():
      found.append(f"{name} is missing")
    elif _facts(path) != _facts(undisturbed / name):
      found.append(f"{name} differs")
  return found


def try_points(
  app: str, points: list[Point], folder: Path, *, kept: bool = False
) -> Iterator[tuple[Point, list[str]]]:
  """Resume from each point and yield it with its differences.

  Args:
    app: "caption" or "clip".
    points: result of `record`.
    folder: folder of `record`.
    kept: whether to keep the workdirs of runs without differences.
  """
  for point in points:
    code, printed = run(app, point.folder, folder)
    if code:
      wrong = [f"exit code {code}: " + " | ".join(printed.strip().splitlines()[-3:])]
    elif "Traceback" in printed:
      wrong = ["a traceback: " + printed.strip().splitlines()[-1]]
    else:
      wrong = differences(folder / "undisturbed", point.folder)
    yield point, wrong
    if not wrong and not kept:
      shutil.rmtree(point.folder)


def _arrays(workdir: Path) -> str:
  """Return a digest of all arrays in the newest checkpoint."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  newest = max(
    (path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()),
    key=lambda path: int(path.name),
  )
  digest = hashlib.sha256(newest.name.encode())
  with ocp.PyTreeCheckpointer() as reader:
    for path, leaf in jax.tree_util.tree_leaves_with_path(reader.restore(newest / "state")):
      array = np.asarray(leaf)
      digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
      digest.update(array.tobytes())
  return digest.hexdigest()


def _json_files(workdir: Path) -> list[str]:
  """Return the JSON files of a run, except those in `data` and `checkpoints`."""
  found = [*workdir.glob("*.json"), *workdir.glob("evaluations/*.json")]
  return sorted(path.relative_to(workdir).as_posix() for path in found)


def _facts(path: Path) -> Any:
  """Return the content of a JSON file without workdir paths and times."""
  text = path.read_text("utf-8")
  workdir = path.parent.parent if path.parent.name == "evaluations" else path.parent
  text = text.replace(str(workdir), "WORKDIR").replace(json.dumps(workdir.name), '"NAME"')

  def without_clock(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in pairs if k not in TIMING_NAMES and k not in _CLOCK_FACTS}

  return json.loads(text, object_pairs_hook=without_clock)


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
  """Return name, size and mtime of every file below a folder."""
  stamps = []
  for path in sorted(folder.rglob("*")):
    with contextlib.suppress(FileNotFoundError):
      stat = path.lstat()
      stamps.append((str(path), stat.st_size, stat.st_mtime_ns))
  return stamps


def main() -> int:
  parser = argparse.ArgumentParser(description="Kill a run before each of its file changes.")
  parser.add_argument("app", choices=FLAGS)
  parser.add_argument("folder", type=Path, help="a new folder for the workdirs")
  parser.add_argument("--every", type=int, default=1, help="try every n-th point")
  parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
  options = parser.parse_args()
  folder = options.folder.absolute()
  folder.mkdir(parents=True)
  points = record(options.app, folder)[:: options.every]
  print(f"{len(points)} points", flush=True)
  jobs = []
  for job in range(options.jobs):
    if (child := os.fork()) == 0:
      bad = 0
      for point, wrong in try_points(options.app, points[job :: options.jobs], folder):
        bad += bool(wrong)
        if wrong:
          print(f"{point.folder.name} before {point.change}: {'; '.join(wrong)}", flush=True)
      os._exit(min(bad, 100))
    jobs.append(child)
  bad = sum(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) for job in jobs)
  print(f"{options.app}: {len(points)} points tried, {bad} with a difference")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
