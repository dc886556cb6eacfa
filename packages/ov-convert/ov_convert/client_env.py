"""Runner of the scripts in `clients/`, in a separate Python environment.

PyTorch and the libraries that load exported weights are installed in a separate environment, so
that training does not depend on them. `$OV_CLIENTS_PYTHON` is its interpreter; Bazel provides it
for targets with `clients = True`.
"""

from collections.abc import Sequence
import os
import pathlib
import subprocess

SCRIPTS = pathlib.Path(__file__).parent / "clients"


class ClientError(RuntimeError):
  """Failure of a script; the message contains the last lines of its output."""


def find_python() -> pathlib.Path:
  """Return the interpreter of the clients' environment.

  Raises:
    FileNotFoundError: if no interpreter is configured, it does not exist, or the packages of the
      environment could not be installed.
  """
  named = os.environ.get("OV_CLIENTS_PYTHON") or _named_by_bazel(pathlib.Path(__file__))
  if not named:
    raise FileNotFoundError(
      "OV_CLIENTS_PYTHON is not set; set it to the Python of an environment with the packages of "
      "tools/python/requirements-clients.in. `bazel run` sets it automatically"
    )
  if not pathlib.Path(named).exists():
    raise FileNotFoundError(f"OV_CLIENTS_PYTHON={named}: no such file")
  return pathlib.Path(named)


def _named_by_bazel(here: pathlib.Path) -> str:
  """Return the content of clients/interpreter.txt in the runfiles of `here`; "" if missing.

  Raises:
    FileNotFoundError: if the environment could not be installed; the message is the reason.
  """
  for folder in here.absolute().parents:
    file = folder / "clients" / "interpreter.txt"
    if folder.name.endswith(".runfiles") and file.exists():
      reason = file.with_name("unavailable.txt")
      if reason.exists() and (text := reason.read_text("utf-8").strip()):
        raise FileNotFoundError(text)
      return file.read_text("utf-8").strip()
  return ""


def run_client(
  script: str | os.PathLike[str],
  arguments: Sequence[str | os.PathLike[str]],
  *,
  python: str | os.PathLike[str] | None = None,
  timeout: float = 1800,
) -> str:
  """Run a script in the clients' environment, offline, and return its stdout.

  Args:
    script: file name in `clients/`, e.g. "run_timm.py", or an absolute path.
    arguments: command line arguments.
    python: interpreter; `find_python()` by default.
    timeout: timeout in seconds.

  Raises:
    ClientError: if the script fails or times out.
  """
  offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
  offline["PYTHONDONTWRITEBYTECODE"] = "1"  # do not write __pycache__ into exported folders
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
