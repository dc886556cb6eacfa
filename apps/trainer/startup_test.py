"""Tests of standard streams, encoding and signals, in separate processes."""

import os
import signal
import subprocess
import sys

import pytest

from apps.trainer.startup import printable

# Prints to both streams, logs, and runs until it is done or stopped.
_PROGRAM = """
import os, signal, sys, threading, time
from apps.trainer import startup
startup.set_up()
from absl import logging
from apps.trainer.errors import run_app

def main(arguments):
  print("out", flush=True)
  print("err", file=sys.stderr)
  for line in range(int(arguments[0])):
    print("x" * 100)
    logging.warning("line %d", line)
  with open(arguments[1], "w") as file:  # takes the lowest free descriptor
    file.write(f"{file.fileno()} {sys.stdout is not None} {arguments[1]}")
  if len(arguments) > 2:
    exec(arguments[2], globals())

run_app(main, arguments=True)
"""
_C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def command(tmp_path, *arguments):
  (tmp_path / "prog.py").write_text(_PROGRAM)
  return [sys.executable, str(tmp_path / "prog.py"), *map(str, arguments)]


def end_by_signals():
  """Restore the handling of Ctrl-C, which shells disable for background programs."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment(**more):
  return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **more}


def run(args):
  return subprocess.run(
    args,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=60,
    preexec_fn=end_by_signals,
  )


@pytest.mark.parametrize("redirect", (">/dev/full 2>/dev/full", ">&- 2>&-", ">&- 2>&- <&-"))
def test_output_that_cannot_be_written_is_dropped(tmp_path, redirect):
  shell = f'"$@" {redirect}'
  args = command(tmp_path, 2000, tmp_path / "done")
  done = subprocess.run(["sh", "-c", shell, "sh", *args], env=environment())
  assert done.returncode == 0
  descriptor, *_ = (tmp_path / "done").read_text().split()
  assert int(descriptor) > 2


def test_closed_pipe_does_not_end_program(tmp_path):
  args = command(tmp_path, 2000, tmp_path / "done")
  shell = '{ "$@"; echo $? >code; } 2>&1 | head -1'
  subprocess.run(["sh", "-c", shell, "sh", *args], env=environment(), cwd=tmp_path, check=True)
  assert (tmp_path / "code").read_text() == "0\n"
  assert (tmp_path / "done").exists()


@pytest.mark.parametrize("variables", (_C_LOCALE, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}))
def test_paths_are_utf8_in_every_locale(tmp_path, variables):
  path = tmp_path / "é犬"
  args = command(tmp_path, 0, path)
  done = subprocess.run(args, env=environment(**variables), capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "err\n")
  assert path.read_text("utf-8").endswith("é犬")


@pytest.mark.parametrize(("number", "code"), ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_ends_a_program_with_one_line(tmp_path, number, code):
  args = command(tmp_path, 0, tmp_path / "done", "time.sleep(60)")
  process = subprocess.Popen(
    args,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=end_by_signals,
  )
  while not (tmp_path / "done").exists():
    assert process.poll() is None
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert err.splitlines() == [
    "err",
    f"prog: stopped by {number.name}" + " (Ctrl-C)" * (code == 130),
  ]


def test_swallowed_interrupt_ends_program(tmp_path):
  swallow = """
class Noisy:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)
Noisy()
time.sleep(60)
"""
  args = command(tmp_path, 0, tmp_path / "done", swallow)
  done = run(args)
  assert done.returncode == 130
  assert done.stderr.splitlines()[1:] == ["prog: stopped by SIGINT (Ctrl-C)"]


def test_interrupt_converted_by_import(tmp_path):
  args = command(
    tmp_path, 0, tmp_path / "done",
    "try: os.kill(os.getpid(), 2)\nexcept BaseException: raise ImportError('x')",
  )  # fmt: skip
  done = run(args)
  assert done.returncode == 130
  assert done.stderr.splitlines()[1:] == ["prog: stopped by SIGINT (Ctrl-C)"]


def test_thread_errors_are_one_line_without_repetition(tmp_path):
  failing = """
def fail(): raise ValueError("torn")
for _ in range(5):
  thread = threading.Thread(target=fail); thread.start(); thread.join()
try: raise RuntimeError("cause")
except RuntimeError: logging.exception("a library logs its traceback")
"""
  args = command(tmp_path, 0, tmp_path / "done", failing)
  done = run(args)
  assert done.returncode == 0
  _, thread, logged = done.stderr.splitlines()
  assert "prog: warning: in the background: ValueError: torn" in thread
  assert logged.endswith("a library logs its traceback")


def test_printable():
  assert printable("a\x1b[1m\x07\r\x9b\x7f\u202e") == r"a\x1b[1m\x07\r\x9b\x7f\u202e"
  assert printable("東京 é\tline\nline") == "東京 é\tline\nline"
  assert printable("\udcff") == r"\udcff"
