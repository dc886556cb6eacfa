"""Embeddings of a teacher for every position of a run, and the teacher of a stage.

A folder written by `--store_teacher` contains

  embeddings.npy   float32 [P, E]; row p belongs to position p of the training stream
  teacher.json     identity of the teacher, and the settings that determine the pixels

Record, crop and colour jitter are functions of (seed, position). A run with the same data, seed and
input settings therefore sees the pixels that were embedded, in every epoch, without stored crop
parameters. A row of a broken record is NaN.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

import jax
import msgspec
import numpy as np

from apps.trainer.checkpoint_metadata import TeacherIdentity
from apps.trainer.errors import UserError
from apps.trainer.losses.distill import FromTeacher
from apps.trainer.run_config import RunConfig
from apps.trainer.task import Task
from apps.trainer.teacher import Batch, Teacher, open_tower, read_teacher
import ov_data
import ov_sharding

INDEX_FILE, EMBEDDINGS_FILE = "teacher.json", "embeddings.npy"
FORMAT = 1

AddTeacher = Callable[[Batch, Mapping[str, np.ndarray]], Batch]


@dataclasses.dataclass(frozen=True)
class Stored:
  """Content of `teacher.json`.

  Attributes:
    format: version of the folder.
    teacher: identity of the teacher.
    rows, dim: shape of the embeddings.
    pixels: settings that determine the pixels at a position, see `pixels_of`.
    computed: batch size, micro-batches, devices and dtype of the program, for information.
  """

  format: int
  teacher: TeacherIdentity
  rows: int
  dim: int
  pixels: dict[str, Any]
  computed: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
  """Stored embeddings, which replace a teacher.

  Attributes:
    path: folder.
    stored: content of its `teacher.json`.
  """

  path: str
  stored: Stored

  @property
  def identity(self) -> TeacherIdentity:
    """Identity of the teacher that computed the embeddings."""
    return self.stored.teacher

  def check(self, config: RunConfig, loader: ov_data.Loader, num_stages: int = 1) -> None:
    """Check that the embeddings are those of the pixels that a run sees.

    Args:
      config: configuration of the stage.
      loader: training data of the stage.
      num_stages: number of stages of the run.

    Raises:
      ValueError: other pixels, or too few positions.
    """
    if num_stages > 1:
      raise ValueError(
        f"{self.path} holds embeddings of one stage, and config.stages has {num_stages}; "
        "set a teacher instead of embeddings"
      )
    expected = pixels_of(config, loader)
    for name, value in expected.items():
      if (saved := self.stored.pixels.get(name)) != value:
        raise ValueError(
          f"{self.path} was stored with {name}={saved}, and this run has {value}, so it would see "
          "other pixels; use the same data, seed and settings, or store the embeddings again"
        )
    needed = config.total_steps * config.batch_size
    if needed > self.stored.rows:
      raise ValueError(
        f"{self.path} holds {self.stored.rows:,} positions, and the run reads {needed:,}; set "
        f"config.total_steps to at most {self.stored.rows // config.batch_size:,}, or store the "
        "embeddings again with more steps"
      )

  def adder(self, mesh: jax.sharding.Mesh) -> AddTeacher:
    """Return a function that adds the rows of a batch to its arrays on the devices."""
    table = _open_table(self.path, self.stored)

    def add(batch: Batch, host: Mapping[str, np.ndarray]) -> Batch:
      rows, valid = table[host["index"]], host["valid"]
      lost = valid & np.isnan(rows[:, 0])
      if lost.any():
        raise UserError(
          f"{self.path} has no embedding of position {host['index'][lost][0]}: its record was "
          "broken when the embeddings were stored, and now it is not; store them again"
        )
      rows[~valid] = 0
      return batch | ov_sharding.global_batch({"teacher": rows}, mesh)

    return add


AnyTeacher = Teacher | StoredTeacher


def pixels_of(config: RunConfig, loader: ov_data.Loader) -> dict[str, Any]:
  """Return the settings that determine the pixels at a position of the training stream."""
  data = config.input
  order = loader.state()["order"]
  return {
    "data": loader.fingerprint,
    "image_key": [source.image_key for source in loader.sources],
    "seed": order["seed"],
    "shuffle": order["shuffle"],
    "order": order,
    "image_size": config.model.image_size,
    "fit": data.fit,
    "area_min": data.area_min if data.fit == "crop" else None,
    "color_jitter": data.color_jitter,
  }


def with_teacher(task: Task) -> Task:
  """Return the task with the size of its teacher's embeddings; unchanged without a teacher.

  Raises:
    ValueError: the teacher or the embeddings do not exist, or do not fit the task.
  """
  if (found := _setting(task)) is None:
    return task
  setting, path, stored = found
  try:
    if stored:
      dim = _read_index(path).dim
    else:
      tower = open_tower(path)
      size, dim = tower.encoder.image_size, tower.dim
      if size != task.image_size:
        raise ValueError(
          f"the teacher reads images of {size} px, and the run has config.model.image_size="
          f"{task.image_size}; export it with //apps:export --image_size={task.image_size}"
        )
  except (ValueError, OSError, LookupError) as error:
    raise ValueError(f"{setting}={path}: {error}") from error
  return dataclasses.replace(task, teacher_dim=dim)


def open_teacher(task: Task, opened: dict[str, AnyTeacher]) -> AnyTeacher | None:
  """Return the teacher of a task, or None.

  Args:
    task: task of a stage.
    opened: teachers by path; each is read once.

  Raises:
    ValueError: it cannot be read.
  """
  if (found := _setting(task)) is None:
    return None
  setting, path, stored = found
  if path not in opened:
    try:
      if stored:
        index = _read_index(path)
        _open_table(path, index)
        opened[path] = StoredTeacher(path, index)
      else:
        opened[path] = read_teacher(path)
    except (ValueError, OSError, LookupError) as error:
      raise ValueError(f"{setting}={path}: {error}") from error
  return opened[path]


def add_teacher(
  teacher: AnyTeacher | None, config: RunConfig, mesh: jax.sharding.Mesh, stage_index: int
) -> AddTeacher:
  """Return a function that adds `teacher` to a batch on the devices, given that of the loader."""
  if teacher is None:
    return lambda batch, _: batch
  if isinstance(teacher, StoredTeacher):
    return teacher.adder(mesh)
  embed = teacher.embedder(config, mesh, stage_index)
  return lambda batch, _: batch | {"teacher": embed(batch)}


def _setting(task: Task) -> tuple[str, str, bool] | None:
  """Return name and value of the setting of the teacher, and whether it is stored embeddings."""
  terms = [term for term in task.losses if isinstance(term, FromTeacher)]
  if not terms:
    return None
  found = {
    ("embeddings", os.path.expanduser(term.embeddings))
    if term.embeddings
    else ("teacher", os.path.expanduser(term.teacher))
    for term in terms
  }
  if len(found) > 1:
    paths = ", ".join(sorted(path for _, path in found))
    raise ValueError(f"config.loss.more has two teachers, {paths}; set the same for both losses")
  ((field, path),) = found
  name = type(terms[0]).__name__.lower()
  return f"config.loss.more.{name}.{field}", path, field == "embeddings"


def _read_index(path: str) -> Stored:
  if "://" in path:
    raise ValueError("embeddings are read from a local folder; copy them to every host")
  file = os.path.join(path, INDEX_FILE)
  if not os.path.isfile(file):
    raise FileNotFoundError(f"it has no {INDEX_FILE}; expected a folder written by --store_teacher")
  try:
    with open(file, "rb") as handle:
      stored = msgspec.json.decode(handle.read(), type=Stored)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{INDEX_FILE} is damaged: {error}; store the embeddings again") from error
  if stored.format != FORMAT:
    raise ValueError(f"{INDEX_FILE} has format {stored.format}; this version reads {FORMAT}")
  return stored


def _open_table(path: str, stored: Stored) -> np.ndarray:
  """Return the embeddings as a memory map."""
  file = os.path.join(path, EMBEDDINGS_FILE)
  try:
    table = np.load(file, mmap_mode="r", allow_pickle=False)
  except (ValueError, OSError, EOFError) as error:
    raise ValueError(f"{EMBEDDINGS_FILE} cannot be read: {error}; store it again") from error
  if table.shape != (stored.rows, stored.dim) or table.dtype != np.float32:
    raise ValueError(
      f"{EMBEDDINGS_FILE} is {table.dtype}{list(table.shape)}, and {INDEX_FILE} describes "
      f"float32{[stored.rows, stored.dim]}; store the embeddings again"
    )
  return table
