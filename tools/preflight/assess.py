"""Assess a training stage on a target machine: compile its step, and search for settings that fit.

Sizes are bytes on one device.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax

from apps.trainer.parts import Plan, peak_bytes
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage
import ov_models
import ov_sharding
from tools.preflight import collectives, roofline
from tools.preflight.compile import (
  Compiled,
  compared_bytes,
  compile_step,
  make_plan,
  shape_tokenizer,
  sized_vocabulary,
  tree_bytes,
)
from tools.preflight.topology import Target, can_compile, smallest

_MOST = 8192  # upper limit of the batch size search, in images per device


@dataclasses.dataclass(frozen=True)
class Assessment:
  """Metrics of a stage. Sizes are bytes on one device, or None if nothing was compiled.

  Attributes:
    title: name of the configuration and the stage.
    target: the requested machine.
    config: configuration of the stage, at full size.
    compiled_on: the machine that the step was compiled for; may be smaller than `target`.
    mesh: axis -> size, at full size.
    numbers: name -> value, the content of the JSON file.
    collectives: collectives as `collectives.by_kind` returns them, at full size.
    errors: unwanted layouts and collectives of the program.
    unknown_loops: loops whose trip count is not in the program; they count once.
  """

  title: str
  target: Target
  config: RunConfig
  compiled_on: str
  mesh: dict[str, int]
  numbers: dict[str, Any]
  collectives: list[tuple[str, str, int, float]]
  errors: list[str]
  unknown_loops: list[str]

  @property
  def fits(self) -> bool | None:
    return self.numbers["fits"]

  @property
  def per_device(self) -> int:
    return self.numbers["images_per_device"]


Assess = Callable[[Stage], Assessment]


def assess(
  stage: Stage, target: Target, *, title: str = "", mfu: float | None = None
) -> Assessment:
  """Compile the stage's step for `target`, or for a smaller slice with the same program.

  A smaller slice is used if the size of the data axis changes only the group size of all-reduces.
  This excludes losses that compare all rows of the batch, and targets of several slices.

  Args:
    stage: the stage; its batch size is that of all devices together.
    target: the machine.
    title: title of the result.
    mfu: expected model FLOPs utilization; None assumes the roofline bound.

  Raises:
    ValueError: if settings are incompatible with each other or the machine.
  """
  tokenizer = shape_tokenizer(stage.config)
  config = sized_vocabulary(stage.config)
  stage = dataclasses.replace(stage, config=config)
  sizes = ov_sharding.MeshConfig(**config.mesh.to_dict()).resolve(target.chips)
  full = make_plan(stage, tokenizer, jax.sharding.AbstractMesh(sizes.sizes, ov_sharding.AXES))
  compiled, plan, compiled_on = None, full, ""
  if can_compile(target):
    ov_sharding.make_mesh(sizes, target.devices())  # the mesh axes must fit the target, too
    smaller = _smaller_target(target, sizes, full)
    devices = target.devices() if smaller is None else smaller.devices()
    mesh = ov_sharding.make_mesh(dataclasses.replace(sizes, data=-1), devices)
    per_device = config.batch_size // target.chips
    resized = dataclasses.replace(config, batch_size=per_device * mesh.size)
    plan = make_plan(dataclasses.replace(stage, config=resized), tokenizer, mesh)
    compiled_on = target.name if smaller is None else smaller.name
    compiled = compile_step(plan)
  mesh_sizes = dict(zip(ov_sharding.AXES, sizes.sizes, strict=True))
  found, unknown_loops = _collectives(compiled, plan, mesh_sizes)
  exchanges = collectives.by_kind(found)
  numbers = _numbers(full, compiled, target, [sent for *_, sent in exchanges], mfu)
  return Assessment(
    title or stage.name,
    target,
    config,
    compiled_on,
    mesh_sizes,
    numbers,
    exchanges,
    _errors(plan, found, mesh_sizes),
    unknown_loops,
  )


def remedies(assess_one: Assess, stage: Stage, target: Target) -> Iterator[tuple[str, Assessment]]:
  """Yield (setting, assessment) for settings that may make a stage fit, each applied alone."""
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
  assess_one: Assess, stage: Stage, target: Target, log: Callable[[str], None]
) -> Assessment | None:
  """Return the largest batch size that fits, within 1/8, by doubling and bisection; or None."""
  unit = stage.config.accumulate
  tried: dict[int, Assessment] = {}

  def fits(count: int) -> bool:
    if count not in tried:
      setting = {"batch_size": count * unit * target.chips}
      tried[count] = assess_one(_changed(stage, setting))
      result = tried[count].numbers
      log(f"{count * unit:,} images per device: {'fits' if result['fits'] else 'too large'}")
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
  return dataclasses.replace(stage, config=stage.config.with_settings(changes))


def _tried(assess_one: Assess, stage: Stage, changes: dict[str, Any]) -> tuple[str, Assessment]:
  setting = " ".join(f"--config.{name}={value}" for name, value in changes.items())
  return setting, assess_one(_changed(stage, changes))


def _smaller_target(target: Target, sizes: ov_sharding.MeshConfig, plan: Plan) -> Target | None:
  if target.slice is None or target.slices > 1 or plan.parts.task.compares_rows:
    return None
  own = sizes.fsdp * sizes.tensor
  found = smallest(target.slice, own * 2 if sizes.data > 1 else own)
  return found if found and found.chips < target.chips else None


def _collectives(
  compiled: Compiled | None, plan: Plan, full: dict[str, int]
) -> tuple[list[collectives.Collective], list[str]]:
  """Return the collectives with the group sizes of the target, and loops of unknown length."""
  if compiled is None or not compiled.text:
    return [], []
  found, unknown = collectives.collectives(compiled.text, dict(plan.mesh.shape))
  return [
    one
    if "?" in one.axes
    else dataclasses.replace(one, group=math.prod(full[axis] for axis in one.axes))
    for one in found
  ], unknown


def _errors(plan: Plan, found: list[collectives.Collective], mesh: dict[str, int]) -> list[str]:
  params, shardings = plan.parts.abstract["params"], plan.parts.shardings["params"]
  errors = [
    f"{path} is replicated on every device although fsdp is {mesh['fsdp']}"
    for path in collectives.replicated_params(params, shardings, mesh)
  ]
  allowed = compared_bytes(plan) if found else 0
  for one in collectives.activation_gathers(found, params, compared_bytes=allowed):
    errors.append(
      f"an all-gather of {one.payload:,} bytes along {'+'.join(one.axes)}, {one.times} times a "
      f"step, matches no parameter: {one.name}"
    )
  return errors


def _numbers(
  plan: Plan, compiled: Compiled | None, target: Target, sent: list[float], mfu: float | None
) -> dict[str, Any]:
  config, task, parts = plan.config, plan.parts.task, plan.parts
  state = tree_bytes(parts.abstract, parts.shardings)
  params = tree_bytes(parts.abstract["params"], parts.shardings["params"])
  memory = compiled.memory if compiled else None
  peak = peak_bytes(memory) if memory else None
  hbm = compiled.refused[1] if compiled and compiled.refused else target.hbm
  needed = peak or (compiled.refused[0] if compiled and compiled.refused else None)
  # XLA's cost analysis counts loop bodies once and includes on-chip memory, so it gives no bound.
  # Arguments and outputs do: every step reads and writes them.
  moved = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else None
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
    "argument_bytes": memory.argument_size_in_bytes if memory else None,
    "output_bytes": memory.output_size_in_bytes if memory else None,
    "alias_bytes": memory.alias_size_in_bytes if memory else None,
    "temp_bytes": memory.temp_size_in_bytes if memory else None,
    "peak_bytes_per_device": peak,
    "hbm_bytes": hbm,
    "fits": bool(peak and (hbm is None or peak <= hbm)) if compiled else None,
    "missing_bytes": max(needed - hbm, 0) if needed and hbm else None,
    "compile_seconds": compiled.seconds if compiled else None,
    "compile_cpu_seconds": compiled.cpu_seconds if compiled else None,
    "model_flops_per_image": task.flops_per_example,
    "executed_flops_per_image": executed,
    "moved_bytes_per_step": moved,
    "sent_bytes_per_step": sum(sent) if memory else None,
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
  """Return the number of patches of an image, including those that the encoder drops."""
  _, _, patch = plan.config.model.encoder.partition("/")
  return (plan.parts.task.image_size // int(patch)) ** 2


def _text_tokens(plan: Plan) -> int:
  """Return the number of token positions in all texts of an example."""
  return sum(leaf.shape[1] for leaf in plan.batch.values() if len(leaf.shape) == 2)
