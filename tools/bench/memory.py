"""What training takes of memory: by model, rematerialisation, optimizer and devices.

`memory` is a table to look up: what the forward pass keeps of an image, and the largest batch that
a card holds. It is arithmetic on the traced step (tools/preflight/estimate.py); nothing is compiled
or allocated. `memory_state` is the train state by option and by number of devices that share it.
`memory_compiled` compares the arithmetic with what compilers make of the same step.
"""

from collections.abc import Mapping
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from tools.bench.compiling import ROOT, load_config, plan_of, plan_on
from tools.bench.harness import Benchmark, Case, Goal, Plot, Ratio

if TYPE_CHECKING:
  from tools.preflight.compile import Plan

MIB = 2**20
# Recipe, and argument with the size and the resolution to fill in.
RECIPES = {
  "OpenVision 2": ("openvision2.py", "img={0}/{1},txt_decoder_name={0},res={2}"),
  "OpenVision": ("openvision.py", "img={0}/{1},txt_name={0},txt_decoder_name={0},res={2}"),
}
SIZES = (("B", 16, 224), ("L", 14, 84), ("L", 14, 224), ("So400m", 14, 384), ("H", 14, 224))
POLICIES = ("none", "dots", "full", "offload")
CARDS = (16, 24, 40, 80, 141)  # GB of 10^9 bytes, as sold
RESERVE = 0.08  # of a card, for its runtime, libraries and gaps between arrays
DTYPE = "bfloat16"
CLOSE = 0.8  # of what a compiler takes: less leads into running out of memory
# Adam's moments: how the first and the second are kept.
MOMENTS = (
  ("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8"), ("int8", "int8"),
  ("bfloat16", "factored"), ("int8", "factored"),
)  # fmt: skip
DEFAULT = 1
FSDP = (2, 4, 8)
# Small enough for the compiler of a CPU: float32, for it has no products in bfloat16.
COMPILED = ("S", 16, 160)
COMPILED_BATCH = 32


def make(scratch: Path) -> Benchmark:
  """The largest batches."""
  del scratch
  cases = []
  for model in _models():
    for policy in POLICIES:
      run = functools.partial(_batches, f"{model}, {policy}", MOMENTS[DEFAULT])
      cases.append(Case(f"{model}, {policy}", run, warm_up=False))
    run = functools.partial(_batches, f"{model}, full", MOMENTS[-1])
    cases.append(Case(f"{model}, full, moments {_moments(MOMENTS[-1])}", run, warm_up=False))
  return Benchmark(
    "memory",
    "Train steps of `apps/configs/openvision2.py` and `openvision.py` on one device, by "
    "rematerialisation policy: train state; what the forward pass keeps of an image for the "
    "backward pass, on the device and, with offload, on the host; the largest batch of cards, of "
    f"whose memory {RESERVE:.0%} stay free; 0 where the state leaves no room. Arithmetic on the "
    "traced step: no card was there.",
    cases,
    ratios=[
      Ratio("OpenVision 2 L/14 @ 224, dots", "OpenVision 2 L/14 @ 224, none"),
      Ratio("OpenVision 2 L/14 @ 224, full", "OpenVision 2 L/14 @ 224, none"),
      Ratio("OpenVision 2 L/14 @ 224, full", "OpenVision L/14 @ 224, full"),
    ],
    dtype=DTYPE,
    exact=True,
  )


def make_state(scratch: Path) -> Benchmark:
  """The train state of a device."""
  del scratch
  large = [f"OpenVision 2 {_size(*size)}" for size in SIZES if size[2] != 84]
  cases = []
  lines: dict[str, list[tuple[float, str]]] = {}
  for model in large:
    for moments in MOMENTS:
      run = functools.partial(_state, model, moments, 1)
      cases.append(Case(f"{model}, moments {_moments(moments)}", run, warm_up=False))
    whole = f"{model}, moments {_moments(MOMENTS[DEFAULT])}"
    lines[model.removeprefix("OpenVision 2 ")] = [(1, whole)]
    for devices in FSDP:
      run = functools.partial(_state, model, MOMENTS[DEFAULT], devices)
      cases.append(Case(f"{model}, fsdp={devices}", run, warm_up=False))
      lines[model.removeprefix("OpenVision 2 ")].append((devices, f"{model}, fsdp={devices}"))
  return Benchmark(
    "memory_state",
    "The train state on each of 8 devices, params in float32: whole on each, by how Adam's first "
    "and second moment are kept (`optimizer.mu_dtype`, `optimizer.second_moment`); split over some "
    "of them with `mesh.fsdp`, with the default moments, bfloat16 and full.",
    cases,
    plots=[Plot("Train state of a device", "devices that share it", "state_mib", lines)],
    exact=True,
  )


