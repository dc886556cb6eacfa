"""What runs on a worker: one program of the standard library, copied there by `tpu sync`.

  python3 ov-worker.py unpack ov-code.tgz SHA256
  python3 ov-worker.py setup tpu
  python3 ov-worker.py start RUN RESTARTS APP ARGUMENTS...
  python3 ov-worker.py devices | status RUN | stop RUN GRACE | check [BUCKET] | holders | clean

Prints one JSON object and ends with code 0, or writes one line to stderr and ends with code 1. It
must run on the Python that a fresh virtual machine has, 3.8 and later. Everything of ours lies in
the home folder: ov-code, ov-python (a file with the interpreter's path), ov-run/RUN.
"""

from __future__ import annotations

from collections.abc import Iterator
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

HOME = Path.home()
CODE, RUNS, PYTHON, LIBTPU = (
  HOME / "ov-code", HOME / "ov-run", HOME / "ov-python", HOME / "ov-libtpu.so",
)  # fmt: skip
LOCKS = {"tpu": "requirements-tpu.lock", "cuda": "requirements-cuda.lock"}
# Files of libtpu that outlive a process which was killed; with their folder, for tests.
LEFT_OVERS = ("tmp/libtpu_lockfile", "tmp/tpu_logs")
_CHIP = re.compile(r"/dev/(accel\d+|vfio/\d+)$")
_RESTART_PAUSE = 20  # seconds: the other workers must have ended before any is started again
_USER_MISTAKE = 2  # the apps' exit code; trying again would not help
# Counts devices in the environment of the apps. All workers of a slice must do so at once.
_COUNT = """
import json, jax, ov_sharding
ov_sharding.initialize()
print(json.dumps(dict(devices=jax.device_count(), local=jax.local_device_count(),
                      platform=jax.devices()[0].platform)))
"""


class Refused(Exception):
  """Ends the program with this line."""


def unpack(archive: str, checksum: str) -> dict[str, Any]:
  """Puts the checkout in place of the one before, once its bytes are known to be right."""
  if alive := [run.name for run in _runs() if _members(_record(run))]:
    raise Refused(f"run {', '.join(alive)} is alive and reads this code; stop it first")
  path = HOME / archive
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != checksum:
    raise Refused(f"{archive} arrived damaged: sha256 {found}, sent {checksum}")
  new, old = CODE.with_name("ov-code.new"), CODE.with_name("ov-code.old")
  for folder in (new, old):
    shutil.rmtree(str(folder), ignore_errors=True)
  with tarfile.open(path) as tar:
    if hasattr(tarfile, "data_filter"):  # older Pythons have none; the archive is our own
      tar.extraction_filter = tarfile.data_filter
    tar.extractall(new)
  if CODE.exists():
    CODE.rename(old)
  new.rename(CODE)
  shutil.rmtree(old, ignore_errors=True)
  path.unlink()
  return {"files": sum(1 for p in CODE.rglob("*") if p.is_file())}


def setup(flavour: str, libtpu: str = "") -> dict[str, Any]:
  """Installs what the lock says, no more and no less; `libtpu` is gs://... or a file here."""
  tools = _needs(CODE, "tpu sync") / "tools" / "python"
  locks = [tools / "requirements.lock"] + ([tools / LOCKS[flavour]] if flavour in LOCKS else [])
  command = [_interpreter(tools), str(tools / "environment.py"), *map(str, locks)]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
  if done.returncode:
    raise Refused("the environment could not be made; the lines above say why")
  venv = done.stdout.decode().strip().splitlines()[-1]
  if libtpu.startswith("gs://"):
    _tool(["gcloud", "storage", "cp", libtpu, str(LIBTPU)], "libtpu could not be copied")
  elif not libtpu and LIBTPU.exists():
    LIBTPU.unlink()  # that of an earlier setup; the lock's is used again
  PYTHON.write_text(venv + "/bin/python3")
  return {"python": PYTHON.read_text(), "libtpu": libtpu or "of the lock"}


def _interpreter(tools: Path) -> str:
  """A Python that the environment can be built on; where there is none, uv fetches one."""
  check = "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"
  for name in ("python3.12", "python3.13", "python3.11", "python3", "python3.14"):
    found = shutil.which(name)
    if found and not subprocess.run([found, "-c", check], stderr=subprocess.DEVNULL).returncode:
      return found
  pin = re.findall(r'"(uv==[\d.]+)"', (tools / "environment.py").read_text())[0]
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--user", pin]
  _tool(
    pip, "no Python from 3.11 to 3.14 here (apt-get install python3.11-venv), nor could uv come"
  )
  uv = [sys.executable, "-m", "uv", "python"]
  _tool(uv + ["install", "3.12"], "uv could not install Python 3.12")
  return _tool(uv + ["find", "3.12"], "uv could not find its Python").strip()


