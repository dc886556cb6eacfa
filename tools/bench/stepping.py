"""What a train step costs: ours, as the predecessor computes it, and as one would in PyTorch.

All train models of the same sizes, on a batch that is made here and stays the same; its texts have
no padding. Ours is the step that an app runs. On a GPU the models are larger. Nothing is read, and
TensorFlow is not imported.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from pathlib import Path
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from tools.bench.compiling import load_config, plan_of
from tools.bench.harness import METRICS, Benchmark, Case, Goal, Plot, Ratio, Stopwatch, rates

if TYPE_CHECKING:
  from tools.bench.torch_peer import TorchPeer
  from tools.preflight.compile import Plan

RECIPES = {"caption": "openvision2.py", "clip": "openvision.py"}
# What a row changes in the configuration, by the name that it shows.
VARIANTS: dict[str, dict[str, Any]] = {
  "no jitter": {"input.color_jitter": False},
  "remat dots": {"model.remat": "dots"},
  "remat full": {"model.remat": "full"},
  "keep 1": {"model.keep_ratio": 1.0},
  "all logits": {},  # no setting of an app: the loss holds [B, T, V]
  "84 px": {"model.image_size": 84},
  "224 px": {"model.image_size": 224},
  "bfloat16": {"model.dtype": "bfloat16"},
  "float32": {"model.dtype": "float32"},
  "cudnn": {"model.attention": "cudnn"},
  "batch 128": {"batch_size": 128},
}


class Row(NamedTuple):
  """One train step: "ours", "naive" or "torch", of the apps' "caption" or "clip"."""

  form: str
  kind: str
  size: str
  variant: str = ""

  @property
  def name(self) -> str:
    model = f"{self.kind} {self.size}" if self.form == "ours" else " ".join(self[:3])
    return f"{model}, {self.variant}" if self.variant else model


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is measured on one kind of device.

  Attributes:
    models: (kind, size, peers it is compared with). The first, a captioner, is varied, and
      compared with the pair of towers of its size.
    variants: of VARIANTS.
    rate: the metric by which images are counted.
    steps: timed together, after one that is not.
    goals: of every model beside a peer, or of the first captioner itself: (peer or "", metric,
      limit).
    notes: for the reader of the table.
  """

  models: tuple[tuple[str, str, tuple[str, ...]], ...]
  resolution: int
  batch: int
  dtype: str
  variants: tuple[str, ...]
  rate: str
  steps: int
  goals: tuple[tuple[str, str, float], ...]
  notes: tuple[str, ...] = ()


CPU = Setting(
  models=(
    ("caption", "Ti/16", ("naive", "torch")),
    ("caption", "S/16", ("naive",)),
    ("clip", "Ti/16", ("naive", "torch")),
  ),
  resolution=160, batch=32, dtype="float32",
  variants=("remat dots", "remat full", "keep 1", "bfloat16", "84 px", "224 px"),
  rate="images_per_cpu_s", steps=1,
  goals=(("naive", "cpu_s", 0.6),),
  notes=(
    "The predecessor itself, on another machine of this kind: caption Ti/16 11.8 CPU s and 4.8 GB "
    "of temporaries, caption S/16 24.9 CPU s, clip Ti/16 20.2 CPU s and 7.7 GB",
  ),
)  # fmt: skip
GPU = Setting(
  models=(("caption", "L/14", ("naive", "torch")), ("clip", "L/14", ("naive", "torch"))),
  resolution=224, batch=64, dtype="bfloat16",
  variants=("no jitter", "remat dots", "remat full", "keep 1", "all logits", "cudnn", "float32",
            "batch 128", "84 px"),
  rate="images_per_s", steps=20,
  goals=(("", "mfu", 0.5), ("torch", "images_per_s", 1.2)),
)  # fmt: skip
PAIR_GOAL = 1.8  # images of a captioner to those of a pair of towers of its size


def make(scratch: Path) -> Benchmark:
  """For the first device that jax finds.

  Raises:
    FileNotFoundError: the interpreter that OV_CLIENTS_PYTHON names is not there.
  """
  # Else jax takes most of a card before PyTorch comes.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  from tools.bench import torch_peer

  python = torch_peer.find_python()
  peer = torch_peer.TorchPeer(python, scratch) if python else None
  return benchmark(GPU if jax.default_backend() == "gpu" else CPU, peer)


def benchmark(setting: Setting, peer: "TorchPeer | None") -> Benchmark:
  """Ours and the peers; without `peer` the rows of PyTorch are left out."""
  from apps.trainer.meter import peak_flops

  compared = [
    [Row(form, kind, size) for form in ("ours", *peers) if peer or form != "torch"]
    for kind, size, peers in setting.models
  ]
  base = compared[0][0]
  varied = [base._replace(variant=name) for name in setting.variants]
  ratios = [Ratio(ours.name, other.name) for ours, *others in compared for other in others]
  faster = Ratio(base.name, base._replace(kind="clip").name)
  ratios += [faster]
  ratios += [Ratio(row.name, base.name) for row in varied if not row.variant.endswith(" px")]
  goals = [Goal(faster.name, setting.rate, PAIR_GOAL, at_least=True)]
  for form, metric, limit in setting.goals:
    of = [ratio.name for ratio in ratios if ratio.base.startswith(form)] if form else [base.name]
    if metric != "mfu" or peak_flops():  # of cards whose peak is known
      goals += [Goal(name, metric, limit, at_least=METRICS[metric].more) for name in of]
  rows = [row for model in compared for row in model] + varied
  sides = {int(row.variant.split()[0]): row.name for row in varied if row.variant.endswith(" px")}
  points = sorted((sides | {setting.resolution: base.name}).items())
  notes = [*setting.notes, "Only ours jitters colours in the step; the predecessor did on the host"]
  states: States = {}
  if peer is None:
    notes += ["Without PyTorch: OV_CLIENTS_PYTHON names no python that has torch and timm"]
  return Benchmark(
    "step",
    f"Train steps of `apps/configs/openvision2.py` (caption) and `openvision.py` (clip) at "
    f"{setting.resolution} px, text models of the size of the image tower, no remat; GFLOP are "
    "those of the model for one image, forward and backward.",
    [Case(row.name, _runner(setting, row, peer, states)) for row in rows],
    ratios=ratios,
    goals=goals,
    dtype=setting.dtype,
    batch=setting.batch,
    notes=notes,
    plots=[Plot("Train step by resolution", "pixels a side", setting.rate, {base.name: points})],
  )


def config_of(setting: Setting, row: Row) -> ConfigDict:
  """The configuration of a row."""
  text = row.size.partition("/")[0]
  names = {"img": row.size, "txt_decoder_name": text, "res": setting.resolution}
  names |= {"batch_size": setting.batch, "dtype": setting.dtype, "remat": "none"}
  if row.kind == "clip":
    names["txt_name"] = text
  arguments = ",".join(f"{name}={value}" for name, value in names.items())
  config = load_config(RECIPES[row.kind], arguments)
  config.update_from_flattened_dict(VARIANTS.get(row.variant, {}))
  return config


Run = Callable[[], Mapping[str, float]]


States = dict[Row, Any]  # those that rows of one model hand each other, so that none has its own


def _runner(setting: Setting, row: Row, peer: "TorchPeer | None", states: States) -> Run:
  """Runs steps of a row; the first time it also compiles, and makes what the step needs."""
  ready: list[Run] = []

  def run() -> Mapping[str, float]:
    if not ready:
      ready.append(_prepare(setting, row, peer, states))
    return ready[0]()

  return run


def _prepare(setting: Setting, row: Row, peer: "TorchPeer | None", states: States) -> Run:
  import jax

  from apps.trainer.meter import peak_flops

  plan = plan_of(config_of(setting, row), jax.default_backend())
  batch, gflops = plan.config.batch_size, plan.parts.task.flops_per_example / 1e9
  if row.form == "torch" and peer is not None:
    steps = _torch_steps(plan, row, peer, setting.steps)
    facts = {}
  else:
    steps, temporary = _jax_steps(plan, row, setting.steps, states)
    facts = {"temporary_mib": temporary / 2**20}
  peak = peak_flops()

  def run() -> Mapping[str, float]:
    cpu, clock = (seconds / setting.steps for seconds in steps())
    seconds = {"cpu_s": cpu, "clock_s": clock}
    figures = facts | seconds | rates("images", batch, seconds)
    figures |= {"gflops": gflops, "gflops_per_cpu_s": batch * gflops / cpu}
    return figures | {"mfu": batch * gflops * 1e9 / clock / peak} if peak else figures

  return run


Steps = Callable[[], tuple[float, float]]  # runs them: seconds of the CPU and on the clock


def _jax_steps(plan: "Plan", row: Row, count: int, states: States) -> tuple[Steps, int]:
  """And the bytes of temporaries that the compiler gives them."""
  import jax

  import ov_models

  model, batch = row._replace(variant=""), made_batch(plan)
  if model not in states:
    states[model] = made_state(plan)
  if row.form == "naive":
    from tools.bench import naive

    states[model] = naive.new_state(plan.parts, states[model]["params"])
    step = naive.make_step(plan.parts)
    batch = {name: array for name, array in batch.items() if name not in ("valid", "index")}
  else:
    step = _our_step(plan, row)
  with ov_models.on_mesh(plan.mesh):
    compiled = step.lower(states[model], batch).compile()
  memory = compiled.memory_analysis()
  if memory is None:
    raise RuntimeError(
      f"the compiler of {jax.default_backend()} does not tell what memory it takes"
    )

  def steps() -> tuple[float, float]:
    state = states.pop(model)  # it is donated
    # What the system took back since the last turn is paid for once, by whoever comes first.
    state, metrics = jax.block_until_ready(compiled(state, batch))
    watch = Stopwatch()
    for _ in range(count):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    seconds = watch.read()
    states[model] = state
    if not math.isfinite(metrics["loss"]):
      raise RuntimeError(f"{row.name}: the loss is {metrics['loss']}")
    return seconds

  return steps, memory.temp_size_in_bytes


def _our_step(plan: "Plan", row: Row) -> Any:
  """The jitted step of an app, in the row "all logits" with another loss."""
  from apps.trainer.parts import build_step

  parts = plan.parts
  if row.variant == "all logits":
    parts = parts._replace(task=types.SimpleNamespace(loss=_all_logits(parts.task)))
  return build_step(plan.config, parts, plan.mesh, plan.index)


def _all_logits(task: Any) -> Callable[..., Any]:
  """The loss of a captioner through all its logits at once."""
  from apps.trainer.step import LossOutput
  import ov_losses
  from ov_losses.naive import naive_loss
  import ov_models

  def loss(params: Any, batch: Mapping[str, Any], key: Any) -> LossOutput:
    model = ov_models.bind(task.model, params)
    hidden = model(batch["image"], batch["ids"], key=key).hidden
    targets, mask = ov_losses.shift_left(batch["ids"], task.pad_id)
    mask = mask * batch["valid"][:, None]
    value = naive_loss(hidden, model.head_kernel, targets, mask)
    return LossOutput(task.caption_weight * value, mask.sum(), {})

  return loss


def _torch_steps(plan: "Plan", row: Row, peer: "TorchPeer", count: int) -> Steps:
  import jax

  import ov_models
  from tools.bench.torch_peer import sizes_of

  task: Any = plan.parts.task
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  sizes = sizes_of(task.model, plan.config.batch_size, device)
  peer.build(row.name, sizes, ov_models.num_params(task.model))

  def steps() -> tuple[float, float]:
    peer.run(row.name, 1)  # as above
    return peer.run(row.name, count)

  return steps


def made_state(plan: "Plan") -> Any:
  """A fresh train state."""
  import jax

  from apps.trainer.state import init_state

  parts = plan.parts
  return init_state(parts.task.init, jax.random.key(0), parts.optimizer.tx, parts.shardings)


def made_batch(plan: "Plan", seed: int = 0) -> dict[str, Any]:
  """Random pixels and texts; every position of a text has a word."""
  import jax
  import numpy as np

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