def make_compiled(scratch: Path) -> Benchmark:
  """The arithmetic beside compilers."""
  del scratch
  cases, ratios = [], []

  def pair(name: str, estimated: Any, compiled: Any) -> None:
    for kind, run in (("estimated", estimated), ("compiled", compiled)):
      cases.append(Case(f"{kind}/{name}", run, warm_up=False))
    ratios.append(Ratio(f"estimated/{name}", f"compiled/{name}"))

  for recipe, policies in (("OpenVision 2", ("none", "dots", "full")), ("OpenVision", ("dots",))):
    for policy in policies:
      name = f"{recipe} {_size(*COMPILED)}, {policy}"
      of_batch = functools.partial(_plan, name, MOMENTS[DEFAULT], "float32")
      pair(
        f"{name}, on this CPU",
        functools.partial(_estimated, of_batch),
        functools.partial(_compiled, of_batch),
      )
  for golden in _goldens():
    name = f"{golden['name']}, full, on a v4"
    pair(name, functools.partial(_estimated_slice, golden), functools.partial(_noted, golden))
  goals = [Goal(ratio.name, "peak_mib", CLOSE, at_least=True) for ratio in ratios]
  return Benchmark(
    "memory_compiled",
    "The peak of a train step by arithmetic and as compilers report it: on this CPU in float32 at "
    f"batch {COMPILED_BATCH}; for a chip of a v4-64 in bfloat16 with fsdp=16, as "
    "`tools/preflight/testdata/memory.json` has it.",
    cases,
    ratios=ratios,
    goals=goals,
    exact=True,
  )


def _models() -> list[str]:
  return [f"{recipe} {_size(*size)}" for recipe in RECIPES for size in SIZES]


def _size(name: str, patch: int, resolution: int) -> str:
  return f"{name}/{patch} @ {resolution}"


def _moments(kinds: tuple[str, str]) -> str:
  return " and ".join(kinds)


def _plan(name: str, moments: tuple[str, str], dtype: str, images: int) -> "Plan":
  """The step of "OpenVision 2 L/14 @ 224, dots" on one device."""
  model, _, policy = name.partition(", ")
  return plan_of(
    _config(model, moments, f"dtype={dtype},remat={policy},batch_size={images}"), "cpu"
  )


def _config(model: str, moments: tuple[str, str], arguments: str) -> ConfigDict:
  recipe, argument = _recipe(model)
  config = load_config(recipe, f"{argument},{arguments}")
  config.optimizer.mu_dtype, config.optimizer.second_moment = moments
  return config


def _recipe(model: str) -> tuple[str, str]:
  """Recipe and argument of "OpenVision 2 L/14 @ 224"."""
  name, size, _, resolution = model.rsplit(" ", 3)
  recipe, argument = RECIPES[name]
  return recipe, argument.format(*size.split("/"), resolution)


def _batches(name: str, moments: tuple[str, str]) -> Mapping[str, float]:
  from tools.preflight import estimate

  of_batch = functools.partial(_plan, name, moments, DTYPE)
  on_device, on_host = estimate.kept_bytes(of_batch)
  found = estimate.estimate(of_batch)
  values = {"state_mib": found.state / MIB, "kept_mib": on_device / MIB}
  if on_host:
    values["host_mib"] = on_host / MIB
  return values | {f"batch_{card}": found.largest(card * 10**9 * (1 - RESERVE)) for card in CARDS}


def _state(model: str, moments: tuple[str, str], fsdp: int) -> Mapping[str, float]:
  from tools.preflight.compile import tree_bytes

  plan = _on_devices(_config(model, moments, f"batch_size=8,fsdp_parallelism={fsdp}"), 8)
  return {"state_mib": tree_bytes(plan.parts.abstract) / MIB}


def _on_devices(config: ConfigDict, devices: int) -> "Plan":
  """The step of a configuration on devices that are not there."""
  import jax

  import ov_sharding

  sizes = ov_sharding.MeshConfig(**config.mesh).resolve(devices).sizes
  return plan_on(config, jax.sharding.AbstractMesh(sizes, ov_sharding.AXES))


def _estimated(of_batch: Any) -> Mapping[str, float]:
  from tools.preflight import estimate

  return {"peak_mib": estimate.estimate(of_batch).peak(COMPILED_BATCH) / MIB}


def _compiled(of_batch: Any) -> Mapping[str, float]:
  from tools.preflight.compile import compile_step

  memory = compile_step(of_batch(COMPILED_BATCH)).memory
  assert memory is not None  # a CPU refuses nothing
  return {"peak_mib": memory.peak / MIB}


def _goldens() -> list[dict[str, Any]]:
  """What preflight's tests hold of compiled steps, each with the name it has here."""
  held = json.loads((ROOT / "tools/preflight/testdata/memory.json").read_text("utf-8"))
  recipes = {recipe.removesuffix(".py"): name for name, (recipe, _) in RECIPES.items()}
  found = []
  for golden in held:
    given = dict(part.split("=") for part in golden["arguments"].split(","))
    name = f"{recipes[golden['recipe']]} {given['img']} @ {given['res']}"
    found.append(golden | {"name": name})
  return found


def _noted(golden: dict[str, Any]) -> Mapping[str, float]:
  return {"peak_mib": golden["peak_bytes_per_device"] / MIB}


def _estimated_slice(golden: dict[str, Any]) -> Mapping[str, float]:
  """A device's share: what is there for each image is its own, what is there once is split."""
  from tools.preflight import estimate, topology
  from tools.preflight.compile import tree_bytes

  recipe = f"{golden['recipe']}.py"
  config = load_config(recipe, golden["arguments"])
  plan = _on_devices(config, topology.parse(golden["topology"]).chips)
  name = f"{golden['name']}, full"
  alone = estimate.estimate(functools.partial(_plan, name, MOMENTS[DEFAULT], DTYPE))
  images = config.batch_size // plan.mesh.size
  temporaries = alone.temporaries(images, share=1 / config.mesh.fsdp)
  return {
    "peak_mib": (tree_bytes(plan.parts.abstract) + tree_bytes(plan.batch) + temporaries) / MIB
  }
