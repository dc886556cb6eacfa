"""TPUs come and go: create with patience, list, delete."""

from collections.abc import Callable, Iterator
import dataclasses
import random
import time
from typing import Any

from tools.tpu.gcloud import PASSING, Cause, Gcloud, GcloudError
from tools.tpu.names import Topology
from tools.tpu.output import Result

_CREATE_SECONDS = 1800.0  # a large slice takes its time
_WAITING = ("ACCEPTED", "CREATING", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED")


@dataclasses.dataclass(frozen=True)
class Patience:
  """How often to try, and how long to wait between: twice as long each time, up to a cap.

  Attributes:
    attempts: tries, and questions to a queue, in all.
    first: seconds before the second.
    cap: seconds at most.
    draw: a number from 0 to 1 for each pause, which is taken from the upper half: many who wait do
      not come at once.
    sleep: waits.
  """

  attempts: int
  first: float = 15.0
  cap: float = 600.0
  draw: Callable[[], float] = random.random
  sleep: Callable[[float], None] = time.sleep

  def tries(self) -> Iterator[int]:
    """1, 2, ... with a pause before each but the first."""
    for number in range(self.attempts):
      if number:
        pause = min(self.cap, self.first * 2 ** (number - 1))
        self.sleep(pause * (0.5 + 0.5 * self.draw()))
      yield number + 1


@dataclasses.dataclass(frozen=True)
class Wish:
  """What to create."""

  name: str
  topology: Topology
  version: str
  spot: bool
  queued: bool

  def request(self) -> list[str]:
    spot = ["--spot"] if self.spot else []
    kind = f"--accelerator-type={self.topology.name}"
    if self.queued:
      version = f"--runtime-version={self.version}"
      node = f"--node-id={self.name}"
      return ["queued-resources", "create", self.name, node, kind, version, *spot]
    return ["tpu-vm", "create", self.name, kind, f"--version={self.version}", *spot]


def create(gcloud: Gcloud, wish: Wish, patience: Patience, say: Callable[[str], None]) -> Result:
  """Asks until it is there, `patience` ends, or the answer would be the same next time.

  Raises:
    ValueError: what asking again does not help, or the last answer after all attempts.
  """
  attempt = 0
  for attempt in patience.tries():
    try:
      gcloud.tpus(*wish.request(), timeout=_CREATE_SECONDS)
      break
    except GcloudError as error:
      if error.cause not in PASSING or attempt == patience.attempts:
        raise ValueError(_advice(wish, error, attempt)) from error
      say(f"attempt {attempt} of {patience.attempts}: {error.cause.value}: {error}")
  if wish.queued:
    _wait_in_queue(gcloud, wish, patience, say)
  row = {
    "name": wish.name,
    "topology": wish.topology.name,
    "chips": wish.topology.chips,
    "hosts": wish.topology.hosts,
    "attempts": attempt,
  }
  return Result([row], f"{wish.name} is there: {wish.topology}")


def _wait_in_queue(
  gcloud: Gcloud, wish: Wish, patience: Patience, say: Callable[[str], None]
) -> None:
  for number in patience.tries():
    found = gcloud.json("queued-resources", "describe", wish.name)
    state = "ACTIVE" if gcloud.dry_run else _queue_state(found)
    if state == "ACTIVE":
      return
    if state not in _WAITING:
      raise ValueError(
        f"the request {wish.name} is {state}; "
        f"expected ACTIVE: delete it (tpu delete --queued --name={wish.name}) and create it again"
      )
    say(f"question {number} of {patience.attempts}: {state}")
  raise ValueError(
    f"the request {wish.name} still waits after {patience.attempts} questions; it keeps its place: "
    "ask again with tpu list, or raise --attempts"
  )


def _advice(wish: Wish, error: GcloudError, attempts: int) -> str:
  queued = " --queued" if wish.queued else ""
  advice = {
    Cause.CAPACITY: "try later, another zone, or --queued",
    Cause.QUOTA: "raise the quota, or take a smaller --topology",
    Cause.EXISTS: f"choose another --name, or first: tpu delete{queued} --name={wish.name}",
    Cause.PERMISSION: "see gcloud auth list, and the roles in --project",
    Cause.ARGUMENT: "see --topology, --zone and --version",
    Cause.TIMEOUT: "it may still come: see tpu list before you try again",
  }.get(error.cause, "see tpu list before you try again")
  tries = "" if attempts == 1 else f" after {attempts} attempts"
  return f"{wish.name} was not created{tries}: {error.cause.value}: {error}; {advice}"


def list_all(gcloud: Gcloud) -> Result:
  """The TPUs of a zone, and the requests that wait for one."""
  rows = []
  for node in gcloud.json("tpu-vm", "list") or []:
    rows.append(
      {
        "name": _last(node.get("name")),
        "topology": str(node.get("acceleratorType", "?")),
        "state": str(node.get("state", "?")),
        "workers": len(node.get("networkEndpoints") or ()),
        "kind": "spot" if (node.get("schedulingConfig") or {}).get("spot") else "on demand",
      }
    )
  present = {row["name"] for row in rows}
  for request in gcloud.json("queued-resources", "list") or []:
    name, state = _last(request.get("name")), _queue_state(request)
    if name not in present or state != "ACTIVE":
      spec = ((request.get("tpu") or {}).get("nodeSpec") or [{}])[0]
      kind = str((spec.get("node") or {}).get("acceleratorType", "?"))
      rows.append({"name": name, "topology": kind, "state": state, "workers": 0, "kind": "queued"})
  return Result(rows, "" if rows else f"no TPUs in {gcloud.place.zone}")


def delete(gcloud: Gcloud, name: str, queued: bool) -> Result:
  """Ends a TPU and its cost; with `queued` also the request that it came from."""
  try:
    if queued:
      gcloud.tpus("queued-resources", "delete", name, "--force", timeout=_CREATE_SECONDS)
    else:
      gcloud.tpus("tpu-vm", "delete", name, timeout=_CREATE_SECONDS)
  except GcloudError as error:
    raise ValueError(
      f"{name} was not deleted: {error.cause.value}: {error}; see tpu list"
    ) from None
  return Result([{"name": name}], f"{name} is deleted")


def _queue_state(request: Any) -> str:
  return str((request.get("state") or {}).get("state", "STATE_UNSPECIFIED"))


def _last(name: Any) -> str:
  return str(name or "?").rpartition("/")[2]
