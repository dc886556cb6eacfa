"""The train step of a stage, compiled for devices that need not be there.

  plan = make_plan(stage, make_task, tokenizer, mesh)
  compiled = compile_step(plan)       # Compiled; its `memory` is None where it does not fit

The step, its shardings and its donation are those of the training loop: `parts.build_parts` and
`parts.build_step`. Nothing is allocated.
"""

import dataclasses
import math
import os
from pathlib import Path
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from apps.trainer.parts import MakeTask, Parts, build_parts, build_step
from apps.trainer.stages import Stage
from apps.trainer.step import TwoPhase
from apps.trainer.task import abstract_batch
import ov_data
import ov_models
import ov_sharding
from tools.preflight import hlo, peak

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SOME = 1 << 20  # bytes of temporaries; a program with as many has arrays among them
_USED = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A stage on a mesh, before anything is compiled.

  Attributes:
    config: of the stage; its batch size is that of `mesh`.
    parts: task, optimizer, abstract state.
    batch: arrays of the devices' batch, abstract.
  """

  config: ConfigDict
  parts: Parts
  batch: dict[str, jax.ShapeDtypeStruct]
  mesh: Any
  index: int

  @property
  def compares_rows(self) -> bool:
    """Whether the loss looks at all rows of a batch, so that a device's work grows with it."""
    return isinstance(self.parts.task, TwoPhase)


@dataclasses.dataclass(frozen=True)
class Memory:
  """What one device needs, in bytes, tiles of the layout filled up."""

  arguments: int
  outputs: int
  temporaries: int
  aliased: int

  @property
  def peak(self) -> int:
    return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a plan.

  Attributes:
    seconds: it took, tracing included.
    cpu_seconds: of all cores, which a busy machine does not stretch.
    memory: None where the program does not fit.
    program: None where there is none.
    held: the temporaries that live when they take most, the largest first; less than what the
      memory counts, of which a part are gaps between them. None: the compiler does not tell.
    refused: bytes it needs and bytes there are, where it does not fit.
  """

  seconds: float
  cpu_seconds: float
  memory: Memory | None
  program: hlo.Program | None
  held: list[peak.Held] | None = None
  refused: tuple[int, int] | None = None


def stand_in_tokenizer(config: ConfigDict) -> ov_data.Tokenizer:
  """A tokenizer for shapes alone; sets the vocabulary size where the configuration leaves it open.

  The configured file is used if there is one.
  """
  if path := os.path.expanduser(config.tokenizer.path):
    if os.path.isdir(path):
      return ov_data.Tokenizer.load(path)
    reads_json = path.endswith(".json")
    return ov_data.Tokenizer.from_file(path) if reads_json else ov_data.Tokenizer.from_vocab(path)
  if not config.model.vocab_size:
    config.model.vocab_size = -(-config.tokenizer.train_vocab_size // 128) * 128
  return ov_data.Tokenizer.train(["a"], 16, kind="words")


def make_plan(stage: Stage, make_task: MakeTask, tokenizer: ov_data.Tokenizer, mesh: Any) -> Plan:
  """The abstract step of a stage on `mesh`.

  Raises:
    ValueError: sizes that do not fit each other or the mesh.
  """
  config = stage.config
  unit = mesh.size * config.accumulate
  if config.batch_size % unit:
    raise ValueError(
      f"config.batch_size={config.batch_size} is not a multiple of {unit} = {mesh.size} devices x "
      f"accumulate {config.accumulate}; the next size that is: "
      f"{-(-config.batch_size // unit) * unit}"
    )
  parts = build_parts(config, make_task, tokenizer, mesh)
  batch = abstract_batch(parts.task, config.batch_size, ov_sharding.batch_sharding(mesh))
  return Plan(config, parts, batch, mesh, stage.index)


def compile_step(plan: Plan) -> Compiled:
  """Traces and compiles; a program too large for the device is an answer, not an error."""
  began, cpu_began = time.perf_counter(), time.process_time()
  with ov_models.on_mesh(plan.mesh):
    step = build_step(plan.config, plan.parts, plan.mesh, plan.index)
    lowered = step.lower(plan.parts.abstract, plan.batch)
  with tempfile.TemporaryDirectory() as folder:
    try:
      compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
    except jax.errors.JaxRuntimeError as error:
      refused = refusal(str(error))
      if refused is None:
        raise
      seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
      return Compiled(seconds, cpu_seconds, None, None, refused=refused)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return _read(compiled, Path(folder), seconds, cpu_seconds)


def _read(
  compiled: jax.stages.Compiled, folder: Path, seconds: float, cpu_seconds: float
) -> Compiled:
  """What the compiler tells of its program, and wrote into `folder`."""
  analysis, text = compiled.memory_analysis(), compiled.as_text()
  if analysis is None or text is None:
    raise RuntimeError(f"the compiler of {jax.default_backend()} tells neither memory nor program")
  memory = Memory(
    analysis.argument_size_in_bytes,
    analysis.output_size_in_bytes,
    analysis.temp_size_in_bytes,
    analysis.alias_size_in_bytes,
  )
  program = hlo.parse(text)
  held = peak.at_peak(folder, program)
  if not held and memory.temporaries >= _SOME:  # it wrote the files, but not as we read them
    held = None
  return Compiled(seconds, cpu_seconds, memory, program, held)


def refusal(message: str) -> tuple[int, int] | None:
  """(bytes needed, bytes there are) of a compiler that found too little memory; else None."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  for pattern in _USED:
    if found := pattern.search(message):
      used, unit, limit, limit_unit = found.groups()
      return int(float(used) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])
  return None


def tree_bytes(tree: Any, shardings: Any = None) -> int:
  """Bytes of a tree of abstract arrays on one device; without shardings, those they carry."""
  if shardings is None:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
  return ov_sharding.bytes_per_device(tree, shardings)


def compared_bytes(plan: Plan) -> int:
  """Bytes of what a loss between rows needs of the whole batch; 0 for other losses."""
  task = plan.parts.task
  if not isinstance(task, TwoPhase):
    return 0
  images = plan.batch["image"]
  batch = {**plan.batch, "image": jax.ShapeDtypeStruct(images.shape, jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  rows, _ = jax.eval_shape(task.embed, plan.parts.abstract["params"], batch, key)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))
