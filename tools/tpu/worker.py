"""Program of TPU workers: a single file that `tpu sync` copies to their home folders.

  python3 -I ov-worker.py VERB ARGUMENTS...    # the verbs are the functions in VERBS

It prints one JSON object, or {"error": "one line"}. Errors are not on stderr, where gcloud mixes
them with its own messages. It requires only Python 3.8 or later and the standard library.
"""

from __future__ import annotations

import contextlib
import glob
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
import time
from typing import Any

HOME = Path.home()
CODE, RUNS, LIBTPU = HOME / "ov-code", HOME / "ov-run", HOME / "ov-libtpu.so"
PYTHON = HOME / "ov-python"  # contains the path of the environment's interpreter
BOOT = Path("/proc/sys/kernel/random/boot_id")
COUNT_RUN = "ov-count"  # the run that counts devices
LEFT_OVERS = ("/tmp/libtpu_lockfile", "/tmp/tpu_logs")  # files of libtpu that survive a SIGKILL

RESTART_PAUSE = 20  # seconds; all workers must have stopped before any restarts
USER_ERROR = 2  # exit code for errors that a restart does not fix
MIN_DISK_GB = 20.0  # space for the environment and the compilation cache
KILL_SECONDS = 5.0  # a process must be gone this long after SIGKILL
FIRST_USER = 1000  # lower user ids belong to root and system accounts
CHIP = re.compile(r"/dev/(accel\d+|vfio/\d+)$")
SERVICE = re.compile(r"/system\.slice/(?:.*/)?([^/]+\.service)")
LOGIN_SERVICES = ("ssh.service", "sshd.service")  # user sessions without logind
COUNT_PROGRAM = """
import json, jax, ov_sharding
ov_sharding.initialize()
print(json.dumps(dict(platform=jax.devices()[0].platform, devices=jax.device_count(),
                      local=jax.local_device_count())))
"""
VERSIONS_PROGRAM = """
import json, platform, importlib.metadata
found = {d.name: d.version for d in importlib.metadata.distributions()}
print(json.dumps([platform.python_version(), found.get("jax"), found.get("libtpu")]))
"""


class Refused(Exception):
  """Ends the program with a one-line error."""


# Code and environment.


def unpack(archive: str, checksum: str) -> dict[str, Any]:
  """Replace the checkout by an archive after verifying its checksum."""
  _no_run_alive("reads this code")
  path = HOME / archive
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != checksum:
    raise Refused(f"{archive} arrived damaged: sha256 {found}, expected {checksum}; sync again")
  new = CODE.with_name("ov-code.new")
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir()
  _call(["tar", "-xzf", str(path), "-C", str(new)], "the archive could not be unpacked")
  shutil.rmtree(CODE, ignore_errors=True)
  new.rename(CODE)
  path.unlink()
  return {"files": sum(1 for p in CODE.rglob("*") if p.is_file())}


def setup(extras: str, libtpu: str = "") -> dict[str, Any]:
  """Install exactly the locked packages; `libtpu` is gs://... or "copied" for ~/ov-libtpu.so."""
  tools = _need(CODE, "tpu sync") / "tools" / "python"
  locks = ["requirements.lock"] + ([] if extras == "cpu" else [f"requirements-{extras}.lock"])
  log = HOME / "ov-setup.log"
  with open(log, "wb") as file:
    command = [_interpreter(tools), *(str(tools / name) for name in ("environment.py", *locks))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, check=False)
  if done.returncode:
    raise Refused(f"no environment: {_last_line(log)}")
  if libtpu.startswith("gs://"):
    _call(["gcloud", "storage", "cp", libtpu, str(LIBTPU)], "libtpu could not be copied")
  elif not libtpu and LIBTPU.exists():
    LIBTPU.unlink()  # from an earlier setup
  PYTHON.write_text(done.stdout.decode().strip().splitlines()[-1] + "/bin/python3")
  return {"python": PYTHON.read_text(), "libtpu": libtpu or "locked"}


def _interpreter(tools: Path) -> str:
  """Return a Python that the environment supports; uv downloads one if there is none."""
  check = "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"
  for name in ("python3.12", "python3.13", "python3.11", "python3", "python3.14"):
    found = shutil.which(name)
    if found and not subprocess.run([found, "-c", check], stderr=subprocess.DEVNULL).returncode:
      return found
  pin = re.findall(r'"(uv==[\d.]+)"', (tools / "environment.py").read_text())[0]
  failure = "found no Python 3.11 to 3.14 (apt-get install python3.11-venv) and cannot install uv"
  _call([sys.executable, "-m", "pip", "install", "--quiet", "--user", pin], failure)
  uv = [sys.executable, "-m", "uv", "python"]
  _call([*uv, "install", "3.12"], "uv could not install Python 3.12")
  return _call([*uv, "find", "3.12"], "uv could not find its Python").strip()


