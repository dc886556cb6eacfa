"""State of a run that all stages share."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from apps.trainer.checkpoint import Checkpoints
from apps.trainer.checkpoint_metadata import StageData
from apps.trainer.history import History
from apps.trainer.hooks import Hooks
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.sinks import MetricWriter
from apps.trainer.stages import Stage
from apps.trainer.stop import StopRequest
from apps.trainer.workdir import Workdir
import ov_data


@dataclasses.dataclass
class Run:
  """Opened once; the fields with defaults collect the content of the report."""

  config: RunConfig
  workdir: Workdir
  stages: list[Stage]
  tokenizer: ov_data.Tokenizer
  mesh: jax.sharding.Mesh
  terminal: Terminal
  checkpoints: Checkpoints
  writer: MetricWriter
  stop: StopRequest
  hooks: Hooks
  history: History  # history of the steps so far
  stage_data: dict[str, StageData]  # by stage name
  step: int = 0  # completed steps of finished stages, and of the current one once it ends
  model_name: str = ""
  num_params: int = 0
  imported: Mapping[str, Any] | None = None  # origin and licence of the initial parameters
  init_from: list[str] = dataclasses.field(default_factory=list)
