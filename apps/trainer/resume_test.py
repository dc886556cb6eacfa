"""Tests of the progress restored from a checkpoint, and of settings that prevent a resume."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from apps.trainer.checkpoint import Checkpoints, find_checkpoint
from apps.trainer.checkpoint_metadata import TeacherIdentity
from apps.trainer.history import History, Span
from apps.trainer.resume import check_resumes, check_step
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage

STATE = {"params": {"w": jnp.zeros(2)}, "step": jnp.int32(0)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)


def stages(*steps, batch_size=16, ema_decay=None):
  """Return stages a, b, ... with these numbers of steps."""
  found, first = [], 0
  for index, total in enumerate(steps):
    config = {"total_steps": total, "batch_size": batch_size, "model": {"token_len": 8}}
    config["optimizer"] = {"ema_decay": ema_decay}
    found.append(Stage(index, "abc"[index], RunConfig.parse(config), first))
    first += total
  return found


def save(folder, step, ran=(("a", 0, 16),), **more):
  """Save a checkpoint after `step` steps; `ran` contains stage, first step and batch size."""
  history = History()
  for span in ran:
    history.begin(*span)
  name = ran[-1][0]
  metadata = {
    "stage": name,
    "tokenizer": "t1",
    "config": {"batch_size": ran[-1][2], "optimizer": {"ema_decay": None}},
    "loader": {
      "position": history.position(step), "fingerprint": "f", "order": {}, "skipped": {"bad": 3}
    },
    "examples": history.examples(step),
    "history": [dataclasses.asdict(span) for span in history.spans],
    "stages": {name: {"facts": {"records": 9}, "skipped": {"bad": 3}}},
  }  # fmt: skip
  metadata = {key: value for key, value in (metadata | more).items() if value is not None}
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(step, STATE, metadata)
  return find_checkpoint(folder)


def resume(saved, of, first=0, abstract=ABSTRACT, tokenizer="t1", eval_only=False):
  return check_resumes(saved, of, first, abstract, tokenizer, eval_only=eval_only)


OLD = {"examples": None, "history": None, "stages": None}


def test_progress_is_independent_of_settings(tmp_path):
  saved = save(tmp_path, 8, (("a", 0, 16), ("a", 4, 8)))
  progress = resume(saved, stages(8, batch_size=4))
  assert progress.history.examples(8) == 96 and not progress.note
  assert progress.stages["a"].skipped == {"bad": 3} and progress.stages["a"].facts == {"records": 9}


@pytest.mark.parametrize("tokenizer, ema", [("t1", 0.5), ("t2", None)])
def test_incompatible_settings(tmp_path, tokenizer, ema):
  saved = save(tmp_path, 8)
  abstract = ABSTRACT | ({"ema": ABSTRACT["params"]} if ema else {})
  with pytest.raises((ValueError, OSError)) as error:
    resume(saved, stages(8, ema_decay=ema), abstract=abstract, tokenizer=tokenizer)
  message = str(error.value)
  assert "\n" not in message
  if ema:
    assert "Settings that differ: config.optimizer.ema_decay: saved null, now 0.5." in message
  else:
    assert "not the tokenizer of" in message and "is t2, not t1" in message


def test_fewer_total_steps_can_only_be_evaluated(tmp_path):
  saved = save(tmp_path, 8)
  message = r"config.total_steps: the configuration ends after step 7, but .*/8 holds step 8"
  with pytest.raises(ValueError, match=message):
    resume(saved, stages(7))
  assert resume(saved, stages(7), eval_only=True).history.examples(8) == 128
  assert resume(saved, stages(8)).history.examples(8) == 128


def test_changed_stages_are_rejected(tmp_path):
  saved = save(tmp_path, 15, (("a", 0, 16), ("b", 10, 8)))
  assert resume(saved, stages(10, 10), first=1).history.examples(15) == 200
  with pytest.raises(ValueError, match="'b' began after step 10, the config begins it after .* 12"):
    resume(saved, stages(12, 10), first=1)
  with pytest.raises(ValueError, match=r"belongs to stage 'b', the config puts .*'a' \(steps 1 to"):
    resume(saved, stages(20, 10), first=0)
  with pytest.raises(ValueError, match="ends after step 14"):
    resume(saved, stages(10, 4), first=1)
  # Where the stage before ended, the next one starts from its parameters.
  assert resume(saved, stages(10, 5, 9), first=2).history.examples(15) == 200
  with pytest.raises(ValueError, match="belongs to stage 'b', the config puts that step into 'a'"):
    resume(saved, stages(15, 5), first=1)


def test_state_step_must_match_settings():
  stage = stages(10, 10)[1]
  check_step(5, 15, stage)
  with pytest.raises(
    ValueError, match="'b' began after step 8, the config begins it after step 10"
  ):
    check_step(7, 15, stage)


def test_progress_of_earlier_versions_is_derived(tmp_path):
  saved = save(tmp_path / "one", 15, (("a", 0, 16), ("b", 10, 8)), **OLD)
  progress = resume(saved, stages(10, 10), first=1)
  assert progress.history.spans == (Span("a", 0, 0, 0, 16), Span("b", 10, 160, 0, 8))
  assert progress.stages["b"].skipped == {"bad": 3}
  assert "was saved by an earlier version: examples seen (200) follow" in progress.note
  # With another batch size on the way, the position still counts what was read.
  saved = save(tmp_path / "two", 8, (("a", 0, 16), ("a", 3, 8)), **OLD)
  progress = resume(saved, stages(10))
  assert progress.history.examples(8) == progress.history.position(8) == 88
  progress.history.begin("a", 8, 4)
  assert progress.history.examples(10) == 96


def test_other_teacher(tmp_path):
  saved = save(tmp_path, 8, teacher={"path": "/a", "fingerprint": "f1"})
  check = lambda teacher, **options: check_resumes(
    saved, stages(9), 0, ABSTRACT, "t1", teacher, **{"eval_only": False} | options
  )
  assert check(TeacherIdentity("/moved", "f1")).history.examples(8) == 128
  assert check(None, eval_only=True).history.examples(8) == 128
  for teacher, said in (
    (TeacherIdentity("/b", "f2"), r"the teacher /a \(fingerprint f1\), and .* /b \(fingerprint f2"),
    (None, "this run has no teacher; set config.loss.more as it was"),
  ):
    with pytest.raises(ValueError, match=said):
      check(teacher)
