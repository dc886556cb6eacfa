"""What an app brings, and what a stage is made of before anything is allocated."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from apps.trainer.augment import make_preprocess
from apps.trainer.config import augment_config, optimizer_config
from apps.trainer.held_out import HeldOut
from apps.trainer.limits import check_patches
from apps.trainer.optimizer import Optimizer, make_optimizer
from apps.trainer.state import TrainState, abstract_state, state_shardings, with_shardings
from apps.trainer.step import Projected, TwoPhase, make_train_step
from apps.trainer.task import Evaluate, Task
import ov_data
import ov_sharding

MakeTask = Callable[[ConfigDict, ov_data.Tokenizer, jax.sharding.Mesh], Task]


class App(NamedTuple):
  """What an app brings.

  Attributes:
    make_task: (stage config, tokenizer, mesh) -> Task.
    make_evaluate: HeldOut of a stage -> Evaluate; None without held-out data.
  """

  make_task: MakeTask
  make_evaluate: Callable[[HeldOut], Evaluate | None]


class Parts(NamedTuple):
  """A stage before anything is allocated; the leaves of `abstract` carry their shardings."""

  task: Task
  optimizer: Optimizer
  abstract: TrainState
  shardings: TrainState


def build_parts(
  config: ConfigDict,
  make_task: MakeTask,
  tokenizer: ov_data.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Parts:
  """Task, optimizer and abstract state of a stage; raises ValueError for impossible settings."""
  task = make_task(config, tokenizer, mesh)
  check_patches(task)
  params = task.abstract_params()
  wanted = optimizer_config(config)
  optimizer = make_optimizer(wanted, params, config.total_steps)
  abstract = abstract_state(params, optimizer.tx, ema=wanted.ema_decay is not None)
  of_params = ov_sharding.tree_shardings(task.logical_axes(), params, mesh)
  shardings = state_shardings(abstract, of_params, mesh)
  return Parts(task, optimizer, with_shardings(abstract, shardings), shardings)


def build_step(
  config: ConfigDict, parts: Parts, mesh: jax.sharding.Mesh, stage_index: int
) -> jax.stages.Wrapped:
  """The jitted train step of a stage; enter `ov_models.on_mesh(mesh)` around its first call."""
  task, optimizer, seed = parts.task, parts.optimizer, config.seed + stage_index
  return make_train_step(
    task.loss,
    optimizer.tx,
    state_shardings=parts.shardings,
    batch_sharding=ov_sharding.batch_sharding(mesh),
    seed=seed,
    learning_rate=optimizer.learning_rate,
    accumulate=config.accumulate,
    preprocess=make_preprocess(augment_config(config), seed),
    ema_decay=config.optimizer.ema_decay,
    trainable=optimizer.trainable,
    two_phase=task if isinstance(task, TwoPhase) else None,
    project=task.project if isinstance(task, Projected) else None,
  )
