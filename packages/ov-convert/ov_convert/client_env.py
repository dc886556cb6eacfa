"""Runs the scripts of `clients/` with the interpreter of an environment that has the libraries.

PyTorch and the libraries that load exported weights live in an environment of their own, so that
nobody who trains has to install them. `$OV_CLIENTS_PYTHON` names its interpreter; without it, Bazel
does for targets with `clients = True`.
"""

from collections.abc import Sequence
import os
import pathlib
import subprocess

SCRIPTS = pathlib.Path(__file__).parent / "clients"


class ClientError(RuntimeError):
  """A script ended with an error; the message has its last lines."""


def find_python() -> pathlib.Path:
  """The interpreter of the clients' environment.

  Raises:
    FileNotFoundError: nothing names one, or it is not there.
  """
  named = os.environ.get("OV_CLIENTS_PYTHON") or _named_by_bazel(pathlib.Path(__file__))
  if not named:
    raise FileNotFoundError(
      "no environment with PyTorch and its libraries is named: set OV_CLIENTS_PYTHON to the python "
      "of one that has what tools/python/requirements-clients.in lists; bazel run sets it by itself"
    )
  if not pathlib.Path(named).exists():
    raise FileNotFoundError(f"OV_CLIENTS_PYTHON={named}: there is no such file")
  return pathlib.Path(named)


def _named_by_bazel(here: pathlib.Path) -> str:
  """What clients/interpreter.txt says in the runfiles that `here` belongs to; "" without it."""
  for folder in here.absolute().parents:
    file = folder / "clients" / "interpreter.txt"
    if folder.name.endswith(".runfiles") and file.exists():
      return file.read_text().strip()
  return ""


def run_client(
  script: str,
  arguments: Sequence[str | os.PathLike[str]],
  *,
  python: str | os.PathLike[str] | None = None,
  timeout: float = 1800,
) -> str:
  """Runs `clients/<script>` with `arguments`, offline; returns what it printed.

  Args:
    script: file name, e.g. "run_timm.py".
    arguments: its command line.
    python: interpreter; `find_python()` by default.
    timeout: seconds after which it is stopped.

  Raises:
    ClientError: it failed or took too long.
  """
  offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
  offline["PYTHONDONTWRITEBYTECODE"] = "1"  # nothing of ours beside what is handed over
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  command = [str(python or find_python()), str(SCRIPTS / script), *map(str, arguments)]
  try:
    done = subprocess.run(
      command, env=kept | offline, capture_output=True, text=True, timeout=timeout, check=False
    )
  except subprocess.TimeoutExpired:
    raise ClientError(f"{script} did not finish within {timeout:.0f} s") from None
  if done.returncode:
    lines = (done.stderr or done.stdout).strip().splitlines()
    raise ClientError(f"{script} failed: " + "\n".join(lines[-12:]))
  return done.stdout
