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
from typing import Self


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


class Group:
  """Processes of one run; a context manager that kills what is left of them, children included."""

  def __init__(
    self,
    args: Sequence[str],
    *,
    processes: int,
    devices: int,
    env: Mapping[str, str] | None = None,
    per_process_env: Sequence[Mapping[str, str]] | None = None,
  ):
    """Starts them; the arguments are those of `launch`."""
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
      variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
      for name in ("OV_COORDINATOR", "OV_NUM_PROCESSES", "OV_PROCESS_ID"):
        variables.pop(name, None)
      if processes > 1:
        variables["OV_COORDINATOR"] = coordinator
        variables["OV_NUM_PROCESSES"] = str(processes)
        variables["OV_PROCESS_ID"] = str(index)
      variables.update(env or {})
      variables.update(per_process_env[index] if per_process_env else {})
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
    """The return code of each, None while it runs."""
    return [process.poll() for process in self.running]

  def wait(self, timeout: float) -> bool:
    """Whether all ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while None in self.codes():
      if time.monotonic() > deadline:
        return False
      time.sleep(0.05)
    return True

  def kill(self) -> None:
    """Ends all with SIGKILL, children included."""
    _kill_all(self.running)

  def printed(self, index: int) -> str:
    """What a process has written to standard error so far."""
    return (self._root / f"{index}.err").read_text(errors="replace")

  def results(self) -> list[Result]:
    """What each left behind; all must have ended."""
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
  """None when all ended with 0, else what went wrong first."""
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
    # The group outlives its leader while children run, so it is signalled in either case.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
