"""Training loop: mesh, data, task, state, restore, steps, evaluation, report.

`run_training` is independent of losses and evaluators.

An interrupted run resumes exactly from its last checkpoint: a checkpoint contains parameters,
optimizer state, step and data position; the random keys of a step follow from (seed, step); and all
lines of metrics.jsonl up to a checkpoint are written before the checkpoint.
"""

import contextlib

import jax

from apps.trainer import inputs
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.checkpoint_metadata import StageData
from apps.trainer.config import to_json
from apps.trainer.errors import UserError, run_errors, user_errors
from apps.trainer.hooks import Hooks
from apps.trainer.init_from import plan_init
from apps.trainer.init_source import open_source
from apps.trainer.optimizer import summarize_groups
from apps.trainer.parts import MakeEvaluate, build_step
from apps.trainer.prepare import Prepared, PreparedStage, prepare
from apps.trainer.progress import Terminal
from apps.trainer.resume import check_step
from apps.trainer.run import Run
from apps.trainer.run_config import RunConfig
from apps.trainer.sinks import MetricWriter
from apps.trainer.startup import printable
from apps.trainer.state import TrainState, init_state, replace_params
from apps.trainer.stepper import Stepper
from apps.trainer.stop import StopRequest
from apps.trainer.stored_teacher import add_teacher
from apps.trainer.workdir import Workdir
import ov_data
from ov_data import fs
import ov_models


def run_training(
  config: RunConfig,
  workdir: Workdir,
  make_evaluate: MakeEvaluate,
  terminal: Terminal,
  hooks: Hooks,
) -> int:
  """Train all stages of `config` in `workdir`, or resume them.

  Args:
    config: configuration of the run.
    workdir: workdir of the run.
    make_evaluate: function that creates the evaluators of a stage.
    terminal: terminal that shows the phases.
    hooks: hooks of the run; the compile cache is added.

  Returns:
    The exit code: 0, or that of the signal that stopped the run early.

  Raises:
    UserError: settings, data or a checkpoint are invalid; the message is one line.
  """
  with user_errors():
    prepared = prepare(config, workdir, make_evaluate, terminal, hooks.waiting_for_input)
    stages, mesh, tokenizer = prepared.stages, prepared.mesh, prepared.tokenizer
    if jax.process_index() == 0 and not config.eval_only:
      fs.write_atomic(str(workdir.path / "config.json"), to_json(config).encode())
    checkpoints = Checkpoints(
      prepared.checkpoints,
      keep_last=config.checkpoint.keep_last,
      keep_every=config.checkpoint.keep_every or None,
      read_only=config.eval_only,
    )

  cache, saved = prepared.cache, prepared.saved
  hooks.add(cache)
  saving = run_errors(printable(workdir.uri), checkpoints.finished_step)
  with cache, checkpoints, StopRequest() as stop, hooks.errors(), saving:
    cache.fetch()
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
        config,
        workdir,
        [prepared_stage.stage for prepared_stage in stages],
        tokenizer,
        mesh,
        terminal,
        checkpoints,
        writer,
        stop,
        hooks,
        prepared.progress.history,
        prepared.progress.stages,
      )
      hooks.on_start(run)
      for stage in stages[prepared.first :]:
        try:
          signal = _train_stage(run, stage, prepared)
        except ov_data.TooManyBadRecords as error:
          raise UserError(str(error)) from error
        if signal:
          with user_errors():
            checkpoints.wait()
          step = checkpoints.latest_step()
          terminal.phase(
            f"{signal}: stopped before the first step; the same command starts again"
            if step is None
            else f"{signal}: stopped after a checkpoint of step {step:,}; the same command resumes "
            "from there"
          )
          return stop.exit_code
        if config.eval_only:
          break
      hooks.on_end()
      return 0


