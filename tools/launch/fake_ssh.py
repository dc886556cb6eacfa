"""An ssh for tests, whose hosts are this machine, and a checkout for them.

`install` makes FOLDER/bin/ssh, which is found where FOLDER/bin is the first of PATH. A command runs
in a session of its own, as under a server: it outlives an ssh that is killed, and then only its
standard input ends. FOLDER/ssh-HOST holds the id of the newest ssh; where there is a file
FOLDER/OFF-HOST, no way leads to the host.
"""

import os
from pathlib import Path
import shlex
import subprocess
import sys
import threading


def install(folder: Path, *python: str) -> Path:
  """Makes FOLDER/bin/ssh, and returns a checkout whose environment's Python is this command."""
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
  """What ssh does; its options are ignored."""
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
  os._exit(ended)  # not waiting for the thread, which may read for ever
