"""A run of four processes restarts itself after one is killed, with unchanged metrics.

After `kill -9` of one process, the program of `tpu launch --kind=ssh` ends all processes and
restarts them from the last checkpoint. metrics.jsonl must equal that of an uninterrupted run.
"""

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import uuid

from apps.trainer.sinks import compare_metrics, read_metrics
from tests.end_to_end import runner
from tests.multiprocess import launcher
from tools.tpu import fake_ssh
from tools.tpu.job import Job, ssh_script

HOSTS = ("a", "b", "c", "d")
STEPS, EVERY, KILL_AT = 12, 4, 6
LIMIT = 600  # seconds; an idle machine takes thirty
FLAGS = (
  *runner.TINY,
  f"--config.total_steps={STEPS}",
  f"--config.checkpoint.every={EVERY}",
  "--config.eval.every=6",
)


def variables(home: Path) -> dict[str, str]:
  return runner.environment(home, XLA_FLAGS="--xla_force_host_platform_device_count=1")


def start(folder: Path, home: Path) -> subprocess.Popen[bytes]:
  """Start the script with this machine as all hosts; its output goes to FOLDER/log."""
  env = variables(home)
  kept = [f"{name}={env[name]}" for name in ("PYTHONPATH", "HOME", "XLA_FLAGS")]
  checkout = fake_ssh.install(folder, "env", *kept, sys.executable)
  config, *flags = FLAGS
  job = Job(
    f"t{uuid.uuid4().hex}", "caption_train", config.removeprefix("--config="), str(folder / "run"),
    tuple(flags), grace=60, restarts=1,
  )  # fmt: skip
  script = folder / "job.py"
  port = launcher.free_port()
  script.write_text(ssh_script(job, HOSTS, "127.0.0.1", port, str(checkout), "cpu"))
  env["PATH"] = f"{folder}/bin:{env['PATH']}"
  with (folder / "log").open("wb") as log:
    return subprocess.Popen([sys.executable, script], stdout=log, stderr=log, env=env)


def apps(folder: Path) -> dict[str, int]:
  """Return the ids of the live processes of the app by process number."""
  found = {}
  for place in Path("/proc").iterdir():
    try:
      if place.name.isdigit() and f"--workdir={folder / 'run'}" in _words(place / "cmdline"):
        environment = dict(word.partition("=")[::2] for word in _words(place / "environ"))
        if (place / "exe").resolve() == Path(sys.executable).resolve():
          found[environment["OV_PROCESS_ID"]] = int(place.name)
    except OSError:
      continue  # the process has ended
  return found


def _words(path: Path) -> list[str]:
  return path.read_bytes().decode(errors="replace").split("\0")


def wait_for(folder: Path, process: subprocess.Popen[bytes], true: Callable[[], bool]) -> float:
  """Wait until a condition is true and return the time."""
  deadline = time.monotonic() + LIMIT
  while not true():
    assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
    time.sleep(0.02)
  return time.monotonic()


def test_kill_9_of_one_process_changes_no_metric(tmp_path: Path):
  home = tmp_path / "home"
  launcher.launch(
    [str(runner.CAPTION_TRAIN), *FLAGS, f"--workdir={tmp_path / 'undisturbed'}"],
    processes=len(HOSTS), devices=1, timeout=LIMIT, env=variables(home),
  )  # fmt: skip

  folder = tmp_path / "disturbed"
  folder.mkdir()
  process = start(folder, home)
  metrics, log = folder / "run/metrics.jsonl", folder / "log"

  def step() -> int:
    lines = read_metrics(metrics) if metrics.exists() else []
    return lines[-1]["step"] if lines else 0

  try:
    wait_for(folder, process, lambda: step() >= KILL_AT)
    first = apps(folder)
    assert sorted(first) == ["0", "1", "2", "3"]
    os.kill(first["2"], signal.SIGKILL)
    killed = time.monotonic()
    seen = wait_for(folder, process, lambda: "launch: c: ended with" in log.read_text())
    assert not set(first.values()) & set(apps(folder).values())
    reached = step()
    # A resumed run truncates the lines after its checkpoint and rewrites them.
    wait_for(folder, process, lambda: step() < reached)
    again = wait_for(folder, process, lambda: step() > reached // EVERY * EVERY)
    code = process.wait(timeout=LIMIT)
  finally:
    process.kill()
    process.wait()
  said = log.read_text()
  assert code == 0, said
  assert "launch: c: ended with code 137, signal 9" in said
  assert "launch: all restart in 2 s from the last checkpoint; 1 restarts left" in said
  assert not apps(folder)
  print(f"from kill to notice {seen - killed:.1f} s, to the first new step {again - killed:.1f} s")
  assert reached < STEPS, "killed too late to change anything"
  undisturbed = tmp_path / "undisturbed/metrics.jsonl"
  assert not compare_metrics(undisturbed, metrics)
  trained = [line for line in read_metrics(metrics) if "train/examples" in line]
  assert [line["train/examples"] for line in trained] == [16 * (i + 1) for i in range(STEPS)]
