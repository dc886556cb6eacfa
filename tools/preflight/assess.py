"""One stage of a run on one kind of machine: compiled, measured, and searched for what fits."""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from apps.trainer.parts import MakeTask
from apps.trainer.stages import Stage
import ov_models
import ov_sharding
from tools.preflight import collectives, peak, roofline
from tools.preflight.compile import (
  Compiled,
  Plan,
  compared_bytes,
  compile_step,
  make_plan,
  stand_in_tokenizer,
  tree_bytes,
)
from tools.preflight.topology import Target, can_compile, smallest

_MOST = 8192  # images per device at which a search for the largest batch ends


@dataclasses.dataclass(frozen=True)
class Assessment:
  """What is known of a stage. Sizes are bytes on one device; None: nothing was compiled.

  Attributes:
    title: names the configuration and the stage.
    target: the machine asked for.
    config: of the stage, at full size.
    compiled_on: the machine compiled for; it stands in for `target` where it is smaller.
    mesh: axis -> size, at full size.
    numbers: name -> figure, the content of the JSON file.
    largest: see `peak.grouped`.
    exchanges: see `collectives.by_kind`, at full size.
    faults: what should not be in the program.
    unknown_loops: loops whose number of turns the program does not tell; they count once.
  """

  title: str
  target: Target
  config: ConfigDict
  compiled_on: str
  mesh: dict[str, int]
  numbers: dict[str, Any]
  largest: list[tuple[int, str, int, str, str]]
  exchanges: list[tuple[str, str, int, float]]
  faults: list[str]
  unknown_loops: list[str]

  @property
  def fits(self) -> bool | None:
    return self.numbers["fits"]

  @property
  def per_device(self) -> int:
    return self.numbers["images_per_device"]


Assess = Callable[[Stage], Assessment]


def assess(
  stage: Stage, make_task: MakeTask, target: Target, *, title: str = "", mfu: float | None = None
) -> Assessment:
  """Compiles the stage's step for `target`, or for a smaller slice with the same program.

  A slice stands in where the size of the data axis changes nothing but the number of partners of
  an all-reduce: not for losses that compare all rows, nor for several slices.

  Args:
    stage: its batch is that of the whole machine.
    make_task: as for `run_training`.
    target: the machine.
    title: of the result.
    mfu: share of the peak that the model's FLOPs reach; None takes the bound of the roofline.

  Raises:
    ValueError: settings that do not fit each other or the machine.
  """
  config = ConfigDict(stage.config.to_dict())
  stage = dataclasses.replace(stage, config=config)
  tokenizer = stand_in_tokenizer(config)
  sizes = ov_sharding.MeshConfig(**config.mesh).resolve(target.chips)
  full = make_plan(
    stage, make_task, tokenizer, jax.sharding.AbstractMesh(sizes.sizes, ov_sharding.AXES)
  )
  compiled, plan, compiled_on = None, full, ""
  if can_compile(target):
    ov_sharding.make_mesh(sizes, target.devices())  # the slice itself must have room for the axes
    smaller = _stand_in(target, sizes, full)
    devices = target.devices() if smaller is None else smaller.devices()
    mesh = ov_sharding.make_mesh(dataclasses.replace(sizes, data=-1), devices)
    per_device = config.batch_size // target.chips
    resized = ConfigDict(config.to_dict())
    resized.batch_size = per_device * mesh.size
    plan = make_plan(dataclasses.replace(stage, config=resized), make_task, tokenizer, mesh)
    compiled_on = target.name if smaller is None else smaller.name
    compiled = compile_step(plan)
  mesh_sizes = dict(zip(ov_sharding.AXES, sizes.sizes, strict=True))
  found = _exchanges(compiled, plan, mesh_sizes)
  exchanges = collectives.by_kind(found)
  numbers = _numbers(full, compiled, target, [sent for *_, sent in exchanges], mfu)
  program = compiled.program if compiled else None
  return Assessment(
    title or stage.name,
    target,
    config,
    compiled_on,
    mesh_sizes,
    numbers,
    peak.grouped(compiled.held or []) if compiled else [],
    exchanges,
    _faults(plan, found, program is not None, mesh_sizes),
    program.unknown_loops if program else [],
  )