def devices() -> dict[str, Any]:
  """How many chips jax sees: of the whole slice, and here."""
  done = subprocess.run(
    [_python(), "-c", _COUNT], env=_environment(), stdout=subprocess.PIPE, check=False
  )
  if done.returncode:
    raise Refused("jax could not count its devices; the lines above say why")
  return json.loads(done.stdout.decode().splitlines()[-1])


def start(run: str, restarts: str, app: str, *arguments: str) -> dict[str, Any]:
  """Starts an app in a session of its own, which outlives this connection."""
  folder = RUNS / run
  if _members(_record(folder)):
    raise Refused(f"run {run} is alive already; stop it, or choose another --run")
  module = _needs(CODE, "tpu sync") / "apps" / f"{app}.py"
  if not module.is_file():
    raise Refused(f"there is no app {app} in ov-code/apps")
  command = [_python(), "-m", "apps." + app, *arguments]
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("exit", "stopping"):
    (folder / name).unlink(missing_ok=True)
  with open(folder / "worker.log", "ab") as log:
    process = subprocess.Popen(
      [sys.executable, os.path.abspath(__file__), "supervise", run, restarts, *command],
      stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=str(CODE),
    )  # fmt: skip
  record = {
    "pid": process.pid,
    "pgid": process.pid,
    "start": _start_time(process.pid),
    "boot": _boot(),
    "command": command,
    "workdir": _flag(arguments, "workdir"),
  }
  (folder / "run.json").write_text(json.dumps(record))
  return {"run": run, "pid": process.pid}


def supervise(run: str, restarts: str, *command: str) -> None:
  """Waits for the app, starts it again where it failed, notes its exit code."""
  # A function, not SIG_IGN: the app would inherit that, and must hear SIGTERM.
  signal.signal(signal.SIGTERM, lambda *_: None)
  folder = RUNS / run
  for left in range(int(restarts), -1, -1):
    code = subprocess.call(list(command), env=_environment(), cwd=str(CODE))
    if code in (0, _USER_MISTAKE) or not left:
      break
    print(f"ov-worker: ended with code {code}; {left} more tries", flush=True)
    time.sleep(_RESTART_PAUSE)
    if (folder / "stopping").exists():
      break
  (folder / "exit").write_text(str(code))


def status(run: str) -> dict[str, Any]:
  """Whether it runs, how far it is, what it said last."""
  folder = RUNS / run
  record = _record(folder)
  if not record:
    there = ", ".join(folder.name for folder in _runs()) or "none"
    raise Refused(f"no run {run} here; there are: {there}")
  ended = (folder / "exit").read_text() if (folder / "exit").exists() else None
  metrics = _last_lines(CODE / Path(record["workdir"] or ".").expanduser() / "metrics.jsonl")
  log = _last_lines(folder / "worker.log")
  return {
    "alive": bool(_members(record)),
    "exit": None if ended is None else int(ended),
    "step": next((s for s in map(_step, reversed(metrics)) if s is not None), None),
    "last": log[-1][:300] if log else "",
  }


def stop(run: str, grace: str) -> dict[str, Any]:
  """Ends the recorded process group: SIGTERM, and after `grace` seconds SIGKILL."""
  folder = RUNS / run
  record = _record(folder)
  if not record or not _members(record):
    return {"stopped": "was not running"}
  (folder / "stopping").touch()  # so that it is not started again
  os.killpg(record["pgid"], signal.SIGTERM)
  deadline = time.monotonic() + float(grace)
  while time.monotonic() < deadline:
    if not _members(record):
      return {"stopped": "SIGTERM"}
    time.sleep(0.1)
  os.killpg(record["pgid"], signal.SIGKILL)
  return {"stopped": "SIGKILL"}


def check(bucket: str = "") -> dict[str, Any]:
  """What a run needs of this machine."""
  found: dict[str, Any] = {
    "time": time.time(),
    "python": platform.python_version(),
    "disk_free_gb": round(shutil.disk_usage(HOME).free / 1e9, 1),
    "code": CODE.is_dir(),
    "environment": None,
    "libtpu": None,
    "bucket": None,
    "holders": holders()["holders"],
  }
  if PYTHON.exists():
    code = (
      "import json, platform, importlib.metadata as m\n"
      "names = {d.metadata['Name'] for d in m.distributions()}\n"
      "version = lambda n: m.version(n) if n in names else None\n"
      "print(json.dumps([platform.python_version(), version('jax'), version('libtpu')]))"
    )
    python, jax, libtpu = json.loads(_tool([_python(), "-c", code], "the environment is broken"))
    found.update(python=python, environment="jax " + str(jax))
    found["libtpu"] = "custom" if LIBTPU.exists() else libtpu
  if bucket:
    found["bucket"] = _try_bucket(bucket)
  return found


def _try_bucket(bucket: str) -> str:
  """Writes a small object and removes it again; what went wrong, or "ok"."""
  target = f"{bucket.rstrip('/')}/ov-check-{socket.gethostname()}-{os.getpid()}"
  try:
    _tool(["gcloud", "storage", "cp", str(Path(__file__).resolve()), target], "cannot write")
    _tool(["gcloud", "storage", "rm", target], "cannot remove what it wrote")
  except Refused as error:
    return str(error)
  return "ok"


