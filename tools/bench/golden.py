"""Machine-independent metrics of train steps, which CI compares with a file.

  bazel run //tools/bench:golden -- --write=tools/bench/testdata/golden.json

The steps are complete, of tiny models. All metrics describe the program before backend
optimization: StableHLO operations, FLOPs and bytes by XLA's cost analysis (which counts loop bodies
once), and bytes of the arguments. Optimized programs are not counted, because the CPU backend fuses
and splits them by instruction set and number of cores.
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

_WRITE = flags.DEFINE_string("write", None, "File to write the metrics to.")

_TINY = "img=mu/16,txt_decoder_name=Ti,res=32,token_len=16,vocab_size=512,batch_size=8"
_PAIR = "img=mu/16,txt_name=Ti,txt_decoder_name=Ti,res=32,vocab_size=512,batch_size=8"
# Recipe and arguments of each step. Each covers code that the others do not.
STEPS = {
  "caption": ("openvision2.py", f"{_TINY},remat=none"),
  "caption, bfloat16, full remat": ("openvision2.py", f"{_TINY},dtype=bfloat16,remat=full"),
  "clip": ("openvision.py", f"{_PAIR},remat=none"),
}


def metrics(name: str) -> dict[str, Any]:
  """Return the metrics of one of STEPS, without compiling it."""
  import jax

  from tools.preflight.compile import tree_bytes

  jax.clear_caches()  # the text must not depend on earlier traces
  plan = plan_of(load_config(*STEPS[name]))
  lowered = plan.lower()
  cost = lowered.cost_analysis() or {}
  operations = Counter(re.findall(r"= \"?([a-z_]+\.[a-z_]+)", lowered.as_text()))
  return {
    "flops": int(cost["flops"]),
    "bytes accessed": int(cost["bytes accessed"]),
    "bytes of the state": tree_bytes(plan.parts.abstract),
    "of these donated": _donated(lowered),
    "bytes of the batch": tree_bytes(plan.batch),
    "operations": sum(operations.values()),
    "by name": dict(sorted(operations.items())),
  }


def _donated(lowered: Any) -> int:
  """Return the bytes of donated arguments."""
  import jax

  given = [leaf for leaf in jax.tree.leaves(lowered.args_info) if leaf.donated]
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in given)


def main() -> None:
  if not _WRITE.value:
    raise UserError("give --write=tools/bench/testdata/golden.json")
  found = {name: metrics(name) for name in STEPS}
  Path(_WRITE.value).expanduser().write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
  run_app(main)
