"""Benchmark of the start of an app: `--help`, imports, the first step.

Every run is a separate process with the interpreter of this one. `help/` runs the app with --help.
`import/` imports the modules that the app imports after validating its flags. `first step/` runs
the demo from the command to the end of its first step, with existing data, and with the step
compiled or loaded from the compile cache.
"""

import functools
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

from tools.bench.harness import Benchmark, Case, Goal, Ratio, cpu_seconds_of

ROOT = Path(__file__).parents[2]
HELP_SECONDS = 1.5

# The module of an app, and the module that it imports after validating its flags.
_TRAINS = ("apps.evaluators", "apps.trainer.loop", "apps.trainer.check", "apps.demo_data")
APPS: dict[str, tuple[str, ...]] = {
  "caption_train": ("apps.caption_train", *_TRAINS),
  "clip_train": ("apps.clip_train", *_TRAINS),
  "export": ("apps.export", "apps.exporter.exporting", "apps.exporter.source"),
  "preflight": ("tools.preflight.preflight", "tools.preflight.assess"),
  "tpu": ("tools.tpu.tpu",),
  "compare": ("tools.compare.compare", "tools.compare.evaluations", "tools.compare.page"),
  "convert": ("tools.data.convert",),
}
_IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
_FIRST_STEP = "first step after"  # log line of the trainer


def make(scratch: Path) -> Benchmark:
  """Return the cases. `scratch` is a folder for workdirs and a compile cache."""
  cases = [Case("python alone", lambda: _finish([sys.executable, "-c", ""]))]
  for app, (module, *_) in APPS.items():
    command = [sys.executable, "-m", module, "--help"]
    run = functools.partial(_finish, command, code=1, says="--helpfull")  # as absl does
    cases.append(Case(f"help/{app}", run))
  for name, modules in {"jax": ("jax",), **APPS}.items():
    command = [sys.executable, "-c", _IMPORT, *modules]
    cases.append(Case(f"import/{name}", functools.partial(_finish, command)))
  demo = _Demo(scratch)
  compiled, loaded = "first step/compiled", "first step/from the cache"
  cases.append(Case(compiled, lambda: demo.first_step(""), warm_up=False))
  cases.append(Case(loaded, lambda: demo.first_step(str(scratch / "cache"))))
  return Benchmark(
    "startup",
    "Processes from their start to their end, or to the end of the first step of "
    "`apps/configs/caption_demo.py:runlocal`.",
    cases,
    ratios=[Ratio(loaded, compiled)],
    goals=[Goal(f"help/{app}", "clock_s", HELP_SECONDS) for app in APPS],
    dtype="float32",
    batch=64,
  )


def _finish(command: list[str], code: int = 0, says: str = "") -> dict[str, float]:
  """Run a program; raise RuntimeError for an unexpected exit code or output."""
  began = time.perf_counter()
  with subprocess.Popen(
    command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode != code or says not in said:
    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
  return {"cpu_s": usage.ru_utime + usage.ru_stime, "clock_s": clock}


def environment() -> dict[str, str]:
  """Return the environment of this process with all packages of the repository on PYTHONPATH."""
  path = [ROOT, *sorted((ROOT / "packages").iterdir())]
  own = {name: value for name, value in os.environ.items() if name != "BUILD_WORKING_DIRECTORY"}
  return own | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}


class _Demo:
  """Runs the first step of the demo in a workdir that has data and tokenizer."""

  def __init__(self, scratch: Path):
    self._scratch = scratch
    self._prepared = scratch / "prepared"

  def first_step(self, cache: str) -> dict[str, float]:
    """Measure from the command to the end of the first step; `cache=""` disables the cache."""
    if not self._prepared.exists():
      _finish([*self._command(self._prepared, str(self._scratch / "cache")), "--compile"])
    workdir = self._scratch / "workdir"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(self._prepared, workdir)
    began = time.perf_counter()
    with subprocess.Popen(
      self._command(workdir, cache), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
      assert process.stderr is not None
      said = []
      for line in process.stderr:
        said.append(line)
        if _FIRST_STEP in line:
          clock, cpu = time.perf_counter() - began, cpu_seconds_of(process.pid)
          process.kill()
          return {"cpu_s": cpu, "clock_s": clock}
    raise RuntimeError(f"the demo ended with {process.returncode}: {''.join(said)[-2000:]}")

  def _command(self, workdir: Path, cache: str) -> list[str]:
    config = ROOT / "apps/configs/caption_demo.py"
    return [
      *(sys.executable, "-m", APPS["caption_train"][0], f"--workdir={workdir}"),
      *(f"--config={config}:runlocal", f"--config.compile_cache={cache}"),
    ]
