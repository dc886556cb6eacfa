"""Compile the train step of a stage for devices that need not be present.

  plan = make_plan(stage, tokenizer, mesh)
  compiled = compile_step(plan)       # Compiled; `memory` is None if the step does not fit

Step, shardings and donation are those of the training loop (`apps.trainer.parts`). No arrays are
allocated.
"""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from apps.trainer import inputs
from apps.trainer.parts import Plan, build_parts, plan_step
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage
import ov_data
import ov_sharding

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled plan.

  Attributes:
    seconds: clock time to trace, lower and compile.
    cpu_seconds: CPU time of the same on all cores, which is independent of other load.
    memory: `memory_analysis` of the program, including layout padding, or None if it does not fit.
    text: HLO of the program, or empty if it does not fit.
    refused: bytes needed and bytes available, if the program does not fit.
  """

  seconds: float
  cpu_seconds: float
  memory: Any = None
  text: str = ""
  refused: tuple[int, int] | None = None


def shape_tokenizer(config: RunConfig) -> ov_data.Tokenizer:
  """Return a tokenizer that is only used for shapes: the configured one, if its file exists."""
  if path := os.path.expanduser(config.tokenizer.path):
    return inputs.read_tokenizer(path)
  return ov_data.Tokenizer.train(["a"], 16, kind="words")


def sized_vocabulary(config: RunConfig) -> RunConfig:
  """Set a vocabulary size if the configuration has neither a size nor a tokenizer."""
  if config.model.vocab_size or config.tokenizer.path:
    return config
  size = -(-config.tokenizer.train_vocab_size // 128) * 128
  return config.with_settings({"model.vocab_size": size})


def make_plan(stage: Stage, tokenizer: ov_data.Tokenizer, mesh: Any) -> Plan:
  """Return the abstract step of a stage on `mesh`.

  Raises:
    ValueError: if sizes are incompatible with each other or the mesh.
  """
  return plan_step(stage, build_parts(stage.config, tokenizer, mesh), mesh)


def compile_step(plan: Plan) -> Compiled:
  """Trace and compile a plan. A program too large for the device is a result, not an error."""
  began, cpu_began = time.perf_counter(), time.process_time()
  lowered = plan.lower()
  compiled, refused = None, None
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = refusal(str(error))
    if refused is None:
      raise
  seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
  if compiled is None:
    return Compiled(seconds, cpu_seconds, refused=refused)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  if memory is None or text is None:
    raise RuntimeError(f"the compiler of {jax.default_backend()} reports neither memory nor HLO")
  return Compiled(seconds, cpu_seconds, memory, text)


def refusal(message: str) -> tuple[int, int] | None:
  """Return (bytes needed, bytes available) of an out-of-memory error; None for other errors."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  for pattern in _USED:
    if found := pattern.search(message):
      used, unit, limit, limit_unit = found.groups()
      return int(float(used) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])
  return None


def tree_bytes(tree: Any, shardings: Any = None) -> int:
  """Return the bytes of abstract arrays on one device, by default with their own shardings."""
  if shardings is None:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
  return ov_sharding.bytes_per_device(tree, shardings)


def compared_bytes(plan: Plan) -> int:
  """Return the bytes gathered by a loss that compares all rows of the batch, otherwise 0."""
  task = plan.parts.task
  if not task.compares_rows:
    return 0
  images = plan.batch["image"]
  batch = {**plan.batch, "image": jax.ShapeDtypeStruct(images.shape, jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  rows, _ = jax.eval_shape(task.embed, plan.parts.abstract["params"], batch, key)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))
