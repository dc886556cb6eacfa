"""A script for hosts that only ssh joins: a process on each, watched, begun again together."""

from collections.abc import Sequence
import inspect
import os
import re

from tools.launch import ssh_program
from tools.launch.job import Job, shared_workdir

# The first platform must be there: without it the app ends, and does not go on on the CPU.
_PLATFORMS = {"cuda": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}
EXTRAS = tuple(_PLATFORMS)
# No dash in front, which would be an option of ssh.
_ADDRESS = r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"
_HOST = re.compile(rf"([A-Za-z_][-._A-Za-z0-9]*@)?{_ADDRESS}")
HEAD = f"#!/usr/bin/env python3\n{inspect.getsource(ssh_program)}"


def hosts_of(listed: str, file: str) -> list[str]:
  """The hosts of --hosts=A,B or of --hosts_file: one a line, comments behind #."""
  if bool(listed) == bool(file):
    raise ValueError("give --hosts=A,B,user@C or --hosts_file=FILE, one of them")
  if file:
    try:
      with open(os.path.expanduser(file), encoding="utf-8-sig") as lines:
        found = [line.partition("#")[0].strip() for line in lines]
    except OSError as error:
      raise ValueError(
        f"--hosts_file={file}: {error.strerror}; expected a text file, a host a line"
      ) from error
    except UnicodeDecodeError as error:
      raise ValueError(
        f"--hosts_file={file}: {error}; expected a text file in UTF-8, a host a line"
      ) from error
    found = [host for host in found if host]
  else:
    found = listed.split(",")
  flag = "--hosts_file" if file else "--hosts"
  for host in found:
    if not _HOST.fullmatch(host):
      raise ValueError(f"{flag}: {host!r}; expected HOST or USER@HOST, as ssh takes them")
  if not found:
    raise ValueError(f"{flag}={file}: names no host")
  twice = [host for host in dict.fromkeys(found) if found.count(host) > 1]
  if twice:
    raise ValueError(f"{flag}: {twice[0]} stands there twice; a host runs one process")
  return found


def script(
  job: Job, hosts: Sequence[str], coordinator: str, port: int, checkout: str, extras: str
) -> str:
  """The script as text.

  Args:
    job: its workdir is a folder that all hosts see, or a bucket's.
    hosts: the first is where the processes meet.
    coordinator: the first host's address for the others; "" is its name in `hosts`.
    port: at which they meet.
    checkout: absolute path of the repository, the same on all hosts.
    extras: one of `EXTRAS`, what the environment on the hosts is for.
  """
  address = coordinator or hosts[0].rpartition("@")[2]
  if not re.fullmatch(_ADDRESS, address):
    raise ValueError(f"--coordinator={coordinator!r}; expected the address of the first host")
  if not checkout.startswith("/") or not checkout.isprintable():
    raise ValueError(f"--checkout={checkout!r}; expected an absolute path, the same on all hosts")
  locks = ["requirements.lock"] + ([] if extras == "cpu" else [f"requirements-{extras}.lock"])
  _, *arguments = job.command("python3", shared_workdir(job.workdir))
  settings = {
    "job": job.name,
    "hosts": list(hosts),
    "coordinator": f"{address}:{port}",
    "checkout": checkout,
    "locks": " ".join(f"tools/python/{lock}" for lock in locks),
    "platforms": _PLATFORMS[extras],
    "arguments": arguments,
    "grace": job.grace,
    "restarts": job.restarts,
  }
  given = "".join(f"      {name}={value!r},\n" for name, value in settings.items())
  call = f"  raise SystemExit(\n    run(\n{given}    )\n  )\n"
  return f'{HEAD}\n\nif __name__ == "__main__":\n{call}'
