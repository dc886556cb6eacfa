"""What a run would be, without training.

`--check` shows sizes, memory, steps and the first batch; `--compile` compiles the train steps.
"""

from pathlib import Path
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich.console import Console
from rich.table import Table

from apps.trainer import inputs
from apps.trainer.compile_cache import CompileCache, Program, megabytes, short_key
from apps.trainer.config import check_values, to_json
from apps.trainer.errors import user_errors
from apps.trainer.held_out import HeldOut
from apps.trainer.loop import App, Parts, build_parts, build_step
from apps.trainer.progress import Terminal
from apps.trainer.stages import resolve_stages
from apps.trainer.task import abstract_batch
from apps.trainer.workdir import Workdir
import ov_models
import ov_sharding


def check_run(config: ConfigDict, workdir: Workdir, app: App, terminal: Terminal) -> None:
  """Resolves every stage, builds its abstract state, reads one batch each; trains nothing.

  Raises:
    UserError: what would stop the run, in one line.
  """
  with user_errors(), tempfile.TemporaryDirectory() as scratch:
    check_values(config)
    CompileCache(config.compile_cache, config.compile_store, terminal.phase)
    print(to_json(config), end="")
    stages = resolve_stages(config)
    mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(**config.mesh))
    kept = workdir.path / "tokenizer"
    where = workdir if kept.exists() else Workdir(Path(scratch))
    tokenizer = inputs.open_tokenizer(config, where, terminal)
    table = Table("", title=f"{workdir.place}: {_devices()}")
    columns = []
    for stage in stages:
      table.add_column(stage.name, justify="right")
      parts = build_parts(stage.config, app.make_task, tokenizer, mesh)
      # Opens the held-out data.
      app.make_evaluate(HeldOut(stage.config, parts.task, tokenizer, mesh, terminal))
      columns.append(_facts(stage.config, parts, tokenizer, mesh, stage.index))
    for name in columns[0]:
      table.add_row(name, *(column[name] for column in columns))
    Console().print(table)
    print("check passed")


def compile_run(config: ConfigDict, workdir: Workdir, app: App, terminal: Terminal) -> None:
  """Compiles the train step of every stage for the devices that are here; trains nothing.

  What came out is in the compile cache and, where there is one, in the store. No array is made. The
  tokenizer is made as by the run, for its special ids are part of the program.

  Raises:
    UserError: settings that cannot be, or a store that cannot be written.
  """
  with user_errors():
    check_values(config)
    cache = CompileCache(config.compile_cache, config.compile_store, terminal.phase)
    stages = resolve_stages(config)
    mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(**config.mesh))
    tokenizer = inputs.open_tokenizer(config, workdir, terminal)
    table = Table("stage", "seconds", "", "program", "size", "peak of a device", title=_devices())
    with cache:
      cache.fetch()
      for stage in stages:
        parts = build_parts(stage.config, app.make_task, tokenizer, mesh)
        step = build_step(stage.config, parts, mesh, stage.index)
        rows, sharding = stage.config.batch_size, ov_sharding.batch_sharding(mesh)
        batch = abstract_batch(parts.task, rows, sharding)
        terminal.phase(f"{stage.name}: compiling the train step")
        with ov_models.on_mesh(mesh), cache.watch(f"{stage.name}: train step") as programs:
          compiled = step.lower(parts.abstract, batch).compile()
        table.add_row(stage.name, *_compiled(programs[-1], compiled))
      cache.push(required=True)
  if jax.process_index() == 0:
    Console().print(table)


def _compiled(program: Program, compiled: jax.stages.Compiled) -> tuple[str, ...]:
  """Seconds, what happened, key, size, peak memory."""
  memory = compiled.memory_analysis()
  peak = "-" if memory is None else _mebibytes(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )  # fmt: skip
  return (
    f"{program.seconds:.1f}",
    "loaded" if program.loaded else "compiled",
    short_key(program.key) if program.key else "-",
    megabytes(program.size) if program.size is not None else "not kept",
    peak,
  )


def _devices() -> str:
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _facts(
  config: ConfigDict, parts: Parts, tokenizer: Any, mesh: jax.sharding.Mesh, index: int
) -> dict[str, str]:
  task = parts.task
  with inputs.train_loader(config, task, tokenizer, mesh, index) as loader:
    batch = next(loader)
    records = loader.num_examples
  state = ov_sharding.bytes_per_device(parts.abstract, parts.shardings)
  params = ov_sharding.bytes_per_device(parts.abstract["params"], parts.shardings["params"])
  arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
  in_batch = sum(v.nbytes for v in arrays.values()) / mesh.local_mesh.size
  examples = config.total_steps * config.batch_size
  return {
    "parameters": f"{ov_models.num_params(task.abstract_params()):,}",
    "params per device": _mebibytes(params),
    "optimizer and counters per device": _mebibytes(state - params),
    "batch per device": _mebibytes(in_batch),
    "image": f"{task.image_size} px",
    "text positions": f"{task.text_len:,}",
    "tokenizer entries": f"{tokenizer.vocab_size:,}",
    "batch": f"{config.batch_size:,}",
    "steps": f"{config.total_steps:,}",
    "examples": f"{examples:,}",
    "text tokens": f"{examples * task.text_len:,}",
    "records": f"{records:,}",
    "epochs": f"{examples / records:.2f}",
    "model FLOPs per example": f"{task.flops_per_example:.3g}",
    "first batch": f"{int(batch['valid'].sum())} of {len(batch['valid'])} rows good",
  }


def _mebibytes(size: float) -> str:
  return f"{size / 2**20:,.1f} MiB"
