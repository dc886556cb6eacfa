"""Dry runs: `--check` validates a run and prints its sizes, `--compile` compiles its train steps.

`--check` opens everything that the run opens and prints sizes, memory, steps and the first batch.
"""

from pathlib import Path
import tempfile

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from apps.trainer import inputs
from apps.trainer.checkpoint import read_metadata, saved_checkpoint
from apps.trainer.compile_cache import Program, short_key
from apps.trainer.compile_store import megabytes
from apps.trainer.config import to_json
from apps.trainer.errors import user_errors
from apps.trainer.parts import MakeEvaluate, peak_bytes, plan_step
from apps.trainer.prepare import Prepared, open_model, prepare
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.task import Evaluate
from apps.trainer.workdir import Workdir
import ov_data
import ov_models
import ov_sharding


def check_run(
  config: RunConfig, workdir: Workdir, make_evaluate: MakeEvaluate, terminal: Terminal
) -> None:
  """Open everything that the run opens and read one batch of each stage, without training.

  Raises:
    UserError: the run would fail; the message gives the reason in one line.
  """
  with user_errors(), tempfile.TemporaryDirectory() as scratch:
    print(to_json(config), end="")
    kept = workdir.path / "tokenizer"
    home = workdir if ov_data.Tokenizer.is_complete(kept) else Workdir(Path(scratch))
    prepared = prepare(config, workdir, make_evaluate, terminal, tokenizer_home=home)
    for plan in prepared.init:
      terminal.phase(plan.report.text())
    if prepared.saved is not None:
      verb = "evaluates" if config.eval_only else "resumes from"
      terminal.phase(f"{prepared.checkpoints}: the run {verb} step {prepared.saved:,}")
    table = Table("", title=f"{workdir.uri}: {_devices()}")
    columns = []
    for index, (stage, _, evaluate, _) in enumerate(prepared.stages):
      table.add_column(stage.name, justify="right")
      columns.append(_facts(prepared, index) | {"evaluators": describe_evaluators(evaluate)})
    for name in columns[0]:
      table.add_row(name, *(column.get(name, "") for column in columns))
    Console().print(table)
    print("check passed")


def describe_evaluators(evaluate: Evaluate | None) -> str:
  """Return the names of the evaluators of a stage, in one line."""
  parts = getattr(evaluate, "parts", () if evaluate is None else (evaluate,))
  return ", ".join(type(part).__name__ for part in parts) or "none"


def compile_run(config: RunConfig, workdir: Workdir, terminal: Terminal) -> None:
  """Compile the train step of every stage for the local devices, without training.

  The programs are written to the compile cache and to the store, if one is set. No array is
  allocated. The tokenizer is created as in a run, because its special ids are part of the program.

  Raises:
    UserError: the settings are invalid, or the store cannot be written.
  """
  with user_errors():
    stages, parts_of, mesh, _, cache = open_model(config, workdir, terminal)
    table = Table("stage", "seconds", "", "program", "size", "peak of a device", title=_devices())
    with cache:
      cache.fetch()
      for stage, parts in zip(stages, parts_of, strict=True):
        plan = plan_step(stage, parts, mesh)
        terminal.phase(f"{stage.name}: compiling the train step")
        with cache.watch(f"{stage.name}: train step") as programs:
          compiled = plan.lower().compile()
        table.add_row(stage.name, *_compiled(programs[-1], compiled))
      cache.push(required=True)
  if jax.process_index() == 0:
    Console().print(table)


def _compiled(program: Program, compiled: jax.stages.Compiled) -> tuple[str, ...]:
  """Return the seconds, outcome, key, size and peak memory of a program as table cells."""
  memory = compiled.memory_analysis()
  peak = "-" if memory is None else _mebibytes(peak_bytes(memory))
  return (
    f"{program.seconds:.1f}",
    "loaded" if program.loaded else "compiled",
    short_key(program.key) if program.key else "-",
    megabytes(program.size) if program.size is not None else "not cached",
    peak,
  )


def _devices() -> str:
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _facts(prepared: Prepared, index: int) -> dict[str, str]:
  """Return the sizes of a stage and of its first batch; skip data that the run does not open."""
  stage, parts, *_ = prepared.stages[index]
  config, task = stage.config, parts.task
  state = ov_sharding.bytes_per_device(parts.abstract, parts.shardings)
  params = ov_sharding.bytes_per_device(parts.abstract["params"], parts.shardings["params"])
  examples = config.total_steps * config.batch_size
  facts = {
    "parameters": f"{ov_models.num_params(task.model):,}",
    "params per device": _mebibytes(params),
    "optimizer and counters per device": _mebibytes(state - params),
    "image": f"{task.image_size} px",
    "text positions": f"{task.text_len:,}",
    "tokenizer entries": f"{prepared.tokenizer.vocab_size:,}",
    "batch": f"{config.batch_size:,}",
    "steps": f"{config.total_steps:,}",
    "examples": f"{examples:,}",
    "text tokens": f"{examples * task.text_len:,}",
    "model FLOPs per example": f"{task.flops_per_example:.3g}",
  }
  if config.eval_only:
    return facts
  first = prepared.loader if index == prepared.first else None
  with first or inputs.train_loader(
    config, task, prepared.tokenizer, prepared.mesh, stage.index
  ) as loader:
    saved = prepared.saved or 0
    if index == prepared.first and saved > stage.first_step:
      checkpoint = saved_checkpoint(prepared.checkpoints, prepared.saved)
      assert checkpoint is not None
      loader.restore(read_metadata(checkpoint)["loader"])
    batch = next(loader)
    records, dropped = loader.num_examples, sum(loader.dropped.values())
  arrays = [value for value in batch.values() if isinstance(value, np.ndarray)]
  in_batch = sum(array.nbytes for array in arrays) / prepared.mesh.local_mesh.size
  return facts | {
    "batch per device": _mebibytes(in_batch),
    "records": f"{records:,}",
    **({"dropped by keep-lists": f"{dropped:,}"} if dropped else {}),
    "epochs": f"{examples / records:.2f}",
    "first batch": f"{int(batch['valid'].sum())} of {len(batch['valid'])} rows good",
  }


def _mebibytes(size: float) -> str:
  return f"{size / 2**20:,.1f} MiB"