def _train_stage(run: Run, prepared_stage: PreparedStage, prepared: Prepared) -> str | None:
  """Train one stage to its end; return the signal that stopped it, if any."""
  stage, parts, evaluate, teacher = prepared_stage
  config, mesh, phase = stage.config, run.mesh, run.terminal.phase
  with user_errors():
    task, optimizer = parts.task, parts.optimizer
    texts = task.text_processor(run.tokenizer)
    inputs.save_text_processor(run.workdir, texts, replace=not config.eval_only)
    run.model_name = task.name
    run.num_params = ov_models.num_params(task.model)
    phase(
      f"{stage.name}: {task.name} at {task.image_size} px, "
      f"{run.num_params:,} parameters, {config.total_steps:,} steps of {config.batch_size:,}"
    )
    wanted = config.optimizer
    if wanted.frozen or wanted.lr_multipliers or wanted.layer_decay:  # show what the regexes match
      phase(f"{stage.name}: parameter groups\n{summarize_groups(optimizer.groups)}")
    train_step = build_step(config, parts, mesh, stage.index)
    add = identity = None
    if teacher is not None:
      identity = teacher.identity
      phase(f"{stage.name}: teacher {identity.path}, fingerprint {identity.fingerprint}")
      add = add_teacher(teacher, config, mesh, stage.index)
    loader = prepared.loader
    if stage.index > prepared.first:
      phase(f"{stage.name}: opening the data")
      loader = inputs.train_loader(config, task, run.tokenizer, mesh, stage.index)
    state = _start(run, prepared_stage, prepared, loader)
    step = stage.first_step + int(state["step"])
    if loader is not None and step < stage.last_step:
      run.history.begin(stage.name, step, config.batch_size)

  with (
    loader or contextlib.nullcontext(),
    run.terminal.stage(
      stage.name,
      step=step,
      first_step=stage.first_step,
      last_step=stage.last_step,
    ) as progress,
  ):
    stepper = Stepper(run, stage, task, evaluate, progress, add, identity)
    signal = None
    if loader is None or step == stage.last_step:
      stepper.evaluate(state, record=False)
    else:
      if config.eval.warn_below_initial and stage.index == step == 0:
        stepper.evaluate(state)
      state, signal = stepper.train(state, train_step, loader)
  run.step = stage.first_step + int(state["step"])
  if loader is not None:
    run.stage_data[stage.name] = StageData(inputs.describe(loader), dict(loader.skipped))
  return signal


def _start(
  run: Run, prepared_stage: PreparedStage, prepared: Prepared, loader: ov_data.Loader | None
) -> TrainState:
  """Return the initial state of a stage, and set the position of the loader, if any.

  The source is the first of: 1. the run's own checkpoint, 2. the parameters of the previous stage,
  3. `config.init_from`, one source after the other, 4. random initialisation.
  """
  stage, parts = prepared_stage.stage, prepared_stage.parts
  saved = prepared.saved if stage.index == prepared.first else run.checkpoints.latest_step()
  if saved is not None and saved > stage.first_step:
    run.terminal.phase(f"{stage.name}: restoring step {saved:,}")
    state, metadata = run.checkpoints.restore(parts.abstract, saved)
    check_step(int(state["step"]), saved, stage)
    if loader is not None:
      loader.restore(metadata["loader"])
    run.imported = metadata.get("imported")
    return state
  run.terminal.phase(f"{stage.name}: initialising")
  state = init_state(
    parts.task.init, jax.random.key(stage.config.seed), parts.optimizer.tx, parts.shardings
  )
  init = prepared.init
  if stage.index:  # parameters of the previous stage
    run.checkpoints.wait()
    source = open_source(run.checkpoints.directory, saved)
    resize = parts.task.model.encoder.position_resize
    init = [plan_init(source, state["params"], position_resize=resize)]
  for number, plan in enumerate(init):
    state = replace_params(state, plan.apply(state["params"]))
    run.terminal.phase(plan.report.text())
    run.init_from.append(plan.report.source)
    run.imported = run.imported or plan.source.imported
    if jax.process_index() == 0:
      name = f"init_from_{stage.name}{f'_{number}' if number else ''}.json"
      plan.report.save(run.workdir.path / name)
  init.clear()  # a plan may hold arrays in host memory
  return state
