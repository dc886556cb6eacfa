"""Benchmark of tracing, lowering and compiling a train step, by depth of the model.

The step is that of the app, for a captioner with 2, 4, 8 and 16 layers in encoder and decoder. The
layers are either stacked, with a scan over them, or unrolled. The step is compiled, not run.
"""

from collections.abc import Mapping
import functools
from pathlib import Path
import re

import jax

from apps.trainer.parts import Plan
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import resolve_stages
import ov_sharding
from tools.bench.harness import Benchmark, Case, Goal, Ratio, Stopwatch
from tools.preflight import compile as preflight
from tools.preflight import configs

ROOT = Path(__file__).parents[2]
DEPTHS = (2, 4, 8, 16)
FORMS = {"stacked": True, "unrolled": False}
BATCH, DTYPE = 32, "float32"
MODEL = f"img=Ti/16,txt_decoder_name=Ti,res=160,batch_size={BATCH},dtype={DTYPE},remat=none"
FLAT = 1.5  # CPU seconds of 16 layers relative to 2 layers


def make(scratch: Path) -> Benchmark:
  """Return the benchmark. `scratch` is unused."""
  del scratch
  cases = []
  for depth in DEPTHS:
    for form, scan in FORMS.items():
      run = functools.partial(_compile, depth, scan)
      # The first compilation also loads the compiler.
      cases.append(Case(f"{form}/{depth}", run, warm_up=depth == DEPTHS[0]))
  deep, shallow = f"stacked/{DEPTHS[-1]}", f"stacked/{DEPTHS[0]}"
  flat = Ratio(deep, shallow)
  return Benchmark(
    "compile",
    f"The train step of `apps/configs/openvision2.py:{MODEL}`, compiled for the CPU; the number is "
    "the depth of encoder and decoder. Instructions are those of the compiled program, "
    "including those inside fusions.",
    cases,
    ratios=[flat, Ratio(deep, f"unrolled/{DEPTHS[-1]}")],
    goals=[Goal(flat.name, "cpu_s", FLAT)],
    dtype=DTYPE,
    batch=BATCH,
  )


def load_config(recipe: str, arguments: str) -> RunConfig:
  """Return a configuration from apps/configs."""
  return configs.resolved(f"{ROOT / 'apps/configs' / recipe}:{arguments}")


def _compile(depth: int, scan: bool) -> Mapping[str, float]:
  options = {"depth": depth, "scan": scan}
  config = load_config("openvision2.py", MODEL).with_settings(
    {"model.encoder_options": options, "model.decoder_options": options}
  )
  plan = plan_of(config)
  step = plan.step()
  jax.clear_caches()  # prevents reuse of earlier traces
  total, part = Stopwatch(), Stopwatch()
  traced = step.trace(plan.parts.abstract, plan.batch)
  trace, _ = part.read()
  lowered = traced.lower()
  lower, _ = part.read()
  compiled = lowered.compile()
  backend, _ = part.read()
  cpu, clock = total.read()
  return {
    "trace_cpu_s": trace,
    "lower_cpu_s": lower,
    "compile_cpu_s": backend,
    "cpu_s": cpu,
    "clock_s": clock,
    "instructions": len(re.findall(r"(?m)^\s+(?:ROOT )?%?[\w.\-]+ = ", compiled.as_text() or "")),
  }


def plan_of(config: RunConfig) -> Plan:
  """Return the abstract step of a single-stage configuration, on the first device."""
  (stage,) = resolve_stages(preflight.sized_vocabulary(config))
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])
  return preflight.make_plan(stage, preflight.shape_tokenizer(config), mesh)
