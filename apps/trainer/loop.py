"""The training loop: mesh, data, task, state, restore, steps, evaluation, report.

`run_training` reads top to bottom. It knows no task: an app gives it the functions of `App`.

A run stopped at any point goes on exactly where its last checkpoint stands: a checkpoint holds
params, optimizer state, step and data position; the randomness of a step follows from (seed, step);
and all lines of metrics.jsonl up to a checkpoint are written before the checkpoint.
"""

from collections.abc import Callable
import contextlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from apps.trainer import inputs, summary
from apps.trainer.augment import make_preprocess
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.compile_cache import CompileCache
from apps.trainer.config import (
  augment_config,
  check_values,
  init_sources,
  optimizer_config,
  to_json,
)
from apps.trainer.errors import UserError, user_errors
from apps.trainer.held_out import HeldOut
from apps.trainer.hosts import Hosts
from apps.trainer.init_from import check_tokenizer, init_from
from apps.trainer.optimizer import Optimizer, make_optimizer, summarize_groups
from apps.trainer.progress import Terminal
from apps.trainer.run import Run
from apps.trainer.sinks import MetricWriter
from apps.trainer.stages import Stage, resolve_stages
from apps.trainer.state import (
  TrainState,
  abstract_state,
  init_state,
  replace_params,
  state_shardings,
  with_shardings,
)
from apps.trainer.step import TwoPhase, make_train_step
from apps.trainer.stepper import Stepper
from apps.trainer.stop import StopRequest
from apps.trainer.task import Evaluate, Task
from apps.trainer.workdir import Workdir
import ov_data
import ov_models
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
  )


