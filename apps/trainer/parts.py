"""Task, optimizer and abstract state of a stage, before anything is allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from apps.trainer import inputs
from apps.trainer.augment import make_preprocess
from apps.trainer.config import augment_config, make_task, optimizer_config
from apps.trainer.held_out import HeldOut
from apps.trainer.limits import check_patches
from apps.trainer.optimizer import Optimizer, make_optimizer
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage
from apps.trainer.state import TrainState, abstract_state, state_shardings, with_shardings
from apps.trainer.step import make_train_step
from apps.trainer.stored_teacher import with_teacher
from apps.trainer.task import Evaluate, Task, abstract_batch
import ov_data
import ov_models
import ov_sharding

MakeEvaluate = Callable[[HeldOut], Evaluate | None]  # returns None without held-out data


class Parts(NamedTuple):
  """A stage before allocation; the leaves of `abstract` carry their shardings."""

  task: Task
  optimizer: Optimizer
  abstract: TrainState
  shardings: TrainState


def build_parts(config: RunConfig, tokenizer: ov_data.Tokenizer, mesh: jax.sharding.Mesh) -> Parts:
  """Return task, optimizer and abstract state of a stage; raise ValueError for invalid settings."""
  task = with_teacher(make_task(config, tokenizer, mesh))
  check_patches(task)
  params = task.abstract_params()
  wanted = optimizer_config(config)
  optimizer = make_optimizer(wanted, params, config.total_steps)
  abstract = abstract_state(params, optimizer.tx, ema=wanted.ema_decay is not None)
  of_params = ov_sharding.tree_shardings(task.logical_axes(), params, mesh, ov_models.RULES)
  shardings = state_shardings(abstract, of_params, mesh)
  return Parts(task, optimizer, with_shardings(abstract, shardings), shardings)


def build_step(
  config: RunConfig, parts: Parts, mesh: jax.sharding.Mesh, stage_index: int
) -> jax.stages.Wrapped:
  """Return the jitted train step of a stage."""
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
    two_phase=task if task.two_phase else None,
    project=task.project,
  )


class Plan(NamedTuple):
  """The train step of a stage on a mesh, before anything is compiled.

  Attributes:
    config: settings of the stage; the batch size is that of `mesh`.
    parts: task, optimizer and abstract state.
    batch: abstract arrays of the batch of all devices.
    mesh: real or abstract devices.
    stage_index: index of the stage.
  """

  config: RunConfig
  parts: Parts
  batch: dict[str, jax.ShapeDtypeStruct]
  mesh: jax.sharding.Mesh
  stage_index: int

  def step(self) -> jax.stages.Wrapped:
    """Return the jitted train step."""
    return build_step(self.config, self.parts, self.mesh, self.stage_index)

  def lower(self) -> jax.stages.Lowered:
    """Trace and lower the train step; nothing is allocated."""
    return self.step().lower(self.parts.abstract, self.batch)


def peak_bytes(memory: Any) -> int:
  """Return the peak memory of a device from the `memory_analysis` of a compiled program."""
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def plan_step(stage: Stage, parts: Parts, mesh: jax.sharding.Mesh) -> Plan:
  """Return the abstract train step of a stage.

  Raises:
    ValueError: devices and micro-batches do not divide the batch size.
  """
  config = stage.config
  inputs.check_batch_size(config, mesh)
  batch = abstract_batch(parts.task, config.batch_size, ov_sharding.batch_sharding(mesh))
  return Plan(config, parts, batch, mesh, stage.index)
