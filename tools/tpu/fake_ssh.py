"""Fake ssh for tests that runs commands on this machine, and a checkout for its hosts.

`install` creates FOLDER/bin/ssh; put FOLDER/bin first on PATH. Commands run in a new session, as
under an ssh server: a command outlives a killed ssh, and only its standard input is closed.
FOLDER/ssh-HOST contains the process id of the newest ssh. If the file FOLDER/OFF-HOST exists, the
host is unreachable.
"""

import os
from pathlib import Path
import shlex
import subprocess
import sys
import threading


def install(folder: Path, *python: str) -> Path:
  """Create FOLDER/bin/ssh and return a checkout whose Python is this interpreter."""
  _program(folder / "bin/ssh", sys.executable, str(Path(__file__).absolute()), str(folder))
  _program(folder / "venv/bin/python3", *python)
  checkout = folder / "checkout"
  (checkout / "packages/ov-data").mkdir(parents=True)
  environment = checkout / "tools/python/environment.py"
  environment.parent.mkdir(parents=True)
  environment.write_text(f"print({str(folder / 'venv')!r})\n")
  return checkout


def _program(path: Path, *command: str) -> None:
  path.parent.mkdir(parents=True)
  path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
  path.chmod(0o755)


def main(folder: Path, arguments: list[str]) -> int:
  """Act as ssh and ignore all options."""
  host, command = arguments[arguments.index("--") + 1 :]
  if (folder / f"OFF-{host}").exists():
    print("ssh: no route to host", file=sys.stderr)
    return 255
  far = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, start_new_session=True)
  (folder / f"ssh-{host}").write_text(str(os.getpid()))
  threading.Thread(target=_relay, args=[far], daemon=True).start()
  code = far.wait()
  return code if code >= 0 else 255


def _relay(far: "subprocess.Popen[bytes]") -> None:
  assert far.stdin
  try:
    while data := os.read(0, 4096):
      far.stdin.write(data)
      far.stdin.flush()
    far.stdin.close()
  except BrokenPipeError:
    pass  # the command has ended


if __name__ == "__main__":
  ended = main(Path(sys.argv[1]), sys.argv[2:])
  sys.stderr.flush()
  os._exit(ended)  # do not wait for the thread, which may block on a read
