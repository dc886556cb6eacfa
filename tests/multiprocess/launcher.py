"""Run a Python program as several JAX processes on this machine, over loopback sockets.

  results = launch(["-m", "apps.caption_train", "--config=..."], processes=2, devices=2)

Each process has `devices` simulated CPU devices and the variables that `ov_sharding.initialize`
reads. After a failure or a timeout, all processes and their children are killed.
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
from typing import Self

from tools.python import simulated_devices


@dataclasses.dataclass(frozen=True)
class Result:
  """Exit code and output of a process. A negative code is the signal that ended it."""

  returncode: int
  stdout: str
  stderr: str


class LaunchError(RuntimeError):
  """A process failed or timed out; the message contains the end of every output."""

  def __init__(self, reason: str, results: Sequence[Result]):
    tails = [
      f"--- process {i} (return code {r.returncode})\n{r.stdout[-2000:]}{r.stderr[-4000:]}"
      for i, r in enumerate(results)
    ]
    super().__init__("\n".join([reason, *tails]))
    self.results = tuple(results)


def free_port() -> int:
  """Return a TCP port that is currently free."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Group:
  """Context manager for the processes of a run; kills remaining processes and their children."""

  def __init__(
    self,
    args: Sequence[str],
    *,
    processes: int,
    devices: int,
    env: Mapping[str, str] | None = None,
    per_process_env: Sequence[Mapping[str, str]] | None = None,
  ):
    """Start the processes; the arguments are those of `launch`."""
    self._stack = contextlib.ExitStack()
    self._root = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
    self.running: list[subprocess.Popen[bytes]] = []
    self._stack.callback(_kill_all, self.running)
    coordinator = f"127.0.0.1:{free_port()}"
    for index in range(processes):
      variables = dict(os.environ)
      # A Bazel test finds its packages through sys.path, which children do not inherit.
      variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
      variables["JAX_PLATFORMS"] = "cpu"
      for name in ("OV_COORDINATOR", "OV_NUM_PROCESSES", "OV_PROCESS_ID"):
        variables.pop(name, None)
      if processes > 1:
        variables["OV_COORDINATOR"] = coordinator
        variables["OV_NUM_PROCESSES"] = str(processes)
        variables["OV_PROCESS_ID"] = str(index)
      variables.update(env or {})
      variables.update(per_process_env[index] if per_process_env else {})
      flags = variables.get("XLA_FLAGS", ""), simulated_devices.xla_flags(devices)
      variables["XLA_FLAGS"] = " ".join(flags)  # the last value of a flag counts
      with (
        (self._root / f"{index}.out").open("wb") as out,
        (self._root / f"{index}.err").open("wb") as err,
      ):
        self.running.append(
          subprocess.Popen(
            [sys.executable, *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=variables,
            start_new_session=True,
          )
        )

  def codes(self) -> list[int | None]:
    """Return the exit code of each process, None while it runs."""
    return [process.poll() for process in self.running]

  def wait(self, timeout: float) -> bool:
    """Wait for all processes; return whether they ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while None in self.codes():
      if time.monotonic() > deadline:
        return False
      time.sleep(0.05)
    return True

  def kill(self) -> None:
    """Kill all processes and their children."""
    _kill_all(self.running)

  def printed(self, index: int) -> str:
    """Return the standard error output of a process so far."""
    return (self._root / f"{index}.err").read_text(errors="replace")

  def results(self) -> list[Result]:
    """Return the results of all processes, which must have ended."""
    return [
      Result(
        process.wait(),
        (self._root / f"{index}.out").read_text(errors="replace"),
        self.printed(index),
      )
      for index, process in enumerate(self.running)
    ]

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._stack.close()


def launch(
  args: Sequence[str],
  *,
  processes: int,
  devices: int,
  timeout: float = 120.0,
  env: Mapping[str, str] | None = None,
  per_process_env: Sequence[Mapping[str, str]] | None = None,
) -> list[Result]:
  """Run `python *args` in `processes` processes and wait for all of them.

  Args:
    args: arguments of the Python interpreter: a script path, or "-m" and a module.
    processes: number of processes; 1 sets no coordinator, as in a normal run.
    devices: number of simulated CPU devices per process.
    timeout: seconds until all processes are killed.
    env: variables for all processes, in addition to those of this process.
    per_process_env: variables for each process, in addition to `env`.

  Returns:
    One `Result` per process, in process order, all with return code 0.

  Raises:
    LaunchError: if a process returns another code, or the time runs out.
  """
  with Group(
    args, processes=processes, devices=devices, env=env, per_process_env=per_process_env
  ) as group:
    reason = _wait(group, timeout)
    group.kill()
    results = group.results()
  if reason:
    raise LaunchError(reason, results)
  return results


def _wait(group: Group, timeout: float) -> str | None:
  """Wait for all processes; return None if all exit with 0, otherwise the first failure."""
  deadline = time.monotonic() + timeout
  while True:
    codes = group.codes()
    for index, code in enumerate(codes):
      if code:
        return f"process {index} of {len(codes)} ended with return code {code}."
    if all(code == 0 for code in codes):
      return None
    if time.monotonic() > deadline:
      waiting = [index for index, code in enumerate(codes) if code is None]
      return f"processes {waiting} of {len(codes)} still ran after {timeout:.0f} s."
    time.sleep(0.05)


def _kill_all(running: Sequence["subprocess.Popen[bytes]"]) -> None:
  for process in running:
    # The group exists while children run, even after its leader has ended, so always signal it.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