def run_training(
  config: ConfigDict, workdir: Workdir, app: App, terminal: Terminal, hosts: Hosts
) -> int:
  """Trains all stages of `config` in `workdir`, or goes on with them; ends with report.html.

  Returns:
    The exit code: 0, or that of the signal that asked to stop before the end.

  Raises:
    UserError: settings, data or a checkpoint that cannot be used, told in one line.
  """
  with user_errors():
    check_values(config)
    cache = CompileCache(config.compile_cache, config.compile_store, terminal.phase)
    stages = resolve_stages(config)
    mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(**config.mesh))
    terminal.phase(
      f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}"
    )
    tokenizer = inputs.open_tokenizer(config, workdir, terminal)
    # Every stage is tried before the first one costs anything.
    tasks = [build_parts(stage.config, app.make_task, tokenizer, mesh).task for stage in stages]
    inputs.check_text_processor(workdir, [task.text_processor(tokenizer) for task in tasks])
    if jax.process_index() == 0 and not config.eval_only:
      (workdir.path / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(
      config.checkpoint.dir or workdir.checkpoints,
      keep_last=config.checkpoint.keep_last,
      keep_every=config.checkpoint.keep_every or None,
    )

  hosts.last_checkpoint = checkpoints.finished_step
  with cache, checkpoints, StopRequest() as stop, hosts.told():
    cache.fetch()
    with user_errors():
      saved = _saved_step(config, checkpoints)
    writer = MetricWriter(
      workdir.path,
      resume_step=saved,
      active=jax.process_index() == 0 and not config.eval_only,
      tensorboard=config.tensorboard,
      wandb_project=config.wandb_project or None,
      config=config.to_dict(),
    )
    with writer:
      run = Run(
        config, workdir, stages, tokenizer, mesh, terminal, checkpoints, writer, stop, hosts, cache
      )
      for stage in stages[_first_stage(stages, saved, config.eval_only) :]:
        try:
          signal = _train_stage(run, app, stage)
        except ov_data.TooManyBadRecords as error:
          raise UserError(str(error)) from error
        if signal:
          checkpoints.wait()
          terminal.phase(
            f"{signal}: stopped after a checkpoint of step {checkpoints.latest_step():,}; "
            "the same command goes on from there"
          )
          return stop.exit_code
        if config.eval_only:
          break
      summary.write(run)
      workdir.push()
      terminal.phase(f"done: {workdir.place}/report.html")
      return 0


def _saved_step(config: ConfigDict, checkpoints: Checkpoints) -> int | None:
  """The checkpoint to go on from, or to evaluate; None without any."""
  wanted = config.eval.checkpoint_step
  if wanted is not None and wanted not in checkpoints.all_steps():
    raise ValueError(
      f"config.eval.checkpoint_step={wanted}: {checkpoints.directory} holds the steps "
      f"{', '.join(map(str, checkpoints.all_steps())) or '(none)'}; config.checkpoint.keep_last "
      "and keep_every say which a run keeps"
    )
  return checkpoints.latest_step() if wanted is None else wanted


def _first_stage(stages: list[Stage], saved: int | None, eval_only: bool) -> int:
  """Index of the stage to go on with (the last where all are done), or that saved the step."""
  step = saved or 0
  here = [s.index for s in stages if step < s.last_step or (eval_only and step == s.last_step)]
  return here[0] if here else stages[-1].index


def _train_stage(run: Run, app: App, stage: Stage) -> str | None:
  """Trains one stage to its end; returns the signal that stopped it, if one did."""
  config, mesh, say = stage.config, run.mesh, run.terminal.phase
  with user_errors():
    parts = build_parts(config, app.make_task, run.tokenizer, mesh)
    task, optimizer = parts.task, parts.optimizer
    texts = task.text_processor(run.tokenizer)
    inputs.keep_text_processor(run.workdir, texts, replace=not config.eval_only)
    run.model_name = task.name
    run.num_params = ov_models.num_params(task.abstract_params())
    say(
      f"{stage.name}: {task.name} at {task.image_size} px, "
      f"{run.num_params:,} parameters, {config.total_steps:,} steps of {config.batch_size:,}"
    )
    wanted = config.optimizer
    if wanted.frozen or wanted.lr_multipliers or wanted.layer_decay:  # what the regexes matched
      say(f"{stage.name}: parameter groups\n{summarize_groups(optimizer.groups)}")
    train_step = build_step(config, parts, mesh, stage.index)
    say(f"{stage.name}: opening the data")
    loader = None
    if not config.eval_only:
      loader = inputs.train_loader(config, task, run.tokenizer, mesh, stage.index)
    state = _start(run, stage, parts, loader)
    waiting = run.hosts.waiting_for_input
    evaluate = app.make_evaluate(HeldOut(config, task, run.tokenizer, mesh, run.terminal, waiting))
    if config.eval_only and evaluate is None:
      raise ValueError(
        "eval_only: nothing to evaluate; set config.input.eval_data_dir or data of config.eval"
      )

  with (
    loader or contextlib.nullcontext(),
    run.terminal.stage(
      stage.name,
      step=stage.first_step + int(state["step"]),
      first_step=stage.first_step,
      last_step=stage.last_step,
    ) as progress,
    ov_models.on_mesh(mesh),
  ):
    stepper = Stepper(run, stage, task, evaluate, progress)
    if loader is None or int(state["step"]) == config.total_steps:
      stepper.evaluate(state, record=False)
      return None
    state, signal = stepper.train(state, train_step, loader)
  run.data[f"Training, stage {stage.name}"] = inputs.describe(loader)
  for reason, count in loader.skipped.items():
    run.skipped[reason] = run.skipped.get(reason, 0) + count
  return signal


def _start(run: Run, stage: Stage, parts: Parts, loader: ov_data.Loader | None) -> TrainState:
  """The state a stage begins or goes on with; sets the loader, if any, to where it belongs.

  1. the run's own checkpoint, 2. params of the stage before, 3. `config.init_from`, one source
  after the other, 4. scratch.
  """
  saved = _saved_step(run.config, run.checkpoints)
  if saved is not None and saved > stage.first_step:
    run.terminal.phase(f"{stage.name}: restoring step {saved:,}")
    state, metadata = run.checkpoints.restore(parts.abstract, saved)
    if metadata["stage"] != stage.name:
      raise ValueError(
        f"checkpoint {saved} belongs to stage {metadata['stage']!r}, the config puts that step"
        f" into {stage.name!r}; keep the stages of a run as they were, or choose another --workdir"
      )
    if loader is not None:
      loader.restore(metadata["loader"])
    return state
  if run.config.eval_only and not init_sources(stage.config):
    raise ValueError(
      f"eval_only: {run.checkpoints.directory} holds no checkpoint; give the --workdir of a run, "
      "or --config.init_from.path"
    )
  run.terminal.phase(f"{stage.name}: initialising")
  state = init_state(
    parts.task.init, jax.random.key(stage.config.seed), parts.optimizer.tx, parts.shardings
  )
  if stage.index:  # the params the stage before ended with
    run.checkpoints.wait()
    sources = [{"source": run.checkpoints.directory, "step": saved}]
  else:
    sources = init_sources(stage.config)
  for number, source in enumerate(sources):
    params, report = init_from(params=state["params"], **source)
    check_tokenizer(report, run.tokenizer.fingerprint)
    state = replace_params(state, params)
    run.terminal.phase(report.text())
    run.init_from.append(report.source)
    if jax.process_index() == 0:
      report.save(run.workdir.path / f"init_from_{stage.name}{f'_{number}' if number else ''}.json")
  return state
