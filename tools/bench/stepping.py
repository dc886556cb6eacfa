"""Benchmark of the train step of an app, by model and by setting.

All models train on one fixed random batch whose texts have no padding. GPUs use larger models.
Nothing is read from disk.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from apps.trainer.meter import peak_flops
from apps.trainer.parts import Plan
from apps.trainer.run_config import RunConfig
from apps.trainer.state import init_state
from tools.bench.compiling import load_config, plan_of
from tools.bench.harness import METRICS, Benchmark, Case, Goal, Ratio, Stopwatch, rates

RECIPES = {"caption": "openvision2.py", "clip": "openvision.py"}
# Settings that a row changes, by the name of the row.
VARIANTS: dict[str, dict[str, Any]] = {
  "no jitter": {"input.color_jitter": False},
  "remat dots": {"model.remat": "dots"},
  "remat full": {"model.remat": "full"},
  "keep 1": {"model.keep_ratio": 1.0},
  "84 px": {"model.image_size": 84},
  "224 px": {"model.image_size": 224},
  "bfloat16": {"model.dtype": "bfloat16"},
  "float32": {"model.dtype": "float32"},
  "cudnn": {"model.attention": "cudnn"},
  "batch 128": {"batch_size": 128},
}


class Row(NamedTuple):
  """The train step of a "caption" or "clip" model."""

  kind: str
  size: str
  variant: str = ""

  @property
  def name(self) -> str:
    model = f"{self.kind} {self.size}"
    return f"{model}, {self.variant}" if self.variant else model


@dataclasses.dataclass(frozen=True)
class Setting:
  """The rows for one kind of device.

  Attributes:
    models: (kind, size) of each model. The first is a captioner; its settings are varied, and it is
      compared with the clip model of the same size.
    variants: keys of VARIANTS.
    rate: name of the metric for images per second.
    steps: number of steps timed together, after one untimed step.
    mfu: MFU goal of the first model, or None if the peak FLOP/s of the device are unknown.
  """

  models: tuple[tuple[str, str], ...]
  resolution: int
  batch: int
  dtype: str
  variants: tuple[str, ...]
  rate: str
  steps: int
  mfu: float | None = None


CPU = Setting(
  models=(("caption", "Ti/16"), ("caption", "S/16"), ("clip", "Ti/16")),
  resolution=160, batch=32, dtype="float32",
  variants=("remat dots", "remat full", "keep 1", "bfloat16", "84 px", "224 px"),
  rate="images_per_cpu_s", steps=1,
)  # fmt: skip
GPU = Setting(
  models=(("caption", "L/14"), ("clip", "L/14")),
  resolution=224, batch=64, dtype="bfloat16",
  variants=("no jitter", "remat dots", "remat full", "keep 1", "cudnn", "float32", "batch 128",
            "84 px"),
  rate="images_per_s", steps=20, mfu=0.5,
)  # fmt: skip
PAIR_GOAL = 1.8  # images/s of a captioner relative to a clip model of the same size

Run = Callable[[], Mapping[str, float]]


def make(scratch: Path) -> Benchmark:
  """Return the benchmark for the first JAX device. `scratch` is unused."""
  del scratch
  return benchmark(GPU if jax.default_backend() == "gpu" else CPU)


def benchmark(setting: Setting) -> Benchmark:
  """Return the rows of a setting."""
  models = [Row(*model) for model in setting.models]
  base = models[0]
  varied = [base._replace(variant=name) for name in setting.variants]
  faster = Ratio(base.name, base._replace(kind="clip").name)
  ratios = [faster]
  ratios += [Ratio(row.name, base.name) for row in varied if not row.variant.endswith(" px")]
  goals = [Goal(faster.name, setting.rate, PAIR_GOAL, at_least=True)]
  if setting.mfu and peak_flops():
    goals += [Goal(base.name, "mfu", setting.mfu, at_least=METRICS["mfu"].more)]
  states: dict[Row, Any] = {}  # shared by the rows of a model, so that memory holds only one copy
  return Benchmark(
    "step",
    f"Train steps of `apps/configs/openvision2.py` (caption) and `openvision.py` (clip) at "
    f"{setting.resolution} px, text models of the size of the image tower, no remat; GFLOP are "
    "those of the model for one image, forward and backward.",
    [Case(row.name, _runner(setting, row, states)) for row in models + varied],
    ratios=ratios,
    goals=goals,
    dtype=setting.dtype,
    batch=setting.batch,
  )


def config_of(setting: Setting, row: Row) -> RunConfig:
  """Return the configuration of a row."""
  text = row.size.partition("/")[0]
  names = {"img": row.size, "txt_decoder_name": text, "res": setting.resolution}
  names |= {"batch_size": setting.batch, "dtype": setting.dtype, "remat": "none"}
  if row.kind == "clip":
    names["txt_name"] = text
  arguments = ",".join(f"{name}={value}" for name, value in names.items())
  config = load_config(RECIPES[row.kind], arguments)
  return config.with_settings(VARIANTS.get(row.variant, {}))


def _runner(setting: Setting, row: Row, states: dict[Row, Any]) -> Run:
  """Return a function that runs the steps of a row; its first call also compiles."""
  ready: list[Run] = []

  def run() -> Mapping[str, float]:
    if not ready:
      ready.append(_prepare(setting, row, states))
    return ready[0]()

  return run


def _prepare(setting: Setting, row: Row, states: dict[Row, Any]) -> Run:
  plan = plan_of(config_of(setting, row))
  model, batch = row._replace(variant=""), made_batch(plan)
  if model not in states:
    states[model] = made_state(plan)
  compiled = plan.lower().compile()
  memory = compiled.memory_analysis()
  if memory is None:
    raise RuntimeError(f"the compiler of {jax.default_backend()} reports no memory")
  size, gflops = plan.config.batch_size, plan.parts.task.flops_per_example / 1e9
  peak = peak_flops()

  def run() -> Mapping[str, float]:
    state = states.pop(model)  # the state is donated
    # The first step also reallocates memory released since the last call.
    state, metrics = jax.block_until_ready(compiled(state, batch))
    watch = Stopwatch()
    for _ in range(setting.steps):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    cpu, clock = (seconds / setting.steps for seconds in watch.read())
    states[model] = state
    if not math.isfinite(metrics["loss"]):
      raise RuntimeError(f"{row.name}: the loss is {metrics['loss']}; expected a finite number")
    seconds = {"cpu_s": cpu, "clock_s": clock}
    numbers = {"temporary_mib": memory.temp_size_in_bytes / 2**20} | seconds
    numbers |= rates("images", size, seconds)
    numbers |= {"gflops": gflops, "gflops_per_cpu_s": size * gflops / cpu}
    return numbers | ({"mfu": size * gflops * 1e9 / clock / peak} if peak else {})

  return run


def made_state(plan: Plan) -> Any:
  """Return a newly initialized train state."""
  parts = plan.parts
  return init_state(parts.task.init, jax.random.key(0), parts.optimizer.tx, parts.shardings)


def made_batch(plan: Plan, seed: int = 0) -> dict[str, Any]:
  """Return random pixels and texts; the texts have no padding."""
  task: Any = plan.parts.task
  draw, vocab = np.random.default_rng(seed), task.model.decoder.vocab_size

  def array(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if name == "valid":
      return np.ones(leaf.shape, leaf.dtype)
    if name == "index":
      return np.arange(leaf.size, dtype=leaf.dtype)
    low, high = (0, 256) if name == "image" else (1, vocab)
    return draw.integers(low, high, leaf.shape).astype(leaf.dtype)

  arrays = {name: array(name, leaf) for name, leaf in plan.batch.items()}
  return jax.device_put(arrays, {name: leaf.sharding for name, leaf in plan.batch.items()})
