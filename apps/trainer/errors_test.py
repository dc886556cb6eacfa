"""Errors of the machine end in one line with path, what is saved, remedy and exit code."""

import errno
import os
import re

import pytest

from apps.trainer.errors import (
  AGAIN,
  MAX_MESSAGE,
  UserError,
  exit_code,
  one_line,
  report,
  run_errors,
  user_errors,
)
from apps.trainer.startup import Terminated


def end(error, step=8):
  """The UserError that an error of a run becomes."""
  with pytest.raises(UserError) as caught, run_errors("/runs/a", lambda: step):
    raise error
  return caught.value


@pytest.mark.parametrize(
  ("number", "code", "remedy"),
  (
    (errno.ENOSPC, AGAIN, "free space and give the same command again"),
    (errno.EDQUOT, AGAIN, "free space and give the same command again"),
    (errno.EIO, AGAIN, "check the disk"),
    (errno.ESTALE, AGAIN, "check the network file system"),
    (errno.ECONNRESET, AGAIN, "give the same command again"),
    (errno.EROFS, 2, "make it writable and give the same command again"),
    (errno.EACCES, 2, "make it writable and give the same command again"),
    (errno.ENOENT, 2, "restore it and give the same command again"),
  ),
)
def test_an_error_of_the_machine_says_path_reason_checkpoint_and_remedy(number, code, remedy):
  error = end(OSError(number, os.strerror(number), "/runs/a/metrics.jsonl"))
  said = f"/runs/a/metrics.jsonl: {os.strerror(number)}; the checkpoint of step 8 is complete; "
  assert str(error).startswith(said) and remedy in str(error)
  assert exit_code(error) == code


def test_an_error_without_a_path_names_the_workdir():
  assert str(end(OSError(errno.ENOSPC, "full"))).startswith("/runs/a: No space left on device; ")


def test_without_a_checkpoint_the_line_says_so():
  assert "; no checkpoint yet; " in str(end(OSError(errno.ENOSPC, "full"), step=None))


def test_checkpoints_that_cannot_be_read_hide_nothing():
  def deleted():
    raise FileNotFoundError("/runs/a/checkpoints")

  expected = "^/runs/a: No such file or directory; restore it"
  with pytest.raises(UserError, match=expected), run_errors("/runs/a", deleted):
    raise FileNotFoundError(errno.ENOENT, "gone")


def test_the_text_of_a_library_about_a_full_disk_asks_for_a_new_start():
  error = end(OSError("saving step 4 failed: No space left on device. Make space"))
  assert str(error) == "saving step 4 failed: No space left on device. Make space"
  assert exit_code(error) == AGAIN


def test_a_killed_worker_asks_for_a_new_start():
  error = end(ChildProcessError("a worker process ended with code -9; give the same command again"))
  assert str(error).startswith("a worker process ended with code -9")
  assert exit_code(error) == AGAIN


def test_an_error_of_a_phase_tells_the_checkpoint_once():
  inner, outer = (run_errors("/runs/a", lambda step=step: step) for step in (4, 8))
  with pytest.raises(UserError) as caught, outer, inner, user_errors():
    raise OSError(errno.EACCES, "Permission denied", "/runs/a/evaluations/8.json")
  expected = "/runs/a/evaluations/8.json: Permission denied; the checkpoint of step 8 is complete"
  assert str(caught.value) == expected


def test_a_save_that_ends_meanwhile_is_the_one_that_is_said():
  """The inner context is left first, then the checkpoints are closed."""
  for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt("stopped")):
    inner, outer = run_errors("/runs/a", lambda: 8), run_errors("/runs/a", lambda: 12)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught, outer, inner:
      raise error
    assert str(caught.value).count("the checkpoint of step 12 is complete; ") == 1
    assert "step 8" not in str(caught.value)
    assert str(caught.value).count("give the same command again") == 1


def test_too_little_memory():
  error = end(MemoryError("Unable to allocate 2.00 GiB"))
  assert "too little memory: Unable to allocate 2.00 GiB; the checkpoint of step 8" in str(error)
  assert exit_code(error) == 2
  error = end(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"))
  assert "devices have too little memory" in str(error) and "config.batch_size" in str(error)


def test_a_bug_keeps_its_traceback():
  with pytest.raises(RuntimeError, match="^bug$"), run_errors("/runs/a", lambda: 8):
    raise RuntimeError("bug")


@pytest.mark.parametrize(
  ("error", "said"),
  (
    (KeyError("x"), "KeyError: 'x'"),
    (TypeError("got an unexpected keyword argument 'x'"), "TypeError: got an unexpected"),
    (re.error("missing ]", "[", 0), "error: missing ]"),
    (MemoryError(), "this machine has too little memory"),
    (OverflowError("Python int too large"), "OverflowError: Python int too large"),
    (ValueError(), "ValueError"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/data"), "/data: No such file"),
  ),
)
def test_mistakes_found_in_the_set_up(error, said):
  with pytest.raises(UserError, match=f"^{re.escape(said)}"), user_errors():
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


def test_control_characters_of_a_path_are_escaped(capsys):
  assert report(UserError("/tmp/\x1b[31mred\x07\udcff\n\u202etxt: gone")) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith(r"error: /tmp/\x1b[31mred\x07\udcff \u202etxt: gone")


def test_a_long_message_keeps_its_beginning_and_its_remedy():
  text = one_line(ValueError(f"name={'x' * 10**6}; choose a shorter one"))
  assert len(text) <= MAX_MESSAGE
  assert text.startswith("name=xxx") and text.endswith("choose a shorter one")
  assert "(1,000,027 characters)" in text
  assert one_line(ValueError("a\n b")) == "a b"
