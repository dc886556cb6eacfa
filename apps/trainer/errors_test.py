"""Tests of messages and exit codes of errors of the machine."""

import errno
import os
import re

import pytest

from apps.trainer.errors import (
  MAX_MESSAGE,
  TEMPORARY_FAILURE,
  UserError,
  exit_code,
  one_line,
  report,
  run_errors,
  user_errors,
)
from apps.trainer.startup import Terminated


def end(error, step=8):
  """Return the UserError that an error of a run is converted to."""
  with pytest.raises(UserError) as caught, run_errors("/runs/a", lambda: step):
    raise error
  return caught.value


@pytest.mark.parametrize(
  ("number", "code", "remedy"),
  (
    (errno.ENOSPC, TEMPORARY_FAILURE, "free space and give the same command again"),
    (errno.EDQUOT, TEMPORARY_FAILURE, "free space and give the same command again"),
    (errno.EIO, TEMPORARY_FAILURE, "check the disk"),
    (errno.ESTALE, TEMPORARY_FAILURE, "check the network file system"),
    (errno.ECONNRESET, TEMPORARY_FAILURE, "give the same command again"),
    (errno.EROFS, 2, "make it writable and give the same command again"),
    (errno.EACCES, 2, "make it writable and give the same command again"),
    (errno.ENOENT, 2, "restore it and give the same command again"),
  ),
)
def test_os_error_message(number, code, remedy):
  error = end(OSError(number, os.strerror(number), "/runs/a/metrics.jsonl"))
  message = f"/runs/a/metrics.jsonl: {os.strerror(number)}; the checkpoint of step 8 is complete; "
  assert str(error).startswith(message) and remedy in str(error)
  assert exit_code(error) == code


def test_error_without_path_names_workdir():
  assert str(end(OSError(errno.ENOSPC, "full"))).startswith("/runs/a: No space left on device; ")


def test_error_without_checkpoint():
  assert "; no checkpoint yet; " in str(end(OSError(errno.ENOSPC, "full"), step=None))


def test_unreadable_checkpoints_do_not_hide_error():
  def deleted():
    raise FileNotFoundError("/runs/a/checkpoints")

  expected = "^/runs/a: No such file or directory; restore it"
  with pytest.raises(UserError, match=expected), run_errors("/runs/a", deleted):
    raise FileNotFoundError(errno.ENOENT, "gone")


def test_library_error_for_full_disk_is_temporary():
  error = end(OSError("saving step 4 failed: No space left on device. Make space"))
  assert str(error) == "saving step 4 failed: No space left on device. Make space"
  assert exit_code(error) == TEMPORARY_FAILURE


def test_killed_worker_is_temporary():
  error = end(ChildProcessError("a worker process ended with code -9; give the same command again"))
  assert str(error).startswith("a worker process ended with code -9")
  assert exit_code(error) == TEMPORARY_FAILURE


def test_checkpoint_is_mentioned_once():
  inner, outer = (run_errors("/runs/a", lambda step=step: step) for step in (4, 8))
  with pytest.raises(UserError) as caught, outer, inner, user_errors():
    raise OSError(errno.EACCES, "Permission denied", "/runs/a/evaluations/8.json")
  expected = "/runs/a/evaluations/8.json: Permission denied; the checkpoint of step 8 is complete"
  assert str(caught.value) == expected


def test_newest_checkpoint_is_mentioned():
  """The inner context exits first, then the checkpoints are closed."""
  for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt("stopped")):
    inner, outer = run_errors("/runs/a", lambda: 8), run_errors("/runs/a", lambda: 12)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught, outer, inner:
      raise error
    assert str(caught.value).count("the checkpoint of step 12 is complete; ") == 1
    assert "step 8" not in str(caught.value)
    assert str(caught.value).count("give the same command again") == 1


def test_out_of_memory():
  error = end(MemoryError("Unable to allocate 2.00 GiB"))
  assert "too little memory: Unable to allocate 2.00 GiB; the checkpoint of step 8" in str(error)
  assert exit_code(error) == 2
  error = end(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"))
  assert "devices have too little memory" in str(error) and "config.batch_size" in str(error)


def test_bug_keeps_traceback():
  with pytest.raises(RuntimeError, match="^bug$"), run_errors("/runs/a", lambda: 8):
    raise RuntimeError("bug")


@pytest.mark.parametrize(
  ("error", "message"),
  (
    (KeyError("x"), "KeyError: 'x'"),
    (TypeError("got an unexpected keyword argument 'x'"), "TypeError: got an unexpected"),
    (re.error("missing ]", "[", 0), f"{re.error.__name__}: missing ]"),
    (MemoryError(), "this machine has too little memory"),
    (OverflowError("Python int too large"), "OverflowError: Python int too large"),
    (ValueError(), "ValueError"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/data"), "/data: No such file"),
  ),
)
def test_setup_errors(error, message):
  with pytest.raises(UserError, match=f"^{re.escape(message)}"), user_errors():
    raise error


def test_signals(capsys):
  for error, code in (
    (KeyboardInterrupt("stopped by SIGINT (Ctrl-C)"), 130),
    (Terminated("t"), 143),
  ):
    with pytest.raises(KeyboardInterrupt) as caught, run_errors("/runs/a", lambda: 8):
      raise error
    assert report(caught.value) == code
  first, _ = capsys.readouterr().err.splitlines()
  assert first.endswith(
    "stopped by SIGINT (Ctrl-C); the checkpoint of step 8 is complete; give the same command again "
    "to resume"
  )


def test_control_characters_are_escaped(capsys):
  assert report(UserError("/tmp/\x1b[31mred\x07\udcff\n\u202etxt: gone")) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith(r"error: /tmp/\x1b[31mred\x07\udcff \u202etxt: gone")


def test_long_message_is_shortened_in_the_middle():
  text = one_line(ValueError(f"name={'x' * 10**6}; choose a shorter one"))
  assert len(text) <= MAX_MESSAGE
  assert text.startswith("name=xxx") and text.endswith("choose a shorter one")
  assert "(1,000,027 characters)" in text
  assert one_line(ValueError("a\n b")) == "a b"
