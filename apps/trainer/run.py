"""What all stages of a run share."""

import dataclasses

import jax
from ml_collections import ConfigDict

from apps.trainer.checkpoint import Checkpoints
from apps.trainer.checkpoint_metadata import StageData
from apps.trainer.history import History
from apps.trainer.hooks import Hooks
from apps.trainer.progress import Terminal
from apps.trainer.sinks import MetricWriter
from apps.trainer.stages import Stage
from apps.trainer.stop import StopRequest
from apps.trainer.workdir import Workdir
import ov_data


@dataclasses.dataclass
class Run:
  """Opened once; the fields with defaults collect what the report shows."""

  config: ConfigDict
  workdir: Workdir
  stages: list[Stage]
  tokenizer: ov_data.Tokenizer
  mesh: jax.sharding.Mesh
  terminal: Terminal
  checkpoints: Checkpoints
  writer: MetricWriter
  stop: StopRequest
  hooks: Hooks
  history: History  # of the steps so far
  stage_data: dict[str, StageData]  # by name of the stage
  step: int = 0  # finished steps of the stages that ended, and of the one that runs at its end
  model_name: str = ""
  num_params: int = 0
  init_from: list[str] = dataclasses.field(default_factory=list)
