"""Job description, and the program that runs a job on hosts connected by ssh."""

from collections.abc import Sequence
import dataclasses
import inspect
from pathlib import Path

from tools.tpu import names, ssh_program

# The first platform is required: without it, an app fails instead of using the CPU.
PLATFORMS = {"cuda": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}
_LONGEST_NAME = 40  # pod names append to it, up to 63 characters in total
HEAD = f"#!/usr/bin/env python3\n{inspect.getsource(ssh_program)}"


@dataclasses.dataclass(frozen=True)
class Job:
  """An app to run."""

  name: str
  app: str  # module in apps
  config: str  # value of --config
  workdir: str  # gs://BUCKET/PATH, or a folder shared by all machines
  arguments: tuple[str, ...]  # additional arguments of the app
  grace: int  # seconds between SIGTERM and SIGKILL; must suffice for a checkpoint
  restarts: int  # maximum number of restarts after failures

  def __post_init__(self) -> None:
    names.check("name", self.name)
    if (length := len(self.name)) > _LONGEST_NAME:
      raise ValueError(f"--name={self.name} has {length} letters; expected at most {_LONGEST_NAME}")
    if missing := [flag for flag in ("config", "workdir") if not getattr(self, flag)]:
      raise ValueError(f"--{missing[0]} is missing; the app needs it")
    if "://" in self.workdir:
      names.check("workdir", self.workdir)
    for value in (self.config, self.workdir, *self.arguments):
      if not value.isprintable():
        raise ValueError(f"{value!r}: expected printable characters in one line")

  def command(self) -> list[str]:
    """Return the Python arguments that run the app."""
    own = [f"--config={self.config}", f"--workdir={self.workdir}"]
    return ["-m", f"apps.{self.app}", *own, *self.arguments]


def hosts_of(listed: str, file: str) -> list[str]:
  """Return the hosts of --hosts=A,B or --hosts_file, which has one per line and # comments."""
  if bool(listed) == bool(file):
    raise ValueError("give --hosts=A,B,user@C or --hosts_file=FILE, and not both")
  flag, found = "hosts", listed.split(",")
  if file:
    flag = "hosts_file"
    try:
      lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      reason = error.strerror if isinstance(error, OSError) else error
      expected = "expected a text file in UTF-8, a host a line"
      raise ValueError(f"--hosts_file={file}: {reason}; {expected}") from error
    found = [host for line in lines if (host := line.partition("#")[0].strip())]
    if not found:
      raise ValueError(f"--hosts_file={file} contains no host; expected a host a line")
  for host in found:
    names.check("hosts", host, flag)
  if twice := [host for host in found if found.count(host) > 1]:
    raise ValueError(f"--{flag} has {twice[0]} twice; expected each host once")
  return found


def ssh_script(
  job: Job, hosts: Sequence[str], coordinator: str, port: int, checkout: str, extras: str
) -> str:
  """Return a program that runs a job on hosts connected by ssh.

  Args:
    job: the job to run.
    hosts: host names; the first host is the coordinator.
    coordinator: address of the coordinator for the other hosts; "" uses its host name.
    port: port of the coordinator.
    checkout: absolute path of the repository, the same on all hosts.
    extras: a key of `PLATFORMS`.
  """
  address = names.check("coordinator", coordinator or hosts[0].rpartition("@")[2])
  locks = ["requirements.lock"] + ([] if extras == "cpu" else [f"requirements-{extras}.lock"])
  settings = {
    "job": job.name,
    "hosts": list(hosts),
    "coordinator": f"{address}:{port}",
    "checkout": names.check("checkout", checkout),
    "locks": " ".join(f"tools/python/{lock}" for lock in locks),
    "platforms": PLATFORMS[extras],
    "arguments": job.command(),
    "grace": job.grace,
    "restarts": job.restarts,
  }
  given = "".join(f"      {name}={value!r},\n" for name, value in settings.items())
  call = f"  raise SystemExit(\n    run(\n{given}    )\n  )\n"
  return f'{HEAD}\n\nif __name__ == "__main__":\n{call}'
