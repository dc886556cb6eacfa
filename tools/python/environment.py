"""Makes the virtual environment of some locks and prints where it is.

Environments are shared: the same locks and the same interpreter give the same directory, so that
a second clone is ready at once. They lie under $OV_CACHE/python (default ~/.cache/openvision).

  python3 environment.py requirements.lock [requirements-tpu.lock ...]
  python3 environment.py requirements-clients.lock --pip=torch==2.13.0 --site=hook.pth,hook.py

`--pip` installs one distribution first, by pip as the machine has it configured and without a hash:
for those whose builds come from another index than PyPI's. `--site` copies files into
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


def main(locks: list[str], pip: str = "", site: tuple[str, ...] = ()) -> None:
  cache = pathlib.Path(os.environ.get("OV_CACHE") or cache_home() / "openvision")
  venv = cache / "python" / key([*locks, *site], pip)
  venv.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{venv}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # a second builder waits here and finds the work done
    complete = venv / "complete"
    if not complete.exists():
      shutil.rmtree(venv, ignore_errors=True)  # what an interrupted builder left
      build(venv, locks, pip, site)
      complete.touch()
  print(venv)


def cache_home() -> pathlib.Path:
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


def key(locks: list[str], pip: str = "") -> str:
  """Names what decides the content: interpreter, machine, pins."""
  digest = hashlib.sha256()
  for part in (os.path.realpath(sys.executable), sys.version, platform.machine(), *pip.split()):
    digest.update(part.encode() + b"\0")
  for lock in locks:
    digest.update(pathlib.Path(lock).read_bytes() + b"\0")
  return digest.hexdigest()[:16]


def build(venv: pathlib.Path, locks: list[str], pip: str = "", site: tuple[str, ...] = ()) -> None:
  """Installs the locks with uv (on PATH, or fetched with pip), else with pip itself.

  Both check every file against its hash and write byte code: a sandboxed test could not, and would
  compile jax and tensorflow anew each time. pip reads the machine's pip configuration, which uv
  does not: it is worth the second try.
  """
  say(
    f"installing {', '.join(os.path.basename(lock) for lock in locks)} into {venv}; once, 1-2 min"
  )
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
  python = venv / "bin" / "python3"
  if pip:
    install_loose(python, pip)
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
  say("uv did not manage; trying pip")
  if not (add_pip(python) and run([python, "-m", "pip", "install", "--quiet", *wanted])):
    sys.exit(
      "The environment could not be installed; the messages above name the file and the reason."
    )


def install_loose(python: pathlib.Path, requirement: str) -> None:
  """Installs one distribution by pip's own configuration, without what it needs."""
  command = [python, "-m", "pip", "install", "--quiet", "--no-deps", requirement]
  if not (add_pip(python) and run(command)):
    sys.exit(f"{requirement} could not be installed; the messages above say why.")


def fetch_uv(python: pathlib.Path) -> str | None:
  if add_pip(python) and run([python, "-m", "pip", "install", "--quiet", "--no-deps", UV]):
    return str(python.parent / "uv")
  return None


def add_pip(python: pathlib.Path) -> bool:
  if subprocess.run([python, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0:
    return True
  if subprocess.run([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode:
    sys.exit(
      f"{sys.executable} comes without ensurepip, so pip cannot be had."
      " On Debian and Ubuntu: apt-get install python3-venv. Or put uv on PATH."
    )
  return subprocess.run([python, "-m", "ensurepip"], stdout=subprocess.DEVNULL).returncode == 0


def run(command: list) -> bool:
  """Runs a step with its output on stderr: stdout is for the answer."""
  return subprocess.run(command, stdout=sys.stderr).returncode == 0


def say(text: str) -> None:
  print("openvision:", text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("locks", nargs="+")
  parser.add_argument("--pip", default="")
  parser.add_argument("--site", default="")
  flags = parser.parse_args()
  main(flags.locks, flags.pip, tuple(filter(None, flags.site.split(","))))