def count() -> dict[str, Any]:
  """Start to count devices and return immediately, because all workers of a slice must do so."""
  _no_run_alive("holds the chip")
  (RUNS / COUNT_RUN / "worker.log").unlink(missing_ok=True)
  return _start(COUNT_RUN, "0", [_python(), "-c", COUNT_PROGRAM], None)


def counted(seconds: str) -> dict[str, Any]:
  """Return the JAX device counts of the slice and of this worker."""
  folder, deadline = RUNS / COUNT_RUN, time.monotonic() + float(seconds)
  log = folder / "worker.log"
  while not (folder / "exit").exists():
    if time.monotonic() > deadline:
      with contextlib.suppress(ProcessLookupError):  # it ended without an exit code
        os.killpg(_record(folder)["pid"], signal.SIGKILL)
      raise Refused(f"jax did not count its devices in {seconds} s: {_last_line(log)}")
    time.sleep(0.1)
  counts = [line for line in _lines(log) if line.startswith("{")]  # libtpu logs to the same file
  if (folder / "exit").read_text() != "0" or not counts:
    raise Refused(f"jax could not count its devices: {_last_line(log)}")
  return json.loads(counts[-1])


def check(bucket: str = "") -> dict[str, Any]:
  """Return the state of this machine, and problems that would prevent a run."""
  python, environment, libtpu, answer = platform.python_version(), None, None, None
  free, problems = round(shutil.disk_usage(HOME).free / 1e9, 1), []
  if PYTHON.exists():
    found = _call([_python(), "-c", VERSIONS_PROGRAM], "the environment is broken")
    python, jax, libtpu = json.loads(found)
    environment, libtpu = f"jax {jax}", "custom" if LIBTPU.exists() else libtpu
  else:
    problems.append("no environment: tpu setup")
  if free < MIN_DISK_GB:
    problems.append(f"less than {MIN_DISK_GB:g} GB free")
  if bucket:
    target = f"{bucket.rstrip('/')}/ov-check-{socket.gethostname()}-{os.getpid()}"
    try:
      _call(["gcloud", "storage", "cp", os.path.abspath(sys.argv[0]), target], "cannot write")
      _call(["gcloud", "storage", "rm", target], "cannot remove what it wrote")
      answer = "ok"
    except Refused as error:
      answer = str(error)
      problems.append("bucket")
  if users := holders():
    problems.append("chip held by " + ", ".join(f"{name} ({pid})" for pid, name in users.items()))
  return {
    "time": time.time(), "python": python, "environment": environment, "libtpu": libtpu,
    "disk_free_gb": free, "bucket": answer, "problems": problems,
  }  # fmt: skip


# Processes with an open chip.


def holders(root: str = "/") -> dict[int, str]:
  """Return process id -> name for processes with an open chip; only root sees those of others."""
  found = {}
  for link in glob.iglob(f"{glob.escape(root)}/proc/[0-9]*/fd/*"):
    with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
      if CHIP.search(os.readlink(link)):
        process = Path(link).parents[1]
        found[int(process.name)] = (process / "comm").read_text().strip()
  return found


def clean(root: str = "") -> dict[str, Any]:
  """Remove files left by killed processes of libtpu, unless a process has an open chip."""
  _as_root("clean")
  if found := holders(root):
    names = ", ".join(f"{name} (pid {pid})" for pid, name in found.items())
    raise Refused(f"the chip is held by {names}; nothing was removed")
  removed = [name for name in LEFT_OVERS if os.path.lexists(root + name)]
  _call(["rm", "-rf", "--", *(root + name for name in removed)], "cannot remove files of libtpu")
  return {"removed": removed}


def held() -> dict[str, Any]:
  """Return the processes with an open chip; `kept` is the reason not to kill a process."""
  _as_root("held")
  found = []
  for pid in holders():
    folder, fields = Path(f"/proc/{pid}"), stat(pid)
    try:
      command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
      uid, cgroup = folder.stat().st_uid, (folder / "cgroup").read_text()
      user = folder.owner()
    except OSError:
      continue  # the process has ended
    except KeyError:  # the user has no name
      user = str(uid)
    if fields:
      kept = why_kept(pid, uid, command, cgroup)
      shown = {"pid": pid, "user": user, "command": command.strip()[:160] or "-"}
      found.append({**shown, "start": int(fields[19]), "kept": kept})
  return {"holders": found}


