"""Preparation of a run: opens and checks everything before any expensive operation.

A run and `--check` both call `prepare`, so they report the same errors.
"""

from collections.abc import Callable, Container, Sequence
import contextlib
import os
from pathlib import Path
import tempfile
from typing import NamedTuple

from etils import epath
import jax

from apps.trainer import inputs
from apps.trainer.checkpoint import absolute_path, saved_checkpoint
from apps.trainer.checkpoint_folder import check_path
from apps.trainer.compile_cache import DISK_FULL, CompileCache
from apps.trainer.config import check_values, init_sources, to_json
from apps.trainer.held_out import HeldOut
from apps.trainer.history import History
from apps.trainer.init_from import InitPlan, check_tokenizer, plan_init
from apps.trainer.init_source import open_source
from apps.trainer.limits import border_note, check_batch_memory
from apps.trainer.parts import MakeEvaluate, Parts, build_parts
from apps.trainer.progress import Terminal
from apps.trainer.resume import Progress, check_resumes
from apps.trainer.run_config import RunConfig
from apps.trainer.sinks import check_wandb
from apps.trainer.stages import Stage, resolve_stages
from apps.trainer.stored_teacher import AnyTeacher, StoredTeacher, open_teacher
from apps.trainer.task import Evaluate
from apps.trainer.workdir import Workdir
import ov_data
import ov_sharding

Waiting = Callable[[], contextlib.AbstractContextManager[None]]


class PreparedStage(NamedTuple):
  """One opened stage.

  Attributes:
    stage: configuration and steps of the stage.
    parts: task, optimizer and abstract state of the stage.
    evaluate: evaluators; None without held-out data, and for stages that will not run.
    teacher: teacher of a distillation; None without one, and for stages that will not train.
  """

  stage: Stage
  parts: Parts
  evaluate: Evaluate | None
  teacher: AnyTeacher | None


class Prepared(NamedTuple):
  """An opened run; nothing is allocated on devices.

  Attributes:
    stages: all stages.
    first: index of the first stage to train or evaluate.
    mesh: mesh of the devices.
    tokenizer: tokenizer of the run.
    cache: compile cache of the run, not yet entered.
    checkpoints: directory of the checkpoints.
    saved: step of the checkpoint to resume from or to evaluate; None without one.
    progress: progress of the run up to `saved`.
    init: plans of the initialisation from other runs; empty on resume.
    loader: training data of the first stage; None for an evaluation.
  """

  stages: list[PreparedStage]
  first: int
  mesh: jax.sharding.Mesh
  tokenizer: ov_data.Tokenizer
  cache: CompileCache
  checkpoints: str
  saved: int | None
  progress: Progress
  init: list[InitPlan]
  loader: ov_data.Loader | None


class Model(NamedTuple):
  """Models of all stages, and their dependencies."""

  stages: list[Stage]
  parts: list[Parts]
  mesh: jax.sharding.Mesh
  tokenizer: ov_data.Tokenizer
  cache: CompileCache


def open_model(config: RunConfig, workdir: Workdir, terminal: Terminal) -> Model:
  """Check all values and build the abstract state of every stage.

  Args:
    config: configuration of the run.
    workdir: workdir that contains the tokenizer, or receives it.
    terminal: terminal that shows the phases.

  Raises:
    ValueError, OSError: the settings or the tokenizer are invalid.
  """
  check_values(config)
  cache = CompileCache(config.compile_cache, config.compile_store, terminal.phase)
  stages = resolve_stages(config)
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(**config.mesh.to_dict()))
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  terminal.phase(f"{devices}, mesh {dict(mesh.shape)}")
  tokenizer = inputs.open_tokenizer(config, workdir, terminal)
  parts = [build_parts(stage.config, tokenizer, mesh) for stage in stages]
  for stage, (task, *_) in zip(stages, parts, strict=True):
    check_batch_memory(stage.config, task)
    if note := border_note(task):
      terminal.phase(f"{stage.name}: {note}")
  return Model(stages, parts, mesh, tokenizer, cache)


