"""Runs one Python program as several JAX processes on this machine, over loopback sockets.

  results = launch(["-m", "apps.caption_train", "--config=..."], processes=2, devices=2)

Each process sees `devices` simulated CPU devices and the variables that `ov_sharding.initialize`
reads. When one process fails or the time is up, all of them are killed, children included.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time


@dataclasses.dataclass(frozen=True)
class Result:
  """What one process left behind. A negative return code is the signal that ended it."""

  returncode: int
  stdout: str
  stderr: str


class LaunchError(RuntimeError):
  """A process failed or the time ran out; the message holds the end of every output."""

  def __init__(self, reason: str, results: Sequence[Result]):
    tails = [
      f"--- process {i} (return code {r.returncode})\n{r.stdout[-2000:]}{r.stderr[-4000:]}"
      for i, r in enumerate(results)
    ]
    super().__init__("\n".join([reason, *tails]))
    self.results = tuple(results)


def free_port() -> int:
  """A TCP port that was free a moment ago."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def launch(
  args: Sequence[str],
  *,
  processes: int,
  devices: int,
  timeout: float = 120.0,
  env: Mapping[str, str] | None = None,
  per_process_env: Sequence[Mapping[str, str]] | None = None,
) -> list[Result]:
  """Runs `python *args` as `processes` processes and waits for all of them.

  Args:
    args: arguments of the Python interpreter: a script path, or "-m" and a module.
    processes: number of processes; with 1 no coordinator is set, as in a plain run.
    devices: simulated CPU devices in each process.
    timeout: seconds until everything is killed.
    env: variables for all processes, on top of the ones of this process.
    per_process_env: variables for each process, on top of `env`.

  Returns:
    One `Result` per process, in process order, all with return code 0.

  Raises:
    LaunchError: when a process returns another code, or the time runs out.
  """
  coordinator = f"127.0.0.1:{free_port()}"
  with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
    root = pathlib.Path(directory)
    running: list[subprocess.Popen[bytes]] = []
    stack.callback(_kill_all, running)
    for index in range(processes):
      variables = dict(os.environ)
      # A Bazel test finds its packages through sys.path, which children do not inherit.
      variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
      variables["JAX_PLATFORMS"] = "cpu"
      variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
      for name in ("OV_COORDINATOR", "OV_NUM_PROCESSES", "OV_PROCESS_ID"):
        variables.pop(name, None)
      if processes > 1:
        variables["OV_COORDINATOR"] = coordinator
        variables["OV_NUM_PROCESSES"] = str(processes)
        variables["OV_PROCESS_ID"] = str(index)
      variables.update(env or {})
      variables.update(per_process_env[index] if per_process_env else {})
      out = stack.enter_context((root / f"{index}.out").open("wb"))
      err = stack.enter_context((root / f"{index}.err").open("wb"))
      running.append(
        subprocess.Popen(
          [sys.executable, *args],
          stdin=subprocess.DEVNULL,
          stdout=out,
          stderr=err,
          env=variables,
          start_new_session=True,
        )
      )
    reason = _wait(running, timeout)
    _kill_all(running)
    results = [
      Result(
        process.returncode,
        (root / f"{index}.out").read_text(errors="replace"),
        (root / f"{index}.err").read_text(errors="replace"),
      )
      for index, process in enumerate(running)
    ]
  if reason:
    raise LaunchError(reason, results)
  return results


def _wait(running: Sequence["subprocess.Popen[bytes]"], timeout: float) -> str | None:
  """None when all ended with 0, else what went wrong first."""
  deadline = time.monotonic() + timeout
  while True:
    codes = [process.poll() for process in running]
    for index, code in enumerate(codes):
      if code:
        return f"process {index} of {len(running)} ended with return code {code}."
    if all(code == 0 for code in codes):
      return None
    if time.monotonic() > deadline:
      waiting = [index for index, code in enumerate(codes) if code is None]
      return f"processes {waiting} of {len(running)} still ran after {timeout:.0f} s."
    time.sleep(0.05)


def _kill_all(running: Sequence["subprocess.Popen[bytes]"]) -> None:
  for process in running:
    # The group outlives its leader while children run, so it is signalled in either case.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
