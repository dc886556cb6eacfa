"""The metadata of a checkpoint: one JSON file, read into typed fields and checked for consistency.

metadata = read_metadata(checkpoint)   # the JSON as a dict, of a run or of an import
saved = parse_metadata(metadata)       # its fields that the trainer depends on
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Annotated, Any

from etils import epath
import msgspec

from apps.trainer.history import Count, History, Span

FORMAT = 1  # of the metadata and the directory; raise it with a breaking change

_Fact = str | int | float | bool | None


class CheckpointError(OSError):
  """A checkpoint cannot be written, found or restored; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class StageData:
  """What the report says about the data of one stage.

  Attributes:
    facts: records, epochs and so on, see `inputs.describe`.
    skipped: broken records among those read, by reason.
  """

  facts: dict[str, _Fact]
  skipped: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class LoaderState:
  """State of an `ov_data.Loader`."""

  position: Count
  fingerprint: str
  order: dict[str, Any]
  skipped: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class Metadata:
  """What the trainer reads of a checkpoint.

  An import has no stage, no loader and no history; a checkpoint of an earlier version has no
  history, no number of examples and no data of stages.

  Attributes:
    step: finished steps of the run.
    format: see `FORMAT`.
    versions: of Python and libraries.
    stage: name of the stage that ran this step.
    loader: state of its data.
    tokenizer: fingerprint of the run's tokenizer.
    config: resolved configuration of the stage.
    examples: examples seen by all stages.
    history: the spans of the run's `History`.
    stages: stage name -> its data.
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


def read_metadata(checkpoint: epath.Path) -> dict[str, Any]:
  """Return the JSON saved with a checkpoint directory.

  Raises:
    CheckpointError: it is damaged, or was written in a newer format.
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
    ValueError: a field has another type, or the counters contradict the history of the run.
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
  """Compare examples seen and position with the history; ValueError where they differ."""
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
