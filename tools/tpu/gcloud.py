"""Call gcloud, for one resource or for every worker of a TPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import json
import re
import shlex
import subprocess
from typing import Any

from tools.tpu.names import Topology

PROGRAM = "ov-worker.py"  # path in the home folder of every worker
_COMMAND = ("python3", "-I", PROGRAM)  # -I: files in the home folder cannot shadow modules
_PARALLEL = 16  # each call uses a gcloud process and a connection
_TIMEOUT = 300.0

# Patterns of error messages by cause, in search order; "not found" is the least specific.
_CAUSES = {
  "permission": "PERMISSION_DENIED|permission|not have .*access|not authorized|auth login",
  "no capacity": "no more capacity|insufficient (reserved )?capacity|stockout|"
  "RESOURCE_POOL_EXHAUSTED|not have enough resources",
  "quota": "quota|RESOURCE_EXHAUSTED|rate limit",
  "exists already": "ALREADY_EXISTS|already exists",
  "wrong argument": "INVALID_ARGUMENT|unrecognized argument|invalid (value|choice)|argument --",
  "not found": "NOT_FOUND|not found",
}


class GcloudError(Exception):
  """A failed call; `cause` is a key of the table above, "time limit" or "failed"."""

  def __init__(self, text: str, cause: str = "failed") -> None:
    super().__init__(text)
    self.cause = cause


def cause_of(stderr: str) -> str:
  """Return the cause of an error from gcloud's message."""
  found = (c for c, pattern in _CAUSES.items() if re.search(pattern, stderr, re.IGNORECASE))
  return next(found, "failed")


def reason_of(stderr: str) -> str:
  """Return the reason in an error message as one printable line of at most 400 characters.

  The reason is gcloud's ERROR and the lines that explain it, otherwise the last line.
  """
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  # After an error of ssh, gcloud adds that the command failed.
  noise = r"#####|ERROR: .* exited with return"
  lines = [line for line in lines if not re.match(noise, line)] or lines
  start = max((n for n, line in enumerate(lines) if line.startswith("ERROR:")), default=-1)
  return "".join(c for c in " ".join(lines[start:]) if c.isprintable())[:400]


@dataclasses.dataclass(frozen=True)
class Gcloud:
  """Options for all calls of gcloud."""

  zone: str
  project: str = ""  # "" uses gcloud's configuration
  timeout: float | None = None  # seconds per call; None uses the default of the call, usually 300
  dry_run: bool = False  # collect commands instead of running them
  internal_ip: bool = False  # connect to workers by their internal address
  planned: list[list[str]] = dataclasses.field(default_factory=list)  # collected in a dry run

  def command(self, *arguments: str, worker: int | None = None) -> list[str]:
    """Return a command of `gcloud compute tpus`."""
    more = [] if worker is None else [f"--worker={worker}"]
    more += ["--internal-ip"] if self.internal_ip and worker is not None else []
    more += [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])
    return ["gcloud", "compute", "tpus", *arguments, *more]

  def tpus(self, *arguments: str, worker: int | None = None, timeout: float | None = None) -> str:
    """Run `gcloud compute tpus ...` and return its output.

    Raises:
      GcloudError: if the call fails.
      ValueError: if gcloud is not installed.
    """
    command = [*self.command(*arguments, worker=worker), "--quiet"]
    if self.dry_run:
      self.planned.append(command)
      return ""
    limit = self.timeout or timeout or _TIMEOUT
    try:
      done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False,
        encoding="utf-8", errors="replace",
      )  # fmt: skip
    except FileNotFoundError:
      raise missing() from None
    except subprocess.TimeoutExpired:
      raise GcloudError(f"no answer within {limit:g} s", "time limit") from None
    if done.returncode:
      reason = reason_of(done.stderr) or f"exit code {done.returncode} without a message"
      raise GcloudError(reason, cause_of(done.stderr))
    return done.stdout

  def json(self, *arguments: str) -> Any:
    """Return the parsed JSON output of a call, or None in a dry run."""
    text = self.tpus(*arguments, "--format=json")
    try:
      return None if self.dry_run else json.loads(text)
    except ValueError:
      call = " ".join(arguments[:2])
      raise GcloudError(f"gcloud {call} answered {text[:60]!r}; expected JSON") from None


def missing() -> ValueError:
  """Return the error for a machine without gcloud."""
  return ValueError(
    "gcloud was not found on PATH; install the Google Cloud CLI (https://cloud.google.com/sdk) "
    "and run: gcloud auth login"
  )