def prepare(
  config: RunConfig,
  workdir: Workdir,
  make_evaluate: MakeEvaluate,
  terminal: Terminal,
  waiting: Waiting = contextlib.nullcontext,
  *,
  tokenizer_home: Workdir | None = None,
) -> Prepared:
  """Open everything that a run opens.

  Args:
    config: configuration of the run.
    workdir: workdir of the run.
    make_evaluate: function that creates the evaluators of a stage.
    terminal: terminal that shows the phases.
    waiting: context manager entered while an evaluation waits for its next batch.
    tokenizer_home: workdir of the tokenizer, if not `workdir`.

  Raises:
    ValueError, OSError, UserError: the run would fail; the message is one line.
  """
  _check_paths(config, workdir)
  model = open_model(config, tokenizer_home or workdir, terminal)
  tasks = [parts.task for parts in model.parts]
  inputs.check_text_processor(workdir, [task.text_processor(model.tokenizer) for task in tasks])
  checkpoints = config.checkpoint.dir or workdir.checkpoints
  saved = saved_checkpoint(checkpoints, config.eval.checkpoint_step)
  step = int(saved.name) if saved is not None else None
  first = _first_stage(model.stages, step, config.eval_only)
  init: list[InitPlan] = []
  progress = Progress(History(), {})
  teachers: dict[str, AnyTeacher] = {}
  teacher = None if config.eval_only else open_teacher(tasks[first], teachers)
  if saved is not None and int(saved.name) > 0:
    progress = check_resumes(
      saved,
      model.stages,
      first,
      model.parts[first].abstract,
      model.tokenizer.fingerprint,
      None if teacher is None else teacher.identity,
      eval_only=config.eval_only,
    )
    if progress.note:
      terminal.phase(progress.note)
  else:  # a new run
    init = _plan_init(config, model, workdir, checkpoints, terminal)
  stages = []
  loader = None
  seen = set()
  for stage, parts in zip(model.stages, model.parts, strict=True):
    evaluate, teacher = None, None
    if stage.index == first or (stage.index > first and not config.eval_only):
      inputs.check_batch_size(stage.config, model.mesh)
      data = to_json(stage.config.input)
      if not config.eval_only and data not in seen:
        opened = inputs.train_loader(
          stage.config, parts.task, model.tokenizer, model.mesh, stage.index
        )
        if loader is None:
          loader = opened
        else:  # reopened by its stage
          opened.close()
      seen.add(data)
      if not config.eval_only:
        teacher = open_teacher(parts.task, teachers)
      if isinstance(teacher, StoredTeacher) and loader is not None:
        teacher.check(stage.config, loader, len(model.stages))
      held_out = HeldOut(
        stage.config,
        parts.task,
        model.tokenizer,
        model.mesh,
        terminal,
        waiting,
        workdir.path.name,
      )
      evaluate = make_evaluate(held_out)
      if config.eval_only and evaluate is None:
        raise ValueError(
          "eval_only: nothing to evaluate; set config.input.eval_data_dir or data of config.eval"
        )
    stages.append(PreparedStage(stage, parts, evaluate, teacher))
  return Prepared(
    stages,
    first,
    model.mesh,
    model.tokenizer,
    model.cache,
    str(checkpoints),
    step,
    progress,
    init,
    loader,
  )


def check_writable(path: epath.PathLike, setting: str, ignore: Container[int] = ()) -> None:
  """Check that a folder can be created and written, without leaving files.

  Args:
    path: path of the folder; folders in a bucket are not tested.
    setting: name of the setting, for the message.
    ignore: error numbers to ignore.

  Raises:
    OSError: the folder cannot be written; the message names the setting and the obstacle.
  """
  if "://" in str(path):
    return
  folder = Path(os.path.abspath(os.path.expanduser(path)))
  while not folder.exists():
    folder = folder.parent
  try:
    with tempfile.TemporaryDirectory(prefix=".write_test_", dir=folder):
      pass
  except OSError as error:
    if error.errno in ignore:
      return
    raise OSError(
      f"{setting}={path} cannot be written: {folder}: {error.strerror}; choose another folder"
    ) from error


def _check_paths(config: RunConfig, workdir: Workdir) -> None:
  """Check the folders that a run writes, and that Weights & Biases can be used if it is set."""
  if config.checkpoint.dir:
    check_path(config.checkpoint.dir, "config.checkpoint.dir=")
  else:
    check_path(workdir.uri, "--workdir=")
  if jax.process_index() == 0:
    for setting, path in (
      ("checkpoint.dir", config.checkpoint.dir),
      ("compile_cache", config.compile_cache),
      ("eval.per_example", config.eval.per_example),
    ):
      if path:  # a full disk disables the compile cache, but does not end the run
        ignore = DISK_FULL if setting == "compile_cache" else ()
        check_writable(path, f"config.{setting}", ignore)
    if config.wandb_project and not config.eval_only:
      check_wandb()


def _first_stage(stages: Sequence[Stage], saved: int | None, eval_only: bool) -> int:
  """Return the index of the stage to resume (the last if all are done), or that saved the step."""
  step = saved or 0
  here = [s.index for s in stages if step < s.last_step or (eval_only and step == s.last_step)]
  return here[0] if here else stages[-1].index


def _plan_init(
  config: RunConfig,
  model: Model,
  workdir: Workdir,
  checkpoints: epath.PathLike,
  terminal: Terminal,
) -> list[InitPlan]:
  """Return the plans of the first stage, one for each source of `config.init_from`."""
  sources = init_sources(model.stages[0].config)
  if not sources and (published := workdir.path / "checkpoint.npz").is_dir():
    raise ValueError(
      f"{published} was written by the released code and cannot be resumed here; set another "
      f"--workdir, and --config.ft_from={published} to start from its parameters"
    )
  if config.eval_only and not sources:
    raise ValueError(
      f"eval_only: {absolute_path(checkpoints)} holds no checkpoint; give the --workdir of a run, "
      "or --config.init_from.path"
    )
  plans = []
  for wanted in sources:
    terminal.phase(f"opening {wanted.setting}={wanted.path}")
    try:
      source = open_source(wanted.path, wanted.step, wanted.part)
      plan = plan_init(source, model.parts[0].abstract["params"], **wanted.options)
      check_tokenizer(plan.report, model.tokenizer.fingerprint)
    except (ValueError, OSError) as error:
      raise ValueError(f"{wanted.setting}={wanted.path}: {error}") from error
    plans.append(plan)
  return plans
