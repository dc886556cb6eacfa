"""Figures of train steps that do not depend on the machine: what CI holds against a file.

  bazel run //tools/bench:golden -- --write=tools/bench/testdata/golden.json

Of tiny models, with all that a step does. What is counted comes before the backend has optimised
the program: operations of StableHLO, and FLOPs and bytes of the unoptimised program as XLA's cost
analysis counts them, loop bodies once; and the bytes of what goes into the step and of what its
forward pass keeps of an image, by rematerialisation policy. The CPU backend fuses and splits by
instruction set and number of cores, so its instructions are no measure.
"""

from collections import Counter
import json
import math
from pathlib import Path
import re
from typing import Any

from absl import flags

from apps.trainer.errors import UserError, run_app
from tools.bench.compiling import load_config, plan_of

_WRITE = flags.DEFINE_string("write", None, "File to write the figures to.")

_TINY = "img=mu/16,txt_decoder_name=Ti,res=32,token_len=16,vocab_size=512,batch_size=8"
_PAIR = "img=mu/16,txt_name=Ti,txt_decoder_name=Ti,res=32,vocab_size=512,batch_size=8"
# Recipe and arguments of a step. Each has a part that the others lack.
STEPS = {
  "caption": ("openvision2.py", f"{_TINY},remat=none"),
  "caption, bfloat16, full remat": ("openvision2.py", f"{_TINY},dtype=bfloat16,remat=full"),
  "clip": ("openvision.py", f"{_PAIR},remat=none"),
}
POLICIES = ("none", "dots", "full")


def figures(name: str) -> dict[str, Any]:
  """Of one of STEPS, without compiling it."""
  import jax

  from apps.trainer.parts import build_step
  import ov_models
  from tools.preflight.compile import tree_bytes

  jax.clear_caches()  # the text must not depend on what was traced before
  plan = plan_of(load_config(*STEPS[name]), "cpu")
  step = build_step(plan.config, plan.parts, plan.mesh, plan.index)
  with ov_models.on_mesh(plan.mesh):
    lowered = step.lower(plan.parts.abstract, plan.batch)
  cost = lowered.cost_analysis() or {}
  operations = Counter(re.findall(r"= \"?([a-z_]+\.[a-z_]+)", lowered.as_text()))
  return {
    "flops": int(cost["flops"]),
    "bytes accessed": int(cost["bytes accessed"]),
    "bytes of the state": tree_bytes(plan.parts.abstract),
    "of these donated": _donated(lowered),
    "bytes of the batch": tree_bytes(plan.batch),
    "bytes kept of an image": {policy: _kept(name, policy) for policy in POLICIES},
    "operations": sum(operations.values()),
    "by name": dict(sorted(operations.items())),
  }


def _donated(lowered: Any) -> int:
  """Bytes of the arguments that the step may write its results over."""
  import jax

  given = [leaf for leaf in jax.tree.leaves(lowered.args_info) if leaf.donated]
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in given)


def _kept(name: str, policy: str) -> int:
  """Bytes on the device that the forward pass leaves to the backward pass, for each image."""
  from tools.preflight import estimate

  def of_batch(images: int) -> Any:
    config = load_config(*STEPS[name])
    config.model.remat, config.batch_size = policy, images
    return plan_of(config, "cpu")

  return int(estimate.kept_bytes(of_batch)[0])


def main() -> None:
  if not _WRITE.value:
    raise UserError("give --write=tools/bench/testdata/golden.json")
  found = {name: figures(name) for name in STEPS}
  Path(_WRITE.value).expanduser().write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
  run_app(main)
