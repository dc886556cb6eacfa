"""Checks whether a run can resume from its newest checkpoint, and what it continues from."""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from apps.trainer.checkpoint import check_restorable, read_metadata
from apps.trainer.checkpoint_metadata import Metadata, StageData, TeacherIdentity, parse_metadata
from apps.trainer.history import History, Span
from apps.trainer.init_from import plan_init
from apps.trainer.init_source import open_source
from apps.trainer.stages import Stage
from apps.trainer.state import TrainState


class Progress(NamedTuple):
  """Progress of a run.

  Attributes:
    history: steps so far.
    stages: stage name -> data of the stage for the report.
    note: what a checkpoint of an earlier version lacks; empty if complete.
  """

  history: History
  stages: dict[str, StageData]
  note: str = ""


def check_resumes(
  saved: epath.Path,
  stages: Sequence[Stage],
  first: int,
  abstract: TrainState,
  tokenizer: str,
  teacher: TeacherIdentity | None = None,
  *,
  eval_only: bool,
) -> Progress:
  """Check that a run can resume from a checkpoint, or evaluate it.

  Args:
    saved: directory of the checkpoint.
    stages: stages of the run.
    first: index of the stage that resumes, or that starts from the parameters.
    abstract: abstract state of that stage.
    tokenizer: fingerprint of the run's tokenizer.
    teacher: teacher of that stage; ignored by an evaluation.
    eval_only: whether the run only evaluates.

  Returns:
    The progress saved in the checkpoint.

  Raises:
    ValueError, OSError: the checkpoint does not fit the settings; the message is one line.
  """
  metadata, stage = parse_metadata(read_metadata(saved)), stages[first]
  step = metadata.step
  if step > (end := stages[-1].last_step) and not eval_only:
    raise ValueError(
      f"config.total_steps: the configuration ends after step {end:,}, but {saved} holds step "
      f"{step:,}, and a run cannot go back; set config.total_steps to at least what was trained, "
      "choose another --workdir, or evaluate the checkpoint with --config.eval_only"
    )
  if metadata.tokenizer not in (None, tokenizer):
    raise ValueError(
      f"tokenizer/ is not the tokenizer of {saved}: its fingerprint is {tokenizer}, not "
      f"{metadata.tokenizer}, so token numbers would mean other words; copy back the tokenizer "
      "folder that this run was trained with"
    )
  if step > stage.first_step:
    _check_stage(metadata, stage)
    if not eval_only:
      _check_teacher(saved, metadata.teacher, teacher)
    check_restorable(saved, abstract, config=stage.config.to_dict(), saved_config=metadata.config)
  else:
    if step and first:
      _check_stage(metadata, stages[first - 1])
    plan_init(open_source(saved), abstract["params"])
  return _progress(saved, metadata, stages)


def check_step(state_step: int, saved: int, stage: Stage) -> None:
  """Check that the state of a checkpoint is at the step where the configuration expects it.

  Args:
    state_step: number of updates of the stage in the state.
    saved: step of the checkpoint.
    stage: stage that the configuration assigns to that step.

  Raises:
    ValueError: the stages before it had other numbers of steps.
  """
  if stage.first_step + state_step != saved:
    raise ValueError(_other_start(saved, stage, saved - state_step))


def _check_stage(metadata: Metadata, stage: Stage) -> None:
  """Raise ValueError unless `stage` ran the step of a checkpoint, with the same first step."""
  step = metadata.step
  if metadata.stage != stage.name:
    raise ValueError(
      f"checkpoint {step} belongs to stage {metadata.stage!r}, the config puts that step into "
      f"{stage.name!r} (steps {stage.first_step + 1:,} to {stage.last_step:,}); keep the names and "
      "total_steps of the stages of a run as they were, or choose another --workdir"
    )
  began = History(metadata.history).first_step(stage.name)
  if began not in (None, stage.first_step):
    raise ValueError(_other_start(step, stage, began))


def _check_teacher(
  saved: epath.Path, before: TeacherIdentity | None, now: TeacherIdentity | None
) -> None:
  """Raise ValueError unless a checkpoint was trained with the same teacher, at any path."""
  fingerprints = [None if t is None else t.fingerprint for t in (before, now)]
  if fingerprints[0] != fingerprints[1]:
    described = [
      "no teacher" if t is None else f"the teacher {t.path} (fingerprint {t.fingerprint})"
      for t in (before, now)
    ]
    raise ValueError(
      f"{saved} was trained with {described[0]}, and this run has {described[1]}; set "
      "config.loss.more as it was, or start another --workdir with config.init_from"
    )


def _other_start(step: int, stage: Stage, began: int) -> str:
  return (
    f"checkpoint {step}: its stage {stage.name!r} began after step {began:,}, the config begins it "
    f"after step {stage.first_step:,}; keep total_steps of the stages before it as they were, or "
    "choose another --workdir"
  )


def _progress(saved: epath.Path, metadata: Metadata, stages: Sequence[Stage]) -> Progress:
  """Return the progress in the metadata of a checkpoint, derived for earlier versions."""
  if metadata.history or metadata.loader is None or metadata.stage is None:
    return Progress(History(metadata.history), dict(metadata.stages))
  spans = []
  examples = 0
  for stage in stages:
    if stage.name == metadata.stage:
      break
    size = int(stage.config.batch_size)
    spans.append(Span(stage.name, stage.first_step, examples, 0, size))
    examples += stage.config.total_steps * size
  else:
    stage = stages[0]
  position = metadata.loader.position
  steps = metadata.step - stage.first_step
  if steps and position and position % steps == 0:
    spans.append(Span(stage.name, stage.first_step, examples, 0, position // steps))
  else:  # the batch size changed during the stage
    size = int(stage.config.batch_size)
    spans = [Span(stage.name, metadata.step, examples + position, position, size)]
  loader = metadata.loader
  facts: dict[str, str | int | float | bool | None] = {
    "examples read": position, "fingerprint": loader.fingerprint
  }  # fmt: skip
  return Progress(
    History(spans),
    {stage.name: StageData(facts, loader.skipped)},
    f"{saved} was saved by an earlier version: examples seen ({examples + position:,}) follow from "
    "its data position and the configured stages, and the report lacks the data of earlier stages",
  )
