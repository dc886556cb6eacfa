"""One TPU and its workers: the same call on each, every answer and every failure by its worker."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
from typing import Any, TypeVar

from tools.tpu.gcloud import Cause, Gcloud, GcloudError, said
from tools.tpu.names import Topology

_T = TypeVar("_T")
# Copied to the home folder of every worker; the path is relative to it.
PROGRAM = "ov-worker.pyz"
_PARALLEL = 16  # each call is a process of gcloud and a connection


@dataclasses.dataclass(frozen=True)
class Fleet:
  """The workers of a TPU that a command is for.

  Attributes:
    gcloud: how to reach them.
    name: of the TPU.
    workers: their numbers.
    topology: of the TPU.
  """

  gcloud: Gcloud
  name: str
  workers: tuple[int, ...]
  topology: Topology

  @property
  def whole(self) -> bool:
    """Whether no worker is left out."""
    return len(self.workers) == self.topology.hosts

  def each(self, call: Callable[[int], _T]) -> dict[int, "_T | GcloudError"]:
    """Calls for every worker; the answer or the failure of each.

    The first goes ahead alone, so that gcloud makes its key once and not in a race.
    """

    def guarded(worker: int) -> "_T | GcloudError":
      try:
        return call(worker)
      except GcloudError as error:
        return error

    if self.gcloud.dry_run:  # in order, so that two dry runs print the same
      return {worker: guarded(worker) for worker in self.workers}
    answers = {worker: guarded(worker) for worker in self.workers[:1]}
    rest = self.workers[1:]
    with ThreadPoolExecutor(_PARALLEL) as pool:
      return answers | dict(zip(rest, pool.map(guarded, rest), strict=True))

  def ask(
    self, verb: str, *arguments: str, timeout: float | None = None
  ) -> dict[int, "dict[str, Any] | GcloudError"]:
    """Runs a verb of the workers' program everywhere; its JSON, or why there is none."""
    command = ["python3", PROGRAM, verb, *arguments]

    def call(worker: int) -> dict[str, Any]:
      try:
        text = self.gcloud.ssh(self.name, worker, command, timeout)
      except GcloudError as error:
        if "can't open file" in str(error):  # Python's words; the name may be cut off
          raise GcloudError(f"{PROGRAM} is not there; first run: tpu sync", Cause.OTHER) from None
        raise
      return {} if self.gcloud.dry_run else _answer(text)

    return self.each(call)

  def send(
    self, sources: Sequence[str], target: str = "", timeout: float | None = None
  ) -> dict[int, "str | GcloudError"]:
    """Copies files to every worker's home folder."""
    place = f"{self.name}:{target}"
    return self.each(lambda worker: self.gcloud.scp(sources, place, worker, timeout))


def open_fleet(gcloud: Gcloud, name: str, worker: str, topology: str) -> Fleet:
  """Finds out about a TPU; a dry run asks nobody, and believes `topology` or takes one worker.

  Args:
    gcloud: to ask.
    name: of the TPU.
    worker: `all` or a number.
    topology: what the user says it is, or "".

  Raises:
    ValueError: what the user said and what there is disagree, or the TPU is not ready.
    GcloudError: the cloud does not answer.
  """
  if gcloud.dry_run and not topology:  # the first worker for all, or the one that is named
    topology = "v4-8" if worker == "all" else "v4-4096"
  try:
    found = gcloud.describe(name)
  except GcloudError as error:
    if error.cause is Cause.NOT_FOUND:
      zone = gcloud.place.zone
      raise ValueError(f"there is no TPU {name!r} in {zone}; `tpu list` shows them") from None
    raise
  real = str(found.get("acceleratorType") or topology)
  if topology and topology != real:
    raise ValueError(f"--topology={topology}, but {name} is a {real}; leave the flag out")
  state = found.get("state", "READY")
  if state != "READY":
    raise ValueError(f"TPU {name} is {state}; expected READY: wait, or delete and create it again")
  shape = Topology.parse(real)
  hosts = len(found.get("networkEndpoints") or ()) or shape.hosts
  if hosts != shape.hosts:
    raise ValueError(f"TPU {name} has {hosts} workers; a {real} has {shape.hosts}")
  return Fleet(gcloud, name, _workers(worker, hosts), shape)


def _workers(value: str, hosts: int) -> tuple[int, ...]:
  if value == "all":
    return tuple(range(hosts))
  if not (value.isascii() and value.isdecimal() and int(value) < hosts):
    raise ValueError(f"--worker={value!r}; expected all, or a number from 0 to {hosts - 1}")
  return (int(value),)


def _answer(text: str) -> dict[str, Any]:
  """The last line that is an object: a login may greet before it."""
  for line in reversed(text.splitlines()):
    if line.startswith("{"):
      try:
        found = json.loads(line)
      except ValueError:
        break
      if "error" in found:
        raise GcloudError(said(found["error"]), Cause.OTHER)
      return found
  raise GcloudError(f"answered {text[-80:]!r}; expected a line of JSON", Cause.OTHER)
