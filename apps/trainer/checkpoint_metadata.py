"""Checkpoint metadata: one JSON file, parsed into typed fields and checked for consistency.

metadata = read_metadata(checkpoint)   # the JSON as a dict, of a run or of an import
saved = parse_metadata(metadata)       # the fields that the trainer depends on
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Annotated, Any

from etils import epath
import msgspec

from apps.trainer.history import Count, History, Span

FORMAT = 1  # version of the metadata and the directory layout; increase it for breaking changes

_Fact = str | int | float | bool | None


class CheckpointError(OSError):
  """A checkpoint cannot be written, found or restored; the message includes the remedy."""


@dataclasses.dataclass(frozen=True)
class StageData:
  """Data of one stage, for the report.

  Attributes:
    facts: number of records, epochs and so on, see `inputs.describe`.
    skipped: number of invalid records by reason.
  """

  facts: dict[str, _Fact]
  skipped: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class TeacherIdentity:
  """Teacher of a distillation; checkpoints do not contain its parameters.

  Attributes:
    path: folder that it was read from.
    fingerprint: 16 hex digits over its configuration and parameters.
  """

  path: str
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class LoaderState:
  """State of an `ov_data.Loader`."""

  position: Count
  fingerprint: str
  order: dict[str, Any]
  skipped: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class Metadata:
  """Checkpoint fields that the trainer reads.

  An imported model has no stage, loader or history. Checkpoints of earlier versions have no
  history, number of examples or data of stages.

  Attributes:
    step: number of completed steps of the run.
    format: version of the metadata, see `FORMAT`.
    versions: versions of Python and the libraries.
    stage: name of the stage that ran this step.
    loader: state of the loader of the stage.
    tokenizer: fingerprint of the tokenizer.
    config: resolved configuration of the stage.
    examples: number of examples seen in all stages.
    history: the spans of the run's `History`.
    stages: stage name -> data of the stage.
    teacher: teacher of the stage; None without one.
  """

  step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
  format: Annotated[int, msgspec.Meta(ge=1)]
  versions: dict[str, str]
  stage: str | None = None
  loader: LoaderState | None = None
  tokenizer: str | None = None
  config: dict[str, Any] | None = None
  examples: Count | None = None
  history: tuple[Span, ...] = ()
  stages: dict[str, StageData] = dataclasses.field(default_factory=dict)
  teacher: TeacherIdentity | None = None


def read_metadata(checkpoint: epath.Path) -> dict[str, Any]:
  """Return the JSON saved with a checkpoint directory.

  Raises:
    CheckpointError: the metadata are damaged, or have a newer format.
  """
  path = checkpoint / "metadata" / "metadata"
  try:
    metadata = json.loads(path.read_text())
    parse_metadata(metadata)
  except (ValueError, RecursionError, OSError) as error:
    raise CheckpointError(f"{path} cannot be used: {error}") from error
  return metadata


def parse_metadata(metadata: Mapping[str, Any]) -> Metadata:
  """Convert the metadata of a checkpoint to typed fields.

  Raises:
    ValueError: a field has the wrong type, or the counters contradict the history of the run.
  """
  try:
    saved = msgspec.convert(metadata, type=Metadata)
  except msgspec.ValidationError as error:
    raise ValueError(f"unexpected metadata: {error}") from error
  if saved.format > FORMAT:
    raise ValueError(
      f"it has format {saved.format}, this code reads up to {FORMAT}; "
      f"use the code that wrote it (library versions {saved.versions})"
    )
  if saved.history:
    _check_counters(saved)
  return saved


def _check_counters(saved: Metadata) -> None:
  """Raise ValueError if the number of examples or the position contradicts the history."""
  history = History(saved.history)
  last = saved.history[-1]
  if saved.stage != last.stage or saved.step < last.first_step:
    raise ValueError(
      f"step {saved.step} of stage {saved.stage!r} does not fit its history, which ends in stage "
      f"{last.stage!r} after step {last.first_step}"
    )
  expected = history.examples(saved.step)
  if saved.examples != expected:
    raise ValueError(f"examples is {saved.examples}, but its history counts {expected}")
  expected = history.position(saved.step)
  if saved.loader is not None and saved.loader.position != expected:
    raise ValueError(
      f"loader.position is {saved.loader.position}, but its history counts {expected}"
    )
