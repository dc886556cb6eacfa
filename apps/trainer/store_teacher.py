"""Store the teacher's embedding of every position of a run: `--store_teacher=FOLDER`.

The flags of the run define data, order, augmentation and number of steps. The embeddings are
computed by the program that the run itself would use, on the same batches.
"""

import os
import shutil
from typing import Any

import jax
import msgspec
import numpy as np

from apps.trainer.errors import UserError, user_errors
from apps.trainer.prepare import check_writable, prepare
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.stored_teacher import EMBEDDINGS_FILE, FORMAT, INDEX_FILE, Stored, pixels_of
from apps.trainer.teacher import Teacher
from apps.trainer.workdir import Workdir
import ov_data
from ov_data import fs
import ov_sharding

_KEYS = ("image", "index")


def store_teacher(config: RunConfig, workdir: Workdir, terminal: Terminal, folder: str) -> None:
  """Write the embeddings of all positions of a run to a folder.

  Args:
    config: configuration of the run, with a distillation loss that names a teacher.
    workdir: workdir of the run; provides the tokenizer.
    terminal: terminal that shows the progress.
    folder: output folder; must not contain embeddings.

  Raises:
    UserError: the run would fail, it has several stages or processes, or the folder cannot be used.
  """
  folder = os.path.expanduser(folder)
  with user_errors():
    if len(config.stages) > 1 or jax.process_count() > 1:
      raise ValueError(
        f"--store_teacher={folder} supports one stage and one process, not "
        f"{max(1, len(config.stages))} and {jax.process_count()}; use a teacher without storing"
      )
    if "://" in folder:
      raise ValueError(f"--store_teacher={folder}; expected a local folder")
    if os.path.exists(os.path.join(folder, INDEX_FILE)):
      raise ValueError(f"--store_teacher={folder} already holds embeddings; choose another folder")
    check_writable(folder, "--store_teacher")
    prepared = prepare(config, workdir, lambda held_out: None, terminal)
    stage, _, _, teacher = prepared.stages[0]
    loader = prepared.loader
    if not isinstance(teacher, Teacher) or loader is None:
      raise ValueError(
        f"--store_teacher={folder}: the run has no teacher; set "
        "--config.loss.more=\"{'distill': {'weight': 1.0, 'teacher': '/data/teacher'}}\""
      )
    config = stage.config
    rows, dim = config.total_steps * config.batch_size, teacher.tower.dim
    os.makedirs(folder, exist_ok=True)
    size, free = 4 * rows * dim, shutil.disk_usage(folder).free
    if size > free:
      raise OSError(
        f"--store_teacher={folder}: {rows:,} embeddings need {size:,} bytes and {free:,} are free; "
        "choose another disk, or fewer config.total_steps"
      )
    unfinished = os.path.join(folder, f"{EMBEDDINGS_FILE}.unfinished")
    table = np.lib.format.open_memmap(unfinished, "w+", np.float32, (rows, dim))
  mesh = prepared.mesh
  embed = teacher.embedder(config, mesh, stage.index)
  terminal.phase(f"storing {rows:,} embeddings of {teacher.identity.path} in {folder}")
  pending: tuple[dict[str, Any], jax.Array] | None = None
  with loader, terminal.count("steps", config.total_steps) as advance, prepared.cache:
    for _ in range(config.total_steps):
      try:
        batch = next(loader)
      except ov_data.TooManyBadRecords as error:
        raise UserError(str(error)) from error
      found = embed(ov_sharding.global_batch({name: batch[name] for name in _KEYS}, mesh))
      if pending is not None:  # the devices compute while the previous rows are written
        _write(table, *pending)
      pending = batch, found
      advance(1)
    assert pending is not None  # total_steps is at least 1
    _write(table, *pending)
    pixels = pixels_of(config, loader)
  with user_errors():
    table.flush()
    del table
    os.replace(unfinished, os.path.join(folder, EMBEDDINGS_FILE))
    computed = {
      "batch_size": config.batch_size,
      "accumulate": config.accumulate,
      "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "dtype": config.model.dtype,
    }
    stored = Stored(FORMAT, teacher.identity, rows, dim, pixels, computed)
    index = msgspec.json.format(msgspec.json.encode(stored), indent=2)
    fs.write_atomic(os.path.join(folder, INDEX_FILE), index + b"\n")


def _write(table: np.ndarray, batch: dict[str, Any], embeddings: jax.Array) -> None:
  """Write the rows of a batch at their positions; rows of broken records become NaN."""
  rows = np.asarray(embeddings).copy()
  rows[~batch["valid"]] = np.nan
  table[batch["index"]] = rows
