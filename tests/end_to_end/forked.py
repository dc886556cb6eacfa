"""Run programs in forks of a server that has imported the modules of the apps.

A program starts in a fraction of a second instead of seven. The server uses no device, because
JAX's threads do not survive a fork. Tests of the apps' own imports start a process.
"""

import multiprocessing
import os
from pathlib import Path
import runpy
import subprocess
import sys
import tempfile

# Modules that the apps import late, and pytest, the main module of the caller.
_MODULES = (
  "pytest",
  "apps.demo_data",
  "apps.evaluators",
  "apps.exporter.exporting",
  "apps.exporter.importer",
  "apps.exporter.source",
  "apps.trainer.check",
  "apps.trainer.loop",
  "tests.end_to_end.forked",
)


def run(
  app: Path, arguments: tuple[str, ...], variables: dict[str, str], timeout: float
) -> tuple[int, str]:
  """Run a program to completion.

  Args:
    app: file of the program.
    arguments: command line.
    variables: all environment variables. Those that JAX reads when it is imported, `JAX_*`, must be
      the ones of this process.
    timeout: limit in seconds.

  Returns:
    The exit code and the output.

  Raises:
    subprocess.TimeoutExpired: the program took longer.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(_MODULES))
  with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
    process = context.Process(target=_run_here, args=(app, arguments, variables, output.name))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
      process.kill()
      raise subprocess.TimeoutExpired(arguments, timeout)
    return process.exitcode, output.read()


def _run_here(
  app: Path, arguments: tuple[str, ...], variables: dict[str, str], output: str
) -> None:
  """Run a program in this process; standard output and standard error go to the file `output`."""
  for name, descriptor in (("stdout", 1), ("stderr", 2)):
    stream = open(output, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (stays open)
    os.dup2(stream.fileno(), descriptor)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
  os.environ.clear()
  os.environ.update(variables)
  tempfile.tempdir = None  # TMPDIR may have changed
  sys.argv = [str(app), *arguments]
  runpy.run_path(str(app), run_name="__main__")
