"""The rows of `step` run, on models of one layer."""

import dataclasses

import pytest

from tools.bench import harness, stepping
from tools.bench.stepping import CPU, GPU, Row


@pytest.mark.parametrize("setting", [CPU, GPU])
@pytest.mark.parametrize("peer", [None, object()])
def test_goals_and_plots_are_of_rows_that_are_there(setting, peer):
  found = stepping.benchmark(setting, peer)
  names = [case.name for case in found.cases]
  assert len(names) == len(set(names))
  assert {name for ratio in found.ratios for name in (ratio.case, ratio.base)} <= set(names)
  rows = {*names, *(ratio.name for ratio in found.ratios)}
  assert {goal.row for goal in found.goals} <= rows
  (plot,) = found.plots
  assert {row for line in plot.lines.values() for _, row in line} <= rows
  assert any("torch" in name for name in names) == (peer is not None)
  assert any("PyTorch: " in note for note in found.notes) == (peer is None)


@pytest.mark.parametrize("variant", stepping.VARIANTS)
def test_a_variant_changes_one_setting(variant):
  plain, varied = (
    _flat(stepping.config_of(CPU, Row("ours", "caption", "Ti/16", name)).to_dict())
    for name in ("", variant)
  )
  changed = {path: value for path, value in varied.items() if value != plain[path]}
  # On a CPU float32 is no change; to hold all logits is no setting.
  assert changed == ({} if variant == "float32" else stepping.VARIANTS[variant])


def _flat(tree, path=()):
  """Leaves by path."""
  if not isinstance(tree, dict):
    return {".".join(path): tree}
  return {
    name: leaf for key, below in tree.items() for name, leaf in _flat(below, (*path, key)).items()
  }


def test_steps_of_all_jax_forms_are_measured(monkeypatch):
  setting = dataclasses.replace(
    CPU,
    models=(("caption", "Ti/16", ("naive",)),),
    resolution=32,
    batch=16,
    variants=("all logits",),
    steps=2,
  )
  real = stepping.config_of

  def shallow(setting, row):
    config = real(setting, row)
    config.model.encoder_options = config.model.decoder_options = {"depth": 1}
    return config

  monkeypatch.setattr(stepping, "config_of", shallow)
  found = stepping.benchmark(setting, None)
  values = harness.measure(found.only(lambda name: "clip" not in name), 1, lambda text: None)
  names = ["caption Ti/16", "naive caption Ti/16", "caption Ti/16, all logits"]
  assert list(values)[:3] == names
  for name in names:
    figures = {metric: value for metric, (value,) in values[name].items()}
    assert set(figures) <= set(harness.METRICS) and all(value > 0 for value in figures.values())
    assert figures["images_per_s"] == pytest.approx(16 / figures["clock_s"])
    assert figures["gflops_per_cpu_s"] == pytest.approx(16 * figures["gflops"] / figures["cpu_s"])
  ours, naive, all_logits = (values[name]["temporary_mib"][0] for name in names)
  logits = 16 * 127 * 32000 * 4 / 2**20
  assert min(naive, all_logits) > ours + logits  # and their gradient
