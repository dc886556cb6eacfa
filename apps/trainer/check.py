"""`--check`: what a run would be, without training: sizes, memory, steps, the first batch."""

from pathlib import Path
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich.console import Console
from rich.table import Table

from apps.trainer import inputs
from apps.trainer.config import check_values, to_json
from apps.trainer.errors import user_errors
from apps.trainer.held_out import HeldOut
from apps.trainer.loop import App, Parts, build_parts
from apps.trainer.progress import Terminal
from apps.trainer.stages import resolve_stages
import ov_models
import ov_sharding


def check_run(config: ConfigDict, workdir: Path, app: App, terminal: Terminal) -> None:
  """Resolves every stage, builds its abstract state, reads one batch each; trains nothing.

  Raises:
    UserError: what would stop the run, in one line.
  """
  with user_errors(), tempfile.TemporaryDirectory() as scratch:
    check_values(config)
    print(to_json(config), end="")
    stages = resolve_stages(config)
    mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(**config.mesh))
    kept = workdir / "tokenizer"
    tokenizer = inputs.open_tokenizer(config, workdir if kept.exists() else Path(scratch), terminal)
    table = Table(title=f"{workdir}: {jax.device_count()} x {jax.devices()[0].device_kind}")
    table.add_column("")
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
