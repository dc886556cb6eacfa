"""Run scripts of another Python environment in forks of a process that has imported their modules.

Importing PyTorch, timm or transformers takes 5 to 20 seconds, which a test would pay for each
script. `serving` yields an executable that tests use instead of the interpreter. It sends the path
of a script to the server. The server imports the modules that the script imports at its top, and
runs it in a fork. Other command lines, such as `-c PROGRAM`, run in the interpreter itself.

This file also runs in the other environment, so it requires only the standard library.
"""

import ast
from collections.abc import Iterator
import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from typing import Any

_STREAMS = (0, 1, 2)
_LENGTH = 8  # bytes of the length of a request
# Modules that torch.onnx.export imports when it is called.
_LATE = {"write_onnx.py": ("networkx", "onnxscript", "sympy")}


@contextlib.contextmanager
def serving(python: str) -> Iterator[str]:
  """Yield the path of an executable that runs scripts like `python`.

  Args:
    python: interpreter of the other environment.
  """
  with tempfile.TemporaryDirectory(prefix="ov") as folder:
    address = os.path.join(folder, "socket")
    executable = pathlib.Path(folder, "python")
    here = str(pathlib.Path(__file__).absolute().parent)
    executable.write_text(
      f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {here!r})\nimport fork_server\n"
      f"fork_server.request({address!r}, {python!r})\n"
    )
    executable.chmod(0o700)
    with contextlib.ExitStack() as stack:
      listener = stack.enter_context(socket.socket(socket.AF_UNIX))
      listener.bind(address)
      listener.listen()
      kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
      server = subprocess.Popen(
        [python, __file__, str(listener.fileno())],
        env={
          **kept,
          "HF_HUB_OFFLINE": "1",
          "PYTHONDONTWRITEBYTECODE": "1",
          "PYTHONWARNINGS": "ignore",
        },
        pass_fds=[listener.fileno()],
      )
      stack.callback(server.wait)
      stack.callback(server.kill)
      yield str(executable)


def request(address: str, python: str) -> None:
  """Run the command line of this process in a fork of the server, and exit like it.

  Args:
    address: socket of the server.
    python: interpreter that runs command lines without a script.
  """
  if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv(python, [python, *sys.argv[1:]])
  about = {"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
  content = json.dumps(about).encode()
  with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    socket.send_fds(connection, [len(content).to_bytes(_LENGTH, "big")], _STREAMS)
    connection.sendall(content)
    answer = connection.makefile("rb").read()
  code = int(answer or 1)
  if code < 0:
    os.kill(os.getpid(), -code)
  sys.exit(code)


def _serve(listener: socket.socket) -> None:
  """Answer requests until this process is killed."""
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
  while True:
    connection, _ = listener.accept()
    length, streams, _, _ = socket.recv_fds(connection, _LENGTH, len(_STREAMS))
    with connection.makefile("rb") as stream:
      about = json.loads(stream.read(int.from_bytes(length, "big")))
    _import_modules(about["argv"][0])
    if os.fork() == 0:
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      listener.close()
      _answer(connection, streams, about)
    for descriptor in streams:
      os.close(descriptor)
    connection.close()


def _import_modules(script: str) -> None:
  """Import the installed modules that a script imports at its top, and those of `_LATE`."""
  path = pathlib.Path(script)
  names = list(_LATE.get(path.name, ()))
  for node in ast.parse(path.read_bytes()).body:
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.append(node.module)
  for name in names:
    # Modules of the script's folder are imported in the fork.
    with contextlib.suppress(ImportError):
      importlib.import_module(name)


def _answer(connection: socket.socket, streams: list[int], about: dict[str, Any]) -> None:
  """Run the script in a child of this fork, send its exit code, and exit."""
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)
  connection.close()
  for target, descriptor in zip(_STREAMS, streams, strict=True):
    os.dup2(descriptor, target)
    os.close(descriptor)
  os.chdir(about["cwd"])
  os.environ.clear()
  os.environ.update(about["environment"])
  tempfile.tempdir = None
  script, *_ = sys.argv = about["argv"]
  sys.path.insert(0, str(pathlib.Path(script).absolute().parent))
  code = 1
  try:
    runpy.run_path(script, run_name="__main__")
    code = 0
  except SystemExit as ended:
    code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if isinstance(ended.code, str):
      print(ended.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the destructors of C++ libraries, which join threads of the server


if __name__ == "__main__":
  del sys.path[0]  # the folder of this file
  _serve(socket.socket(fileno=int(sys.argv[1])))
