"""What all stages of a run share."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from apps.trainer.checkpoint import Checkpoints
from apps.trainer.compile_cache import CompileCache
from apps.trainer.hosts import Hosts
from apps.trainer.progress import Terminal
from apps.trainer.sinks import MetricWriter
from apps.trainer.stages import Stage
from apps.trainer.stop import StopRequest
from apps.trainer.task import Evaluation
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
  hosts: Hosts
  cache: CompileCache
  evaluation: Evaluation | None = None
  evaluated_step: int = 0  # what `evaluation` is of
  model_name: str = ""
  num_params: int = 0
  init_from: list[str] = dataclasses.field(default_factory=list)
  data: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