def kill(grace: str, *wanted: str) -> dict[str, Any]:
  """Send SIGTERM to processes that hold a chip, and SIGKILL after a grace period.

  Args:
    grace: seconds between the two signals.
    *wanted: PID:START of each process, from `held`. Processes are skipped if their id was reused,
      if they no longer hold a chip, or if they must be kept.

  Returns:
    `ended`: process id and signal of each ended process; `holders`: the remaining processes that
    hold a chip.
  """
  _as_root("kill", grace, *wanted)
  found = {f"{h['pid']}:{h['start']}": h for h in held()["holders"]}
  left = {found[key]["pid"]: key for key in wanted if key in found and not found[key]["kept"]}
  ended = []
  for number, seconds in ((signal.SIGTERM, float(grace)), (signal.SIGKILL, KILL_SECONDS)):
    for pid in left:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    deadline = time.monotonic() + seconds
    while left:
      for pid, key in list(left.items()):
        fields = stat(pid)
        if not fields or fields[0] == "Z" or f"{pid}:{fields[19]}" != key:
          ended.append(f"{pid} ({number.name})")
          del left[pid]
      if time.monotonic() >= deadline:
        break
      time.sleep(0.05)
  return {"ended": ended, **held()}


def why_kept(pid: int, uid: int, command: str, cgroup: str) -> str:
  """Return the reason not to kill a process, or ""."""
  ancestors = [os.getpid()]
  while fields := stat(ancestors[-1]):
    ancestors.append(int(fields[1]))  # process 0 has no files
  if pid == 1 or not command:
    return "a process of the system"
  if pid in ancestors:
    return "this command itself"
  if 0 < uid < FIRST_USER:
    return "a system account"
  for unit in SERVICE.findall(cgroup):
    if unit not in LOGIN_SERVICES:
      return f"a system service; first: sudo systemctl stop {unit}"
  run = next((name for name, pids in _runs().items() if pid in pids), "")
  return f"run {run}; first: tpu stop --run={run}" if run else ""


def _as_root(*arguments: str) -> None:
  """Restart this program with sudo, unless it is root: only root can read all processes."""
  if os.geteuid():
    home = f"HOME={HOME}"  # user whose runs are inspected
    os.execvp("sudo", ["sudo", "-n", "env", home, *_program(), *arguments])


# Runs. Each run is a process group in a separate session; its files are in ~/ov-run/NAME.


def start(run: str, restarts: str, app: str, *arguments: str) -> dict[str, Any]:
  """Start an app in a session that survives the end of the connection."""
  if not (_need(CODE, "tpu sync") / "apps" / f"{app}.py").is_file():
    raise Refused(f"there is no app {app} in ov-code/apps")
  command = [_python(), "-m", "apps." + app, *arguments]
  return _start(run, restarts, command, flag(arguments, "workdir"))


def _start(run: str, restarts: str, command: list[str], workdir: str | None) -> dict[str, Any]:
  folder = RUNS / run
  if members(folder):
    raise Refused(f"run {run} is alive already; stop it, or choose another --run")
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("exit", "stopping"):
    (folder / name).unlink(missing_ok=True)
  with open(folder / "worker.log", "ab") as log:
    process = subprocess.Popen(
      [*_program(), "supervise", run, restarts, *command], stdin=subprocess.DEVNULL, stdout=log,
      stderr=log, start_new_session=True, cwd=CODE,
    )  # fmt: skip
  fields = stat(process.pid)
  record = {
    "pid": process.pid, "start": int(fields[19]) if fields else None, "boot": BOOT.read_text(),
    "command": command, "workdir": workdir,
  }  # fmt: skip
  (folder / "run.json").write_text(json.dumps(record))
  return {"run": run, "pid": process.pid}


def supervise(run: str, restarts: str, *command: str) -> None:
  """Wait for the app, restart it after a failure, and write its exit code."""
  # A handler, not SIG_IGN, which the app would inherit: the app must receive SIGTERM.
  signal.signal(signal.SIGTERM, lambda *_: None)
  packages = (str(path) for path in sorted(CODE.glob("packages/*")))
  env = dict(os.environ, PYTHONPATH=":".join([str(CODE), *packages]), PYTHONUNBUFFERED="1")
  if LIBTPU.exists():
    env["TPU_LIBRARY_PATH"] = str(LIBTPU)
  stopping = RUNS / run / "stopping"
  for left in range(int(restarts), -1, -1):
    code = subprocess.call(list(command), env=env, cwd=CODE)
    if code in (0, USER_ERROR) or not left or stopping.exists():
      break
    print(f"ov-worker: the app failed with code {code}; {left} restarts left", flush=True)
    time.sleep(RESTART_PAUSE)
    if stopping.exists():
      break
  (RUNS / run / "exit").write_text(str(code))


