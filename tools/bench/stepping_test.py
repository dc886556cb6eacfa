"""Tests of the `step` benchmark, on models of one layer."""

import dataclasses

import pytest

from tools.bench import harness, stepping
from tools.bench.stepping import CPU, GPU, Row


@pytest.mark.parametrize("setting", [CPU, GPU])
def test_ratios_and_goals_have_rows(setting):
  found = stepping.benchmark(setting)
  names = [case.name for case in found.cases]
  assert len(names) == len(set(names))
  assert {name for ratio in found.ratios for name in (ratio.case, ratio.base)} <= set(names)
  rows = {*names, *(ratio.name for ratio in found.ratios)}
  assert {goal.row for goal in found.goals} <= rows


@pytest.mark.parametrize("variant", stepping.VARIANTS)
def test_a_variant_changes_one_setting(variant):
  plain, varied = (
    _flat(stepping.config_of(CPU, Row("caption", "Ti/16", name)).to_dict())
    for name in ("", variant)
  )
  changed = {path: value for path, value in varied.items() if value != plain[path]}
  # On a CPU, float32 is the default.
  assert changed == ({} if variant == "float32" else stepping.VARIANTS[variant])


def _flat(tree, path=()):
  """Return leaves by path."""
  if not isinstance(tree, dict):
    return {".".join(path): tree}
  return {
    name: leaf for key, below in tree.items() for name, leaf in _flat(below, (*path, key)).items()
  }


def test_steps_are_measured(monkeypatch):
  setting = dataclasses.replace(
    CPU, models=(("caption", "Ti/16"),), resolution=32, batch=16, variants=("remat full",), steps=2
  )
  real = stepping.config_of

  def shallow(setting, row):
    shallow = {"model.encoder_options": {"depth": 1}, "model.decoder_options": {"depth": 1}}
    return real(setting, row).with_settings(shallow)

  monkeypatch.setattr(stepping, "config_of", shallow)
  found = stepping.benchmark(setting)
  values = harness.measure(found.only(lambda name: "clip" not in name), 1, lambda text: None)
  names = ["caption Ti/16", "caption Ti/16, remat full"]
  assert list(values)[:2] == names
  for name in names:
    metrics = {metric: value for metric, (value,) in values[name].items()}
    assert set(metrics) <= set(harness.METRICS) and all(value > 0 for value in metrics.values())
    assert metrics["images_per_s"] == pytest.approx(16 / metrics["clock_s"])
    assert metrics["gflops_per_cpu_s"] == pytest.approx(16 * metrics["gflops"] / metrics["cpu_s"])