Answers = dict[int, Any]  # worker -> answer or GcloudError


@dataclasses.dataclass(frozen=True)
class Fleet:
  """The workers of a TPU that a command applies to."""

  gcloud: Gcloud
  name: str  # name of the TPU
  workers: tuple[int, ...]  # worker numbers
  topology: Topology  # topology of the TPU, which may have more workers

  def each(self, call: Callable[[int], Any]) -> Answers:
    """Call a function for every worker and return its results or GcloudErrors.

    A gcloud call per worker identifies failed workers, which --worker=all does not. The first call
    runs alone because it may create gcloud's ssh key.
    """

    def guarded(worker: int) -> Any:
      try:
        return call(worker)
      except GcloudError as error:
        return error

    answers = {worker: guarded(worker) for worker in self.workers[:1]}
    # A single thread keeps the commands of a dry run in order.
    with ThreadPoolExecutor(1 if self.gcloud.dry_run else _PARALLEL) as pool:
      return answers | dict(zip(self.workers[1:], pool.map(guarded, self.workers[1:]), strict=True))

  def ask_one(self, worker: int, verb: str, *arguments: str, timeout: float | None = None) -> Any:
    """Run a verb of the worker program on one worker and return its JSON."""
    line = f"--command={shlex.join([*_COMMAND, verb, *arguments])}"
    try:
      text = self.gcloud.tpus("tpu-vm", "ssh", self.name, line, worker=worker, timeout=timeout)
    except GcloudError as error:
      if "can't open file" in str(error):  # message of Python
        raise GcloudError(f"{PROGRAM} is missing; first run: tpu sync") from None
      raise
    for answer in reversed(text.splitlines()):  # login messages may precede the JSON
      if answer.startswith("{"):
        with contextlib.suppress(ValueError):
          found = json.loads(answer)
          if "error" in found:
            raise GcloudError(reason_of(found["error"]))
          return found
    if self.gcloud.dry_run:
      return {}
    raise GcloudError(f"answered {text[-80:]!r}; expected a line of JSON")

  def ask(self, verb: str, *arguments: str, timeout: float | None = None) -> Answers:
    """Run a verb of the worker program on every worker."""
    return self.each(lambda worker: self.ask_one(worker, verb, *arguments, timeout=timeout))

  def copy(self, *paths: str, timeout: float) -> Answers:
    """Copy files to every worker; the last path is the target. gcloud verifies host keys."""
    scp = functools.partial(self.gcloud.tpus, "tpu-vm", "scp", *paths, timeout=timeout)
    return self.each(lambda worker: scp(worker=worker))

  def without(self, answers: Answers) -> "Fleet":
    """Return the workers that have not failed."""
    failed = {n for n, answer in answers.items() if isinstance(answer, GcloudError)}
    return dataclasses.replace(self, workers=tuple(n for n in self.workers if n not in failed))


def open_fleet(gcloud: Gcloud, name: str, worker: str, topology: str) -> Fleet:
  """Return the workers of a TPU.

  Args:
    gcloud: options of gcloud. A dry run makes no query; it assumes `topology`, or one worker.
    name: name of the TPU.
    worker: `all` or a worker number.
    topology: the expected topology, or "".

  Raises:
    ValueError: if the TPU does not exist, is not ready, or has another topology.
    GcloudError: if the query fails.
  """
  try:
    found = gcloud.json("tpu-vm", "describe", name) or {}
  except GcloudError as error:
    if error.cause == "not found":
      raise ValueError(f"there is no TPU {name!r} in {gcloud.zone}; see tpu list") from None
    raise
  real = found.get("acceleratorType") or topology or ("v4-8" if worker == "all" else "v4-4096")
  if topology not in ("", real):
    raise ValueError(f"--topology={topology}, but {name} is a {real}; leave the flag out")
  state = found.get("state", "READY")
  if state != "READY":
    raise ValueError(f"TPU {name} is {state}; expected READY: wait, or delete and create it again")
  shape = Topology.parse(real)
  hosts = len(found.get("networkEndpoints") or ()) or shape.hosts
  if hosts != shape.hosts:
    raise ValueError(f"TPU {name} has {hosts} workers; a {real} has {shape.hosts}")
  numbers = {str(n): (n,) for n in range(hosts)} | {"all": tuple(range(hosts))}
  if worker not in numbers:
    raise ValueError(f"--worker={worker!r}; expected all, or a number from 0 to {hosts - 1}")
  return Fleet(gcloud, name, numbers[worker], shape)
