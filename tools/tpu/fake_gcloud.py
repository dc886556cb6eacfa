"""Fake gcloud for tests: records its arguments and returns configured answers.

`install` creates the program. Each worker is a folder, and `ssh --command` runs the command in a
real shell with that folder as its home. A rule changes one answer:

  {"match": ["ssh", "--worker=1"], "times": 1, "sleep": 0, "code": 1, "stdout": "", "stderr": ""}
"""

from collections.abc import Sequence
import fcntl
import json
import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any


def install(folder: Path, hosts: int = 2, kind: str = "v4-16") -> None:
  """Create FOLDER/bin/gcloud, and the homes of the workers, FOLDER/worker-N."""
  script(folder / "bin/gcloud", sys.executable, str(Path(__file__).absolute()), str(folder))
  for name in ("python3", "python3.12"):  # interpreter of the workers: the one of the test
    script(folder / "worker-bin" / name, sys.executable)
  for number in range(hosts):
    (folder / f"worker-{number}").mkdir()
  node = {
    "name": "projects/p/locations/z/nodes/pod",
    "acceleratorType": kind,
    "state": "READY",
    "networkEndpoints": [{}] * hosts,
  }
  (folder / "node.json").write_text(json.dumps(node))
  (folder / "rules.json").write_text("[]")
  (folder / "calls.jsonl").touch()


def script(path: Path, *command: str) -> None:
  """Create a program that runs a command and appends its own arguments."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
  path.chmod(0o755)


def rules(folder: Path, *changes: dict[str, Any]) -> None:
  """Set the rules; the first rule that matches and is not used up applies."""
  (folder / "rules.json").write_text(json.dumps(changes))


def calls(folder: Path) -> list[list[str]]:
  """Return the arguments of all calls, ordered by start time."""
  return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def main(folder: Path, arguments: Sequence[str]) -> int:
  if rule := _note(folder, arguments):
    time.sleep(rule.get("sleep", 0))
    print(rule.get("stdout", ""), end="")
    print(rule.get("stderr", ""), end="", file=sys.stderr)
    if "code" in rule:
      return rule["code"]
  verb = arguments[3] if arguments[:2] == ["compute", "tpus"] else ""
  if verb == "describe":
    print((folder / "node.json").read_text())
  elif verb == "list":
    print("[]")
  elif verb == "ssh":
    return _ssh(folder / f"worker-{_flag(arguments, 'worker')}", _flag(arguments, "command"))
  elif verb == "scp":
    _scp(folder / f"worker-{_flag(arguments, 'worker')}", arguments[4:])
  return 0


def _note(folder: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
  """Record the call and find the rule for it."""
  with open(folder / "calls.jsonl", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(list(arguments)) + "\n")
    changes = json.loads((folder / "rules.json").read_text())
    for rule in changes:
      if rule.get("times", 1) > 0 and set(rule["match"]) <= set(arguments):
        if "times" in rule:
          rule["times"] -= 1
          (folder / "rules.json").write_text(json.dumps(changes))
        return rule
  return None


def _ssh(home: Path, command: str) -> int:
  path = os.pathsep.join([str(home.parent / "worker-bin"), os.environ["PATH"]])
  env = {"HOME": str(home), "PATH": path}
  return subprocess.run(["/bin/sh", "-c", command], cwd=home, env=env, check=False).returncode


def _scp(home: Path, arguments: Sequence[str]) -> None:
  *sources, target = [argument for argument in arguments if not argument.startswith("--")]
  for source in sources:
    shutil.copy(_place(home, source), _place(home, target))


def _place(home: Path, path: str) -> Path:
  name, colon, inside = path.partition(":")
  return home / inside if colon else Path(name)


def _flag(arguments: Sequence[str], name: str) -> str:
  found = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
  return found[0]


if __name__ == "__main__":
  sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
