"""Benchmark of train step memory, by model and rematerialization policy, as reported by XLA.

The step is compiled for this machine, not run. For other machines and larger models use
//tools/preflight.
"""

from collections.abc import Mapping
import functools
from pathlib import Path

from apps.trainer.parts import peak_bytes
from tools.bench.compiling import load_config, plan_of
from tools.bench.harness import Benchmark, Case, Ratio
from tools.preflight.compile import compile_step, tree_bytes

# Small enough to compile on a CPU in seconds; float32, because CPUs have no bfloat16 matmuls.
BATCH, DTYPE = 32, "float32"
SIZE = f"img=S/16,txt_decoder_name=S,res=160,batch_size={BATCH},dtype={DTYPE}"
RECIPES = {
  "OpenVision 2": ("openvision2.py", SIZE),
  "OpenVision": ("openvision.py", f"{SIZE},txt_name=S"),
}
POLICIES = ("none", "dots", "full")


def make(scratch: Path) -> Benchmark:
  """Return the benchmark. `scratch` is unused."""
  del scratch
  names = [(recipe, policy) for recipe in RECIPES for policy in POLICIES]
  return Benchmark(
    "memory",
    "Train steps of S/16 at 160 px on one device, by rematerialisation policy: train state, "
    "temporaries and peak as the compiler reports them.",
    [
      Case(f"{recipe}, {policy}", functools.partial(_memory, recipe, policy), warm_up=False)
      for recipe, policy in names
    ],
    ratios=[Ratio(f"{r}, {p}", f"{r}, {POLICIES[0]}") for r, p in names if p != POLICIES[0]],
    dtype=DTYPE,
    batch=BATCH,
    exact=True,
  )


def _memory(recipe: str, policy: str) -> Mapping[str, float]:
  path, arguments = RECIPES[recipe]
  plan = plan_of(load_config(path, f"{arguments},remat={policy}"))
  memory = compile_step(plan).memory
  if memory is None:
    raise RuntimeError(f"{recipe}, {policy} does not fit this device; run on a larger one")
  sizes = {
    "state_mib": tree_bytes(plan.parts.abstract),
    "temporary_mib": memory.temp_size_in_bytes,
    "peak_mib": peak_bytes(memory),
  }
  return {name: size / 2**20 for name, size in sizes.items()}