def remedies(assess_one: Assess, stage: Stage, target: Target) -> Iterator[tuple[str, Assessment]]:
  """What might make a stage fit, each tried alone by compiling it: (setting, what came of it)."""
  config = stage.config
  if config.model.remat != "full":
    yield _tried(assess_one, stage, {"model.remat": "full"})
  if config.model.dtype == "float32":
    yield _tried(assess_one, stage, {"model.dtype": "bfloat16"})
  free = target.chips // (config.mesh.fsdp * config.mesh.tensor)
  if config.mesh.fsdp == 1 and free > 1:
    yield _tried(assess_one, stage, {"mesh.data": -1, "mesh.fsdp": math.gcd(free, 16)})
  per_device = config.batch_size // target.chips
  more = config.accumulate
  while more * 2 <= per_device and per_device % (more * 2) == 0:
    more *= 2
    setting, result = _tried(assess_one, stage, {"accumulate": more})
    yield setting, result
    if result.fits:
      break
  size = per_device
  while size // 2 >= config.accumulate and size % 2 == 0:
    size //= 2
    setting, result = _tried(assess_one, stage, {"batch_size": size * target.chips})
    yield setting, result
    if result.fits:
      break


def find_batch(
  assess_one: Assess, stage: Stage, target: Target, say: Callable[[str], None]
) -> Assessment | None:
  """The largest batch that fits, to an eighth: doubling, then bisection; None where none fits."""
  unit = stage.config.accumulate
  tried: dict[int, Assessment] = {}

  def fits(count: int) -> bool:
    if count not in tried:
      setting = {"batch_size": count * unit * target.chips}
      tried[count] = assess_one(_changed(stage, setting))
      result = tried[count].numbers
      say(f"{count * unit:,} images per device: {'fits' if result['fits'] else 'too large'}")
    return bool(tried[count].fits)

  low = max(stage.config.batch_size // (target.chips * unit), 1)
  while not fits(low):
    if low == 1:
      return None
    low //= 2
  high = low * 2
  while high * unit <= _MOST and fits(high):
    low, high = high, high * 2
  while high * unit <= _MOST and high - low > max(low // 8, 1):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return tried[low]


def _changed(stage: Stage, changes: dict[str, Any]) -> Stage:
  config = ConfigDict(stage.config.to_dict())
  config.update_from_flattened_dict(changes)
  return dataclasses.replace(stage, config=config)


def _tried(assess_one: Assess, stage: Stage, changes: dict[str, Any]) -> tuple[str, Assessment]:
  setting = " ".join(f"--config.{name}={value}" for name, value in changes.items())
  return setting, assess_one(_changed(stage, changes))


def _stand_in(target: Target, sizes: ov_sharding.MeshConfig, plan: Plan) -> Any:
  if target.topology is None or target.topology.slices > 1 or plan.compares_rows:
    return None
  own = sizes.fsdp * sizes.tensor
  found = smallest(target.topology, own * 2 if sizes.data > 1 else own)
  return found if found and found.chips < target.chips else None


def _exchanges(
  compiled: Compiled | None, plan: Plan, full: dict[str, int]
) -> list[collectives.Collective]:
  """Those of the compiled program, with as many partners as at full size."""
  if compiled is None or compiled.program is None:
    return []
  found = collectives.collectives(compiled.program, dict(plan.mesh.shape))
  return [
    one
    if "?" in one.axes
    else dataclasses.replace(one, group=math.prod(full[axis] for axis in one.axes))
    for one in found
  ]


def _faults(
  plan: Plan, found: list[collectives.Collective], compiled: bool, mesh: dict[str, int]
) -> list[str]:
  params, shardings = plan.parts.abstract["params"], plan.parts.shardings["params"]
  faults = [
    f"{path} is whole on every device although fsdp is {mesh['fsdp']}"
    for path in collectives.replicated_params(params, shardings, mesh)
  ]
  if compiled:
    allowed = compared_bytes(plan)
    for one in collectives.activation_gathers(found, params, compared_bytes=allowed):
      faults.append(
        f"an all-gather of {one.payload:,} bytes along {'+'.join(one.axes)}, {one.times} times a "
        f"step, is of no parameter: {short_source(one.source)} ({one.name})"
      )
  return faults


def _numbers(
  plan: Plan, compiled: Compiled | None, target: Target, sent: list[float], mfu: float | None
) -> dict[str, Any]:
  config, task, parts = plan.config, plan.parts.task, plan.parts
  state = tree_bytes(parts.abstract, parts.shardings)
  params = tree_bytes(parts.abstract["params"], parts.shardings["params"])
  memory, held = (compiled.memory, compiled.held) if compiled else (None, None)
  hbm = compiled.refused[1] if compiled and compiled.refused else target.hbm
  needed = memory.peak if memory else compiled.refused[0] if compiled and compiled.refused else None
  moved = roofline.traffic(compiled.program) if compiled and compiled.program else None
  per_device = config.batch_size // target.chips
  executed = roofline.executed_flops(task.flops_per_example, config.model.remat)
  numbers: dict[str, Any] = {
    "model": task.name,
    "image_size": task.image_size,
    "chips": target.chips,
    "batch_size": config.batch_size,
    "images_per_device": per_device,
    "accumulate": config.accumulate,
    "dtype": config.model.dtype,
    "remat": config.model.remat,
    "num_params": ov_models.num_params(task.abstract_params()),
    "params_bytes": params,
    "optimizer_bytes": state - params,
    "batch_bytes": tree_bytes(plan.batch),
    "argument_bytes": memory.arguments if memory else None,
    "output_bytes": memory.outputs if memory else None,
    "alias_bytes": memory.aliased if memory else None,
    "temp_bytes": memory.temporaries if memory else None,
    "peak_bytes_per_device": memory.peak if memory else None,
    "held_bytes": None if held is None else sum(one.bytes for one in held),
    "hbm_bytes": hbm,
    "fits": bool(memory and (hbm is None or memory.peak <= hbm)) if compiled else None,
    "missing_bytes": max(needed - hbm, 0) if needed and hbm else None,
    "compile_seconds": compiled.seconds if compiled else None,
    "compile_cpu_seconds": compiled.cpu_seconds if compiled else None,
    "model_flops_per_image": task.flops_per_example,
    "executed_flops_per_image": executed,
    "moved_bytes_per_step": moved,
    "sent_bytes_per_step": sum(sent) if memory else None,
    "flops_per_byte": executed * per_device / moved if moved else None,
    "image_tokens_per_step": config.batch_size * _image_tokens(plan),
    "text_tokens_per_step": config.batch_size * _text_tokens(plan),
    "steps": config.total_steps,
  }
  if target.chip is None:
    return numbers
  bound = roofline.bound(
    target.chip,
    flops_per_device=executed * per_device,
    moved=moved,
    sent=sum(sent) if memory else None,
  )
  at_peak = task.flops_per_example * per_device / target.chip.peak_flops
  seconds = at_peak / mfu if mfu else bound.seconds
  images = config.batch_size / seconds
  hours = config.total_steps * seconds / 3600
  return numbers | {
    "bound_compute_seconds": bound.compute,
    "bound_memory_seconds": bound.memory,
    "bound_links_seconds": bound.links,
    "limit": bound.limit,
    "step_seconds": seconds,
    "mfu": at_peak / seconds,
    "images_per_second": images,
    "hours": hours,
    "chip_hours": hours * target.chips,
    "images_per_second_per_host": images / target.hosts,
    "input_bytes_per_second_per_host": images / target.hosts * task.image_size**2 * 3,
  }


def _image_tokens(plan: Plan) -> int:
  """Patches of a picture, whether the encoder sees all of them or not."""
  _, _, patch = plan.config.model.encoder.partition("/")
  return (plan.parts.task.image_size // int(patch)) ** 2


def _text_tokens(plan: Plan) -> int:
  """Token positions of all texts of one example."""
  return sum(leaf.shape[1] for leaf in plan.batch.values() if len(leaf.shape) == 2)


def short_source(source: str) -> str:
  """A file and line without the folders above the repository or the library."""
  return re.sub(r".*/(site-packages|packages/[^/]+|(?=apps/|tools/))/?", "", source)
