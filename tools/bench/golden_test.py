"""Train steps are what they were, to the operation.

Nothing here depends on the machine, so nothing is tolerated. Where a change means to alter a step,
write the file anew (the command is in golden.py) and let the review see what became more.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from apps.trainer.parts import build_step
import ov_models
from tools.bench import golden
from tools.bench.compiling import load_config, plan_of
from tools.bench.stepping import made_batch, made_state

GOLDEN = json.loads((Path(__file__).parent / "testdata/golden.json").read_text("utf-8"))


def test_every_step_is_in_the_file():
  assert list(GOLDEN) == list(golden.STEPS)


@pytest.mark.parametrize("name", golden.STEPS)
def test_step_is_as_it_was(name):
  found = golden.figures(name)
  changed = {
    key: (GOLDEN[name]["by name"].get(key, 0), found["by name"].get(key, 0))
    for key in GOLDEN[name]["by name"] | found["by name"]
    if GOLDEN[name]["by name"].get(key, 0) != found["by name"].get(key, 0)
  }
  assert not changed, "operations (before, now); golden.py says how to write the file anew"
  assert found == GOLDEN[name]


def test_steps_share_one_program_and_ask_the_host_for_nothing():
  plan = plan_of(load_config(*golden.STEPS["caption"]), "cpu")
  step = build_step(plan.config, plan.parts, plan.mesh, plan.index)
  state = made_state(plan)
  batches = [made_batch(plan, seed) for seed in range(3)]
  programs: list[str] = []

  def on_event(event: str, seconds: float, **facts: str | int) -> None:
    if event.startswith("/jax/core/compile/"):  # tracing, lowering, compiling
      programs.append(f"{event} {facts.get('fun_name')}")

  losses = []
  with ov_models.on_mesh(plan.mesh):
    for number, one in enumerate(batches):
      if number == 1:  # the first step may trace and compile
        jax.monitoring.register_event_duration_secs_listener(on_event)
      with jax.transfer_guard("disallow"):
        state, metrics = step(state, one)
      losses.append(metrics["loss"])
  jax.monitoring.unregister_event_duration_listener(on_event)
  assert programs == []
  # Each batch has another loss near that of a guess, so they were steps.
  assert jnp.isfinite(jnp.stack(losses)).all() and len({float(loss) for loss in losses}) == 3
