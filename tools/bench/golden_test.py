"""Golden test of the operations, FLOPs and bytes of train steps.

No metric depends on the machine, so all must be equal. After an intended change of a step, update
the file (golden.py shows the command), so that the review shows the difference.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tools.bench import golden
from tools.bench.compiling import load_config, plan_of
from tools.bench.stepping import made_batch, made_state

GOLDEN = json.loads((Path(__file__).parent / "testdata/golden.json").read_text("utf-8"))


def test_every_step_is_in_the_file():
  assert list(GOLDEN) == list(golden.STEPS)


@pytest.mark.parametrize("name", golden.STEPS)
def test_step_is_unchanged(name):
  found = golden.metrics(name)
  changed = {
    key: (GOLDEN[name]["by name"].get(key, 0), found["by name"].get(key, 0))
    for key in GOLDEN[name]["by name"] | found["by name"]
    if GOLDEN[name]["by name"].get(key, 0) != found["by name"].get(key, 0)
  }
  assert not changed, "operations (before, now); golden.py describes how to update the file"
  assert found == GOLDEN[name]


def test_steps_share_one_program_without_host_transfers():
  plan = plan_of(load_config(*golden.STEPS["caption"]))
  step = plan.step()
  state = made_state(plan)
  batches = [made_batch(plan, seed) for seed in range(3)]
  programs: list[str] = []

  def on_event(event: str, seconds: float, **facts: str | int) -> None:
    if event.startswith("/jax/core/compile/"):  # tracing, lowering, compiling
      programs.append(f"{event} {facts.get('fun_name')}")

  losses = []
  for number, one in enumerate(batches):
    if number == 1:  # the first step may trace and compile
      jax.monitoring.register_event_duration_secs_listener(on_event)
    with jax.transfer_guard("disallow"):
      state, metrics = step(state, one)
    losses.append(metrics["loss"])
  jax.monitoring.unregister_event_duration_listener(on_event)
  assert programs == []
  # Every loss is different and near that of a random guess, so real steps ran.
  assert jnp.isfinite(jnp.stack(losses)).all() and len({float(loss) for loss in losses}) == 3
