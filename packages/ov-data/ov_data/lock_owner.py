"""Identity of the process that holds a lock, and detection of its end."""

import dataclasses
import datetime
import json
import os
from pathlib import Path
import socket
import uuid

# Set by schedulers, constant across the attempts of a job. OV_JOB_ID is for custom launchers.
_JOB_VARIABLES = (
  "OV_JOB_ID", "SLURM_JOB_ID", "CLOUD_ML_JOB_ID", "PBS_JOBID", "LSB_JOBID", "AWS_BATCH_JOB_ID",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Owner:
  """The process that holds a lock.

  Attributes:
    host: host name, for messages.
    pid: process id.
    machine: id of the boot and the PID namespace in which `pid` is valid.
    started: start time of the process in clock ticks since boot; detects reused process ids.
    job: job id, see `job_id`; "" without one.
    since: time when the lock was taken, ISO 8601 in UTC.
    token: unique id of this owner.
    renewals: number of renewals of a lease.
  """

  host: str
  pid: int
  machine: str
  started: str
  job: str
  since: str
  token: str
  renewals: int = 0

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host} (since {self.since})"


def this_process() -> Owner:
  """Return an owner for this process, with a new token."""
  now = datetime.datetime.now(datetime.UTC)
  return Owner(
    host=socket.gethostname(),
    pid=os.getpid(),
    machine=_machine(),
    started=_started(os.getpid()) or "",
    job=job_id(),
    since=now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    token=uuid.uuid4().hex,
  )


def job_id() -> str:
  """Return the scheduler's id of the job of this process; "" without one."""
  for name in _JOB_VARIABLES:
    if value := os.environ.get(name):
      return f"{name}={value}"
  return ""


def has_ended(owner: Owner, me: Owner) -> bool | None:
  """Return whether the process of an owner has ended; None if that is unknown from here."""
  if owner.machine == me.machine:
    return _started(owner.pid) != owner.started
  if owner.job and owner.job == me.job:
    return True
  return None


def _machine() -> str:
  """Return an id of the boot of this machine and the PID namespace of this process."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
  except OSError:  # not Linux
    return f"{socket.gethostname()}:{uuid.getnode():x}"


def _started(pid: int) -> str | None:
  """Return the start time of a process; "" if unknown, None if it has ended."""
  try:
    # The program name, in parentheses, may contain spaces.
    state, *fields = (
      Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    )
    return None if state in "ZX" else fields[18]
  except FileNotFoundError:
    if os.path.exists("/proc/self/stat"):
      return None
  except OSError:  # it ended during the read
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return ""


def parse(data: bytes) -> Owner | None:
  """Return the owner in a record; None for an incomplete or foreign one."""
  try:
    owner = Owner(**json.loads(data))
  except (ValueError, TypeError, RecursionError):
    return None
  right = all(type(getattr(owner, f.name)) is f.type for f in dataclasses.fields(Owner))
  return owner if right else None


def to_bytes(owner: Owner) -> bytes:
  """Return the record to be read by `parse`."""
  return json.dumps(dataclasses.asdict(owner), indent=1).encode() + b"\n"
