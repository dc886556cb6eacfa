"""Runs gcloud: a list of arguments, a time limit, and errors that say what they mean."""

from collections.abc import Sequence
import dataclasses
import enum
import json
import re
import shlex
import subprocess
from typing import Any


class Cause(enum.Enum):
  """Why a call failed, as far as its words tell."""

  CAPACITY = "no capacity"
  QUOTA = "quota"
  EXISTS = "exists already"
  PERMISSION = "permission"
  ARGUMENT = "wrong argument"
  NOT_FOUND = "not found"
  TIMEOUT = "time limit"
  OTHER = "failed"


# Looked for in this order in what gcloud writes to stderr: "not found" may stand beside a word that
# says more.
_WORDS = {
  Cause.PERMISSION: "PERMISSION_DENIED|permission|not have .*access|not authorized|auth login",
  Cause.CAPACITY: "no more capacity|insufficient (reserved )?capacity|stockout|"
  "RESOURCE_POOL_EXHAUSTED|not have enough resources",
  Cause.QUOTA: "quota|RESOURCE_EXHAUSTED|rate limit",
  Cause.EXISTS: "ALREADY_EXISTS|already exists",
  Cause.ARGUMENT: "INVALID_ARGUMENT|unrecognized argument|invalid (value|choice)|argument --",
  Cause.NOT_FOUND: "NOT_FOUND|not found",
}
_TIMEOUT = 300.0
# What may be different a minute later.
PASSING = frozenset({Cause.CAPACITY, Cause.QUOTA})


def cause(stderr: str) -> Cause:
  """What the words of an error say."""
  for found, words in _WORDS.items():
    if re.search(words, stderr, re.IGNORECASE):
      return found
  return Cause.OTHER


class GcloudError(Exception):
  """A call that failed. `cause` says why, the text is what it wrote of that to stderr."""

  def __init__(self, text: str, why: Cause) -> None:
    super().__init__(text)
    self.cause = why


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a TPU is; `project` may be empty, then gcloud's own configuration says."""

  zone: str
  project: str

  def flags(self) -> list[str]:
    return [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])


@dataclasses.dataclass(frozen=True)
class Gcloud:
  """How commands of this user are run.

  Attributes:
    place: zone and project of every call.
    timeout: seconds that a call may take; None: 300, or what the call itself asks for.
    dry_run: note commands in `planned` and run none.
    internal_ip: reach workers by their address inside the network, for those without another.
    planned: the commands that a dry run would have run.
  """

  place: Place
  timeout: float | None = None
  dry_run: bool = False
  internal_ip: bool = False
  planned: list[list[str]] = dataclasses.field(default_factory=list)

  def tpus(self, *arguments: str, timeout: float | None = None) -> str:
    """`gcloud compute tpus ...` in this place; what it printed. Raises GcloudError."""
    command = ["gcloud", "compute", "tpus", *arguments, *self.place.flags(), "--quiet"]
    return self._run(command, timeout)

  def ssh(
    self, name: str, worker: int, command: Sequence[str], timeout: float | None = None
  ) -> str:
    """Runs a command on one worker; each of its arguments arrives there as it is.

    Host keys are gcloud's: a worker's key is noted at the first contact, another is refused.
    """
    wanted = f"--command={remote(command)}"
    return self.tpus("tpu-vm", "ssh", name, *self._worker(worker), wanted, timeout=timeout)

  def scp(
    self, sources: Sequence[str], target: str, worker: int, timeout: float | None = None
  ) -> str:
    """Copies files; NAME:PATH is a path in the home folder of a worker."""
    return self.tpus("tpu-vm", "scp", *sources, target, *self._worker(worker), timeout=timeout)

  def shell(self, name: str, worker: int) -> int:
    """Gives the terminal to a shell on a worker; its exit code."""
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *self._worker(worker)]
    command += self.place.flags()
    if self.dry_run:
      self._run(command, None)
      return 0
    try:
      return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
      raise _missing() from None

  def describe(self, name: str) -> dict[str, Any]:
    """What the cloud knows about a TPU; {} in a dry run."""
    return self.json("tpu-vm", "describe", name) or {}

  def json(self, *arguments: str) -> Any:
    """An answer as JSON; None in a dry run."""
    text = self.tpus(*arguments, "--format=json")
    if self.dry_run:
      return None
    try:
      return json.loads(text)
    except ValueError:
      raise GcloudError(
        f"gcloud {' '.join(arguments[:2])} answered {text[:60]!r}; expected JSON", Cause.OTHER
      ) from None

  def _worker(self, worker: int) -> list[str]:
    return [f"--worker={worker}"] + (["--internal-ip"] if self.internal_ip else [])

  def _run(self, command: list[str], timeout: float | None) -> str:
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
      raise _missing() from None
    except subprocess.TimeoutExpired:
      raise GcloudError(f"no answer within {limit:g} s", Cause.TIMEOUT) from None
    if done.returncode:
      words = said(done.stderr) or f"exit code {done.returncode}, without a word"
      raise GcloudError(words, cause(done.stderr))
    return done.stdout


def remote(command: Sequence[str]) -> str:
  """A command as one line for the shell of a worker, every argument quoted."""
  return shlex.join(command)


def said(text: str) -> str:
  """The reason in what was written to stderr, as one printable line of at most 400 letters.

  That is gcloud's ERROR with the lines that explain it, otherwise the last line.
  """
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # Behind what ssh says gcloud writes that the command failed.
  telling = [line for line in lines if not re.match(r"#####|ERROR: .* exited with return", line)]
  lines = telling or lines
  start = max((n for n, line in enumerate(lines) if line.startswith("ERROR:")), default=-1)
  return "".join(c for c in " ".join(lines[start:]) if c.isprintable())[:400]


def _missing() -> ValueError:
  return ValueError(
    "gcloud was not found on PATH; install the Google Cloud CLI (https://cloud.google.com/sdk) "
    "and run: gcloud auth login"
  )