def holders(root: str = "/") -> dict[str, Any]:
  """The processes that have a chip open, and how many could not be looked into."""
  found: list[dict[str, Any]] = []
  hidden = 0
  for process in (Path(root) / "proc").iterdir():
    if not process.name.isdigit():
      continue
    try:
      for descriptor in (process / "fd").iterdir():
        if _CHIP.search(os.readlink(descriptor)):
          found.append({"pid": int(process.name), "name": (process / "comm").read_text().strip()})
          break
    except PermissionError:
      hidden += 1
    except OSError:
      pass  # it ended meanwhile
  return {"holders": found, "hidden": hidden}


def clean(root: str = "/") -> dict[str, Any]:
  """Removes what a killed process of libtpu leaves, if nobody holds the chip."""
  if os.geteuid():  # the processes of others are seen, and their files removed, by root only
    os.execvp("sudo", ["sudo", "-n", sys.executable, os.path.abspath(__file__), "clean"])
  seen = holders(root)
  if seen["holders"]:
    names = ", ".join(f"{h['name']} (pid {h['pid']})" for h in seen["holders"])
    raise Refused(f"the chip is held by {names}; nothing was removed")
  if seen["hidden"]:
    raise Refused(f"{seen['hidden']} processes cannot be looked into; nothing was removed")
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


def _members(record: dict[str, Any] | None) -> list[int]:
  """The live processes of the recorded group; none where its number now means another."""
  if not record or record["boot"] != _boot():
    return []
  leader = _start_time(record["pid"])
  if leader is not None and leader != record["start"]:
    return []  # the number was given away again, which happens only once the group is empty
  return [pid for pid, group, state in _processes() if group == record["pgid"] and state != "Z"]


def _processes() -> Iterator[tuple[int, int, str]]:
  """Number, process group and state of every process."""
  for entry in os.listdir("/proc"):
    if entry.isdigit():
      fields = _stat(int(entry))
      if fields:
        yield int(entry), int(fields[2]), fields[0]


def _stat(pid: int) -> list[str] | None:
  """Fields of /proc/PID/stat behind the name, which may hold anything; None if there is none."""
  try:
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
  except OSError:
    return None


def _start_time(pid: int) -> int | None:
  """In clock ticks since the machine started."""
  fields = _stat(pid)
  return int(fields[19]) if fields else None


def _boot() -> str:
  return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _runs() -> list[Path]:
  return sorted(RUNS.iterdir()) if RUNS.is_dir() else []


def _record(folder: Path) -> dict[str, Any] | None:
  path = folder / "run.json"
  return json.loads(path.read_text()) if path.exists() else None


def _flag(arguments: tuple[str, ...], name: str) -> str | None:
  """The value of --name=VALUE or --name VALUE among the app's arguments."""
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and flag == name:
      return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else None)
  return None


def _last_lines(path: Path, size: int = 65536) -> list[str]:
  """The last lines of a file that may be long or missing."""
  try:
    with open(path, "rb") as file:
      file.seek(max(0, os.path.getsize(path) - size))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def _step(line: str) -> int | None:
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return None  # torn, or no line of metrics


def _environment() -> dict[str, str]:
  """Of the apps: our code on the path, and a libtpu of the user's where there is one."""
  packages = sorted(str(p.parent) for p in CODE.glob("packages/*/pyproject.toml"))
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(CODE), *packages]), PYTHONUNBUFFERED="1")
  if LIBTPU.exists():
    env["TPU_LIBRARY_PATH"] = str(LIBTPU)
  return env


def _python() -> str:
  return _needs(PYTHON, "tpu setup").read_text()


def _needs(path: Path, command: str) -> Path:
  if not path.exists():
    raise Refused(f"{path.name} is not here; first run: {command}")
  return path


def _tool(command: list[str], failure: str) -> str:
  """What a command printed; its last words where it failed."""
  try:
    done = subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
  except FileNotFoundError:
    raise Refused(f"{failure}: there is no {command[0]}") from None
  except subprocess.TimeoutExpired:
    raise Refused(f"{failure}: no answer in 600 s") from None
  if done.returncode:
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    raise Refused(f"{failure}: {words[-1] if words else f'exit code {done.returncode}'}")
  return done.stdout.decode("utf-8", "replace")


VERBS = (unpack, setup, devices, start, supervise, status, stop, check, holders, clean)

if __name__ == "__main__":
  verbs = {function.__name__: function for function in VERBS}
  try:
    answer = verbs[sys.argv[1]](*sys.argv[2:])
    if answer is not None:
      print(json.dumps(answer), flush=True)
  except (Refused, OSError) as refused:
    print(str(refused), file=sys.stderr)
    sys.exit(1)
