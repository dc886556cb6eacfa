"""A worker as a machine: the code on it, its environment, its chips, what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from typing import Any

from tools.tpu.worker import chips, common, runs

SETUP_LOG = common.HOME / "ov-setup.log"
COUNT, COUNT_LOG, COUNT_PID = (common.HOME / f"ov-count.{kind}" for kind in ("json", "log", "pid"))
LOCKS = {"tpu": "requirements-tpu.lock", "cuda": "requirements-cuda.lock"}
# Files of libtpu that outlive a process which was killed.
LEFT_OVERS = ("tmp/libtpu_lockfile", "tmp/tpu_logs")
# Counts devices in the environment of the apps; the file appears when it is complete.
_COUNT = """
import json, os, sys, jax, ov_sharding
ov_sharding.initialize()
found = dict(platform=jax.devices()[0].platform, devices=jax.device_count(),
             local=jax.local_device_count())
with open(sys.argv[1] + ".new", "w") as file:
  json.dump(found, file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
"""


def unpack(archive: str, checksum: str) -> dict[str, Any]:
  """Puts the checkout in place of the one before, once its bytes are known to be right."""
  if alive := runs.alive():
    raise common.Refused(f"run {', '.join(alive)} is alive and reads this code; stop it first")
  path = common.HOME / archive
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != checksum:
    raise common.Refused(f"{archive} arrived damaged: sha256 {found}, sent {checksum}")
  new, old = common.CODE.with_name("ov-code.new"), common.CODE.with_name("ov-code.old")
  for folder in (new, old):
    shutil.rmtree(str(folder), ignore_errors=True)
  with tarfile.open(path) as tar:
    if hasattr(tarfile, "data_filter"):  # older Pythons have none; the archive is our own
      tar.extraction_filter = tarfile.data_filter
    tar.extractall(new)
  if common.CODE.exists():
    common.CODE.rename(old)
  new.rename(common.CODE)
  shutil.rmtree(old, ignore_errors=True)
  path.unlink()
  return {"files": sum(1 for p in common.CODE.rglob("*") if p.is_file())}


def setup(flavour: str, libtpu: str = "") -> dict[str, Any]:
  """Installs what the lock says, no more and no less; `libtpu` is gs://... or a file here."""
  tools = common.needs(common.CODE, "tpu sync") / "tools" / "python"
  locks = [tools / "requirements.lock"] + ([tools / LOCKS[flavour]] if flavour in LOCKS else [])
  command = [_interpreter(tools), str(tools / "environment.py"), *map(str, locks)]
  with open(SETUP_LOG, "wb") as log:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
  if done.returncode:
    raise common.Refused(f"no environment: {common.last_words(SETUP_LOG)}")
  venv = done.stdout.decode().strip().splitlines()[-1]
  if libtpu.startswith("gs://"):
    copy = ["gcloud", "storage", "cp", libtpu, str(common.LIBTPU)]
    common.tool(copy, "libtpu could not be copied")
  elif not libtpu and common.LIBTPU.exists():
    common.LIBTPU.unlink()  # that of an earlier setup; the lock's is used again
  common.PYTHON.write_text(venv + "/bin/python3")
  return {"python": common.PYTHON.read_text(), "libtpu": libtpu or "of the lock"}


def _interpreter(tools: Path) -> str:
  """A Python that the environment can be built on; where there is none, uv fetches one."""
  check = "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"
  for name in ("python3.12", "python3.13", "python3.11", "python3", "python3.14"):
    found = shutil.which(name)
    if found and not subprocess.run([found, "-c", check], stderr=subprocess.DEVNULL).returncode:
      return found
  pin = re.findall(r'"(uv==[\d.]+)"', (tools / "environment.py").read_text())[0]
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--user", pin]
  common.tool(
    pip, "no Python from 3.11 to 3.14 here (apt-get install python3.11-venv), nor could uv come"
  )
  uv = [sys.executable, "-m", "uv", "python"]
  common.tool(uv + ["install", "3.12"], "uv could not install Python 3.12")
  return common.tool(uv + ["find", "3.12"], "uv could not find its Python").strip()


def count() -> dict[str, Any]:
  """Begins to count the devices, and does not wait: all workers of a slice must do so together."""
  if alive := runs.alive():
    raise common.Refused(f"run {', '.join(alive)} is alive and holds the chip; stop it first")
  COUNT.unlink(missing_ok=True)
  command = [common.python(), "-c", _COUNT, str(COUNT)]
  with open(COUNT_LOG, "wb") as log:
    process = subprocess.Popen(
      command, env=common.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
      start_new_session=True,
    )  # fmt: skip
  COUNT_PID.write_text(str(process.pid))
  return {"pid": process.pid}


def counted(seconds: str) -> dict[str, Any]:
  """What `count` found: the devices of the whole slice, and those here."""
  pid = int(common.needs(COUNT_PID, "tpu setup").read_text())
  deadline = time.monotonic() + float(seconds)
  while not COUNT.exists():
    if runs.state(pid) in (None, "Z"):
      if COUNT.exists():  # in the moment between the two questions
        break
      raise common.Refused(f"jax could not count its devices: {common.last_words(COUNT_LOG)}")
    if time.monotonic() > deadline:
      os.killpg(pid, signal.SIGKILL)
      words = common.last_words(COUNT_LOG)
      raise common.Refused(f"jax counts its devices for over {seconds} s: {words}")
    time.sleep(0.1)
  return json.loads(COUNT.read_text())


def check(bucket: str = "") -> dict[str, Any]:
  """What a run needs of this machine."""
  found: dict[str, Any] = {
    "time": time.time(),
    "python": platform.python_version(),
    "disk_free_gb": round(shutil.disk_usage(common.HOME).free / 1e9, 1),
    "environment": None,
    "libtpu": None,
    "bucket": None,
    "holders": chips.holders()["holders"],
  }
  if common.PYTHON.exists():
    code = (
      "import json, platform, importlib.metadata as m\n"
      "names = {d.metadata['Name'] for d in m.distributions()}\n"
      "version = lambda n: m.version(n) if n in names else None\n"
      "print(json.dumps([platform.python_version(), version('jax'), version('libtpu')]))"
    )
    told = common.tool([common.python(), "-c", code], "the environment is broken")
    python, jax, libtpu = json.loads(told)
    found.update(python=python, environment="jax " + str(jax))
    found["libtpu"] = "custom" if common.LIBTPU.exists() else libtpu
  if bucket:
    found["bucket"] = _try_bucket(bucket)
  return found


def _try_bucket(bucket: str) -> str:
  """Writes a small object and removes it again; what went wrong, or "ok"."""
  target = f"{bucket.rstrip('/')}/ov-check-{socket.gethostname()}-{os.getpid()}"
  try:
    common.tool(["gcloud", "storage", "cp", os.path.abspath(sys.argv[0]), target], "cannot write")
    common.tool(["gcloud", "storage", "rm", target], "cannot remove what it wrote")
  except common.Refused as error:
    return str(error)
  return "ok"


def clean(root: str = "/") -> dict[str, Any]:
  """Removes what a killed process of libtpu leaves, if nobody holds the chip."""
  chips.as_root("clean")
  seen = chips.holders(root)
  if seen["holders"]:
    names = ", ".join(f"{h['name']} (pid {h['pid']})" for h in seen["holders"])
    raise common.Refused(f"the chip is held by {names}; nothing was removed")
  if seen["hidden"]:
    raise common.Refused(f"{seen['hidden']} processes cannot be looked into; nothing was removed")
  removed = []
  for name in LEFT_OVERS:
    path = Path(root) / name
    if path.is_symlink() or path.is_file():
      path.unlink()
    elif path.is_dir():
      shutil.rmtree(path)
    else:
      continue
    removed.append("/" + name)
  return {"removed": removed}
