"""The training loop: mesh, data, task, state, restore, steps, evaluation, report.

`run` goes through the stages of a configuration; `_train_stage` reads top to bottom. It knows no
task: an app gives it the two functions of `App`.

A run stopped at any point goes on exactly where its last checkpoint stands: a checkpoint holds
params, optimizer state, step and data position; the randomness of a step follows from (seed, step);
and all lines of metrics.jsonl up to a checkpoint are written before the checkpoint.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np
import ov_data
import ov_models
import ov_sharding

from apps.trainer import inputs
from apps.trainer.augment import make_preprocess
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.config import augment_config, optimizer_config, to_json
from apps.trainer.errors import UserError, user_errors
from apps.trainer.init_from import init_from
from apps.trainer.meter import Meter
from apps.trainer.optimizer import Optimizer, make_optimizer
from apps.trainer.progress import StageProgress, Terminal
from apps.trainer.sinks import MetricWriter
from apps.trainer.stages import Stage
from apps.trainer.state import (
  TrainState,
  abstract_state,
  init_state,
  state_shardings,
  with_shardings,
)
from apps.trainer.step import make_train_step
from apps.trainer.stop import StopRequest
from apps.trainer.task import Evaluate, Evaluation, Task

STEP_KEYS = ("image", "ids", "valid", "index")  # what a step needs of a batch


class App(NamedTuple):
  """What an app brings.

  Attributes:
    make_task: (stage config, tokenizer) -> Task.
    make_evaluate: (stage config, task, tokenizer, mesh) -> Evaluate; None without held-out data.
  """

  make_task: Callable[[ConfigDict, ov_data.Tokenizer], Task]
  make_evaluate: Callable[[ConfigDict, Task, ov_data.Tokenizer, jax.sharding.Mesh], Evaluate | None]


@dataclasses.dataclass
class Run:
  """What all stages share, and what the report wants to know at the end."""

  config: ConfigDict
  workdir: Path
  stages: list[Stage]
  tokenizer: ov_data.Tokenizer
  mesh: jax.sharding.Mesh
  terminal: Terminal
  writer: MetricWriter
  stop: StopRequest
  evaluation: Evaluation | None = None
  data: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)


class Parts(NamedTuple):
  """What a stage is made of before anything is allocated."""

  task: Task
  optimizer: Optimizer
  abstract: TrainState  # with shardings
  shardings: TrainState


def build_parts(config: ConfigDict, make_task: Callable, tokenizer: Any, mesh: Any) -> Parts:
  """Task, optimizer and abstract sharded state of a stage; raises ValueError for bad settings."""
  task = make_task(config, tokenizer)
  params = task.abstract_params()
  wanted = optimizer_config(config)
  optimizer = make_optimizer(wanted, params, config.total_steps)
  abstract = abstract_state(params, optimizer.tx, ema=wanted.ema_decay is not None)
  of_params = ov_sharding.tree_shardings(task.logical_axes(), params, mesh)
  shardings = state_shardings(abstract, of_params, mesh)
  return Parts(task, optimizer, with_shardings(abstract, shardings), shardings)


def train_stages(run: Run, app: App) -> str | None:
  """Trains every stage that is not finished; returns the signal that ended the run, if one did."""
  begun = [_checkpoints(run, stage).latest_step() is not None for stage in run.stages]
  first = max((i for i, has in enumerate(begun) if has), default=0)  # those before it are done
  params = None
  for stage in run.stages[first:]:
    state, signal = _train_stage(run, app, stage, params)
    if signal:
      return signal
    params = state["params"]
  return None


def _train_stage(run: Run, app: App, stage: Stage, previous: Any) -> tuple[TrainState, str | None]:
  """One stage; `previous` are the params of the stage before it, if that ran in this process."""
  config, mesh, say = stage.config, run.mesh, run.terminal.phase
  with user_errors():
    say(f"{stage.name}: building {config.model.encoder} + {config.model.decoder}")
    parts = build_parts(config, app.make_task, run.tokenizer, mesh)
    task, optimizer = parts.task, parts.optimizer
    say(f"{stage.name}: {ov_models.num_params(task.abstract_params()):,} parameters")
    train_step = make_train_step(
      task.loss,
      optimizer.tx,
      state_shardings=parts.shardings,
      batch_sharding=ov_sharding.batch_sharding(mesh),
      seed=config.seed,
      learning_rate=optimizer.learning_rate,
      accumulate=config.accumulate,
      preprocess=make_preprocess(augment_config(config), config.seed),
      ema_decay=config.optimizer.ema_decay,
      trainable=optimizer.trainable,
    )
    checkpoints = _checkpoints(run, stage)
    state, position = _start(run, stage, parts, checkpoints, previous)
    say(f"{stage.name}: opening the data")
    loader = inputs.train_loader(config, task, run.tokenizer, mesh, position, stage.index)
    evaluate = app.make_evaluate(config, task, run.tokenizer, mesh)

  trainer = _Stepper(run, stage, parts, checkpoints, loader, evaluate)
  with (
    loader,
    run.terminal.stage(
      stage.name,
      step=stage.first_step + int(state["step"]),
      first_step=stage.first_step,
      last_step=stage.last_step,
    ) as progress,
  ):
    state, signal = trainer.train(state, train_step, progress)
  checkpoints.close()
  run.data[f"Training ({stage.name})"] = inputs.describe(loader)
  for reason, count in loader.skipped.items():
    run.skipped[reason] = run.skipped.get(reason, 0) + count
  return state, signal