def status(run: str) -> dict[str, Any]:
  """Return whether a run is alive, its last step, and the last line of its log."""
  folder = RUNS / run
  record = _record(folder)
  if not record:
    raise Refused(f"there is no run {run} on this worker, only: {', '.join(_runs()) or 'none'}")
  step = None
  for line in _lines(CODE / Path(record["workdir"] or ".").expanduser() / "metrics.jsonl"):
    with contextlib.suppress(ValueError, KeyError, TypeError):  # incomplete, or without metrics
      step = int(json.loads(line)["step"])
  return {
    "alive": bool(members(folder)),
    "exit": int((folder / "exit").read_text()) if (folder / "exit").exists() else None,
    "step": step,
    "last": "".join(_lines(folder / "worker.log")[-1:])[:300],
  }


def terminate(run: str) -> dict[str, Any]:
  """Send SIGTERM to the process group of a run and return at once."""
  folder = RUNS / run
  (folder / "stopping").unlink(missing_ok=True)  # from an earlier signal
  alive = bool(members(folder))
  if alive:
    (folder / "stopping").touch()  # prevents a restart; its mtime is the time of the signal
    os.killpg(_record(folder)["pid"], signal.SIGTERM)
  return {"terminated": alive}


def stop(run: str, grace: str) -> dict[str, Any]:
  """Wait until a terminated run has ended; send SIGKILL `grace` seconds after SIGTERM."""
  folder = RUNS / run
  if not (folder / "stopping").exists():
    return {"stopped": "was not running"}
  deadline = (folder / "stopping").stat().st_mtime + float(grace)
  while members(folder):
    if time.time() >= deadline:
      os.killpg(_record(folder)["pid"], signal.SIGKILL)
      return {"stopped": "SIGKILL"}
    time.sleep(0.1)
  return {"stopped": "SIGTERM"}


def members(folder: Path) -> list[int]:
  """Return the live processes in the group of a run, or none if its process id was reused."""
  record = _record(folder)
  if not record or record["boot"] != BOOT.read_text():
    return []
  leader = stat(record["pid"])
  if leader and int(leader[19]) != record["start"]:
    return []  # a process id is not reused while its group exists
  found = {int(name): stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
  group = str(record["pid"])
  return [pid for pid, f in found.items() if f and f[2] == group and f[0] != "Z"]


def stat(pid: int) -> list[str] | None:
  """Return the fields of /proc/PID/stat after the name (state, parent, group, ...), or None."""
  try:
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
  except OSError:
    return None


def flag(arguments: tuple[str, ...], name: str) -> str | None:
  """Return the value of --name=VALUE or --name VALUE."""
  for i, argument in enumerate(arguments):
    found, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and found == name:
      return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else None)
  return None


def _record(folder: Path) -> dict[str, Any]:
  path = folder / "run.json"
  return json.loads(path.read_text()) if path.exists() else {}


def _runs() -> dict[str, list[int]]:
  """Return the live processes of all runs by run name."""
  folders = sorted(RUNS.iterdir()) if RUNS.is_dir() else []
  return {folder.name: members(folder) for folder in folders}


def _no_run_alive(reason: str) -> None:
  if alive := ", ".join(name for name, pids in _runs().items() if pids):
    raise Refused(f"run {alive} is alive and {reason}; stop it first")


def _program() -> list[str]:
  return [sys.executable, "-I", os.path.abspath(sys.argv[0])]


def _python() -> str:
  return _need(PYTHON, "tpu setup").read_text()


def _need(path: Path, command: str) -> Path:
  if not path.exists():
    raise Refused(f"{path.name} is missing; first run: {command}")
  return path


def _call(command: list[str], failure: str) -> str:
  """Return the output of a command; raise Refused with its last line if it fails."""
  try:
    done = subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
  except FileNotFoundError:
    raise Refused(f"{failure}: there is no {command[0]}") from None
  except subprocess.TimeoutExpired:
    raise Refused(f"{failure}: no answer in 600 s") from None
  if done.returncode:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    raise Refused(f"{failure}: {lines[-1] if lines else f'exit code {done.returncode}'}")
  return done.stdout.decode("utf-8", "replace")


def _lines(path: Path, size: int = 65536) -> list[str]:
  """Return the last lines of a file; the file may be large or missing."""
  try:
    with open(path, "rb") as file:
      file.seek(max(0, os.path.getsize(path) - size))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def _last_line(log: Path) -> str:
  return f"{(_lines(log) or ['no output'])[-1][:300]} (see {log} on this worker)"


VERBS = (
  unpack, setup, count, counted, check, clean, held, kill, start, supervise, status, terminate, stop
)  # fmt: skip

if __name__ == "__main__":
  try:
    result = {verb.__name__: verb for verb in VERBS}[sys.argv[1]](*sys.argv[2:])
  except (Refused, OSError) as error:
    result = {"error": str(error)}
  if result is not None:
    print(json.dumps(result), flush=True)
