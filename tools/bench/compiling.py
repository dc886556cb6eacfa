"""What tracing, lowering and compiling a train step costs, by depth of the model.

The step is the one an app runs, of a captioner whose encoder and decoder have 2, 4, 8 and 16
layers: stacked, so that a loop runs one layer, and unrolled. Compiled for the CPU, or for a v4-8
that need not be there. Nothing runs.
"""

from collections.abc import Mapping
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from tools.bench.harness import Benchmark, Case, Goal, Ratio, Stopwatch

if TYPE_CHECKING:
  from tools.preflight.compile import Plan

ROOT = Path(__file__).parents[2]
DEPTHS = (2, 4, 8, 16)
FORMS = {"stacked": True, "unrolled": False}
BATCH, DTYPE, TPU = 32, "float32", "v4-8"
MODEL = f"img=Ti/16,txt_decoder_name=Ti,res=160,batch_size={BATCH},dtype={DTYPE},remat=none"
FLAT = 1.5  # of the CPU seconds of 2 layers, for eight times the layers


def make_cpu(scratch: Path) -> Benchmark:
  """Compiled by the CPU's compiler."""
  del scratch
  return _make("compile", "cpu")


def make_tpu(scratch: Path) -> Benchmark:
  """Compiled by libtpu, which is told that there is no TPU: jax must not be imported yet.

  Raises:
    ValueError: libtpu is not installed.
  """
  del scratch
  from tools.preflight import topology

  if not topology.has_libtpu():
    raise ValueError(topology.NO_LIBTPU.format(name=TPU))
  topology.prepare_environment()
  return _make("compile_tpu", TPU)


def _make(name: str, target: str) -> Benchmark:
  cases = []
  for depth in DEPTHS:
    for form, scan in FORMS.items():
      run = functools.partial(_compile, target, depth, scan)
      # The first use of a compiler loads it.
      cases.append(Case(f"{form}/{depth}", run, warm_up=depth == DEPTHS[0]))
  deep, shallow = f"stacked/{DEPTHS[-1]}", f"stacked/{DEPTHS[0]}"
  flat = Ratio(deep, shallow)
  return Benchmark(
    name,
    f"The train step of `apps/configs/openvision2.py:{MODEL}`, compiled for {target}; the number "
    "is the depth of encoder and decoder. Instructions are those of the compiled program, inside "
    "fusions too.",
    cases,
    ratios=[flat, Ratio(deep, f"unrolled/{DEPTHS[-1]}")],
    goals=[Goal(flat.name, "cpu_s", FLAT)],
    dtype=DTYPE,
    batch=BATCH,
  )


def load_config(recipe: str, arguments: str) -> ConfigDict:
  """A configuration of apps/configs."""
  from tools.preflight import configs

  return configs.load(f"{ROOT / 'apps/configs' / recipe}:{arguments}")


def _compile(target: str, depth: int, scan: bool) -> Mapping[str, float]:
  import jax

  from apps.trainer.parts import build_step
  import ov_models
  from tools.preflight import hlo

  config = load_config("openvision2.py", MODEL)
  options = ConfigDict({"depth": depth, "scan": scan})
  config.model.encoder_options = config.model.decoder_options = options
  plan = plan_of(config, target)
  step = build_step(plan.config, plan.parts, plan.mesh, plan.index)
  jax.clear_caches()  # else what an earlier run traced is found again
  total, part = Stopwatch(), Stopwatch()
  with ov_models.on_mesh(plan.mesh):
    traced = step.trace(plan.parts.abstract, plan.batch)
  trace, _ = part.read()
  lowered = traced.lower()
  lower, _ = part.read()
  compiled = lowered.compile()
  backend, _ = part.read()
  cpu, clock = total.read()
  program = hlo.parse(compiled.as_text() or "")
  return {
    "trace_cpu_s": trace,
    "lower_cpu_s": lower,
    "compile_cpu_s": backend,
    "cpu_s": cpu,
    "clock_s": clock,
    "instructions": sum(map(len, program.computations.values())),
  }


def plan_of(config: ConfigDict, target: str) -> "Plan":
  """The step of a configuration of one stage, abstract, on one "cpu" or "gpu" or a TPU slice."""
  import jax

  import ov_sharding
  from tools.preflight import topology

  here = target in ("cpu", "gpu")
  devices = jax.devices(target)[:1] if here else topology.parse(target).devices()
  return plan_on(config, ov_sharding.make_mesh(ov_sharding.MeshConfig(), devices))


def plan_on(config: ConfigDict, mesh: Any) -> "Plan":
  """The same on a mesh, which may be an abstract one."""
  from apps.trainer.stages import resolve_stages
  from tools.preflight import compile as preflight
  from tools.preflight import configs

  (stage,) = resolve_stages(config)
  tokenizer = preflight.stand_in_tokenizer(config)
  return preflight.make_plan(stage, configs.task_of(config), tokenizer, mesh)
