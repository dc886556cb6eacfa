"""Create the virtual environment for a set of lock files and print its path.

Environments are shared: equal locks and interpreters give the same directory, so a second clone
reuses it. They are stored in $OV_CACHE/python (default ~/.cache/openvision).

  python3 environment.py requirements.lock [requirements-tpu.lock ...]
  python3 environment.py requirements-clients.lock --site=hook.pth,hook.py \
    --pip=torch==2.13.0 --pip_index=https://download.pytorch.org/whl/cpu

`--pip` names one distribution that is installed by pip and without a hash, because its builds come
from an index other than PyPI. If no build of it can be imported, the file `unavailable.txt` of the
environment gives the reason, and the next call tries again. `--site` copies files into
site-packages.
"""

import argparse
import fcntl
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

UV = "uv==0.13.9"


def main(locks: list[str], pip: str = "", site: tuple[str, ...] = (), index: str = "") -> None:
  cache = pathlib.Path(os.environ.get("OV_CACHE") or cache_home() / "openvision")
  venv = cache / "python" / key([*locks, *site], pip)
  venv.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{venv}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # a concurrent builder waits here
    complete = venv / "complete"
    if not complete.exists():
      shutil.rmtree(venv, ignore_errors=True)  # remains of an interrupted build
      build(venv, locks, site)
      reason = install_one(venv / "bin" / "python3", pip, index) if pip else ""
      if reason:
        say(reason)
        (venv / "unavailable.txt").write_text(reason, "utf-8")
      else:
        complete.touch()
  print(venv)


def cache_home() -> pathlib.Path:
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


def key(locks: list[str], pip: str = "") -> str:
  """Return a hash of everything that determines the content: interpreter, machine and pins."""
  digest = hashlib.sha256()
  for part in (os.path.realpath(sys.executable), sys.version, platform.machine(), *pip.split()):
    digest.update(part.encode() + b"\0")
  for lock in locks:
    digest.update(pathlib.Path(lock).read_bytes() + b"\0")
  return digest.hexdigest()[:16]


def build(venv: pathlib.Path, locks: list[str], site: tuple[str, ...] = ()) -> None:
  """Install the locks with uv (on PATH, or fetched with pip), or else with pip itself.

  Both verify hashes and write byte code, which sandboxed tests cannot do. pip is the fallback
  because it reads the pip configuration of the machine, which uv ignores.
  """
  say(
    f"installing {', '.join(os.path.basename(lock) for lock in locks)} into {venv}; once, 1-2 min"
  )
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
  python = venv / "bin" / "python3"
  paths = {"base": str(venv), "platbase": str(venv)}
  packages = pathlib.Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
  for file in site:
    shutil.copy(file, packages)
  wanted = ["--no-deps", "--require-hashes", *(arg for lock in locks for arg in ("-r", lock))]
  uv = shutil.which("uv") or fetch_uv(python)
  if uv and run(
    [uv, "pip", "install", "--python", python, "--quiet", "--compile-bytecode", *wanted]
  ):
    return
  say("uv failed; trying pip")
  if not (add_pip(python) and run([python, "-m", "pip", "install", "--quiet", *wanted])):
    sys.exit(
      "The environment could not be installed; the messages above name the file and the reason."
    )


def install_one(python: pathlib.Path, requirement: str, index: str) -> str:
  """Install a distribution that can be imported, and return "" or the reason for the failure.

  Tries the build in `index`, the build in pip's configured index, and the latter with dependencies:
  PyPI's build of PyTorch for Linux requires several GB of CUDA libraries.
  """
  module = requirement.partition("==")[0]
  if not add_pip(python):
    return f"{requirement} was not installed: pip could not be installed"
  quick = ["--no-deps", "--retries=1", "--timeout=15", f"--index-url={index}"]
  for options in ([quick] if index else []) + [["--no-deps", "--force-reinstall"], []]:
    say(f"pip install {' '.join([*options, requirement])}")
    installed = run([python, "-m", "pip", "install", "--quiet", *options, requirement])
    if installed and run([python, "-c", f"import {module}"]):
      return ""
  return (
    f"{requirement} could not be installed; the messages above give the reason. Tests that "
    f"require it are skipped. To try again: tools/bazel sync --only=clients"
  )


def fetch_uv(python: pathlib.Path) -> str | None:
  if add_pip(python) and run([python, "-m", "pip", "install", "--quiet", "--no-deps", UV]):
    return str(python.parent / "uv")
  return None


def add_pip(python: pathlib.Path) -> bool:
  if subprocess.run([python, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0:
    return True
  if subprocess.run([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode:
    sys.exit(
      f"{sys.executable} has no ensurepip, so pip cannot be installed."
      " On Debian and Ubuntu: apt-get install python3-venv. Or put uv on PATH."
    )
  return subprocess.run([python, "-m", "ensurepip"], stdout=subprocess.DEVNULL).returncode == 0


def run(command: list) -> bool:
  """Run a command with its output on stderr and return whether it succeeded."""
  return subprocess.run(command, stdout=sys.stderr).returncode == 0


def say(text: str) -> None:
  print("openvision:", text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("locks", nargs="+")
  parser.add_argument("--pip", default="")
  parser.add_argument("--pip_index", default="")
  parser.add_argument("--site", default="")
  flags = parser.parse_args()
  main(flags.locks, flags.pip, tuple(filter(None, flags.site.split(","))), flags.pip_index)
