"""Real steps of tiny models, compiled for 8 simulated CPU devices."""

import dataclasses
import json
import math
from typing import Any

import jax
import pytest

from apps.configs.base import caption_config, resolve
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage
from tools.preflight import report, topology
from tools.preflight.assess import Assessment, assess

HERE = topology.Target("8 x cpu", None, 8, 1, None, here=True)
SMALL = {
  "batch_size": 64,
  "model.encoder": "mu/16",
  "model.image_size": 32,
  "model.vocab_size": 512,
  "model.token_len": 16,
  "model.remat": "full",
}


def _caption(changes: dict[str, Any], target: topology.Target = HERE) -> Assessment:
  settings = SMALL | {"model.decoder": "Ti", "model.decoder_options": {"depth": 3}} | changes
  config = resolve(caption_config()).with_settings(settings)
  return assess(Stage(0, "main", config, 0), target)


@pytest.fixture(scope="module")
def whole() -> Assessment:
  return _caption({})


def test_arguments_are_state_and_batch(whole: Assessment):
  numbers = whole.numbers
  state = numbers["params_bytes"] + numbers["optimizer_bytes"]
  # The CPU layout has no padding, so both counts are equal.
  assert numbers["argument_bytes"] == state + numbers["batch_bytes"]
  assert numbers["params_bytes"] == 4 * numbers["num_params"]
  # Moments in bfloat16 and float32, and the counters of optimizer and step.
  assert numbers["optimizer_bytes"] == pytest.approx(6 * numbers["num_params"], abs=64)
  assert numbers["alias_bytes"] == pytest.approx(state, abs=64)  # donated
  parts = [numbers[f"{name}_bytes"] for name in ("argument", "output", "temp")]
  assert numbers["peak_bytes_per_device"] == sum(parts) - numbers["alias_bytes"]
  image, text = 32 * 32 * 3, 15 * 4
  assert numbers["batch_bytes"] == 8 * (image + text + 1 + 4)  # 8 rows, valid, index
  assert whole.fits and numbers["images_per_device"] == 8


def test_gradients_are_reduced_over_all_devices(whole: Assessment):
  kinds = {(kind, axes) for kind, axes, *_ in whole.collectives}
  assert kinds == {("all-reduce", "data")}
  # Each gradient is reduced once in float32, so a device sends 2 x 7/8 of it; norms and metrics are
  # scalars.
  [(*_, sent)] = whole.collectives
  assert sent == pytest.approx(whole.numbers["params_bytes"] * 2 * 7 / 8, rel=0.02)
  assert whole.errors == [] and whole.unknown_loops == []


def test_fsdp_shards_the_state_and_gathers_params(whole: Assessment):
  split = _caption({"mesh.data": 2, "mesh.fsdp": 4})
  assert split.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
  assert split.numbers["params_bytes"] < whole.numbers["params_bytes"] / 3
  assert "all-gather" in {kind for kind, axes, *_ in split.collectives if axes == "fsdp"}
  assert split.errors == []


def test_every_layer_of_a_scan_counts(whole: Assessment):
  """Twice the layers give twice the traffic, because loop bodies count by their trip count."""
  deep = _caption({"model.decoder_options": {"depth": 6}})
  more = deep.numbers["params_bytes"] - whole.numbers["params_bytes"]
  sent = [sum(sent for *_, sent in one.collectives) for one in (whole, deep)]
  assert sent[1] - sent[0] == pytest.approx(more * 2 * 7 / 8, rel=0.02)


def test_losses_that_compare_all_rows():
  clip = {"model.text": "Ti", "model.decoder": "", "loss.caption": 0.0, "model.embed_dim": 64}
  config = RunConfig().with_settings(SMALL | clip | {"model.text_options": {"depth": 1}})
  found = assess(Stage(0, "main", config, 0), HERE)
  assert found.fits and found.errors == []
  assert found.numbers["text_tokens_per_step"] == 64 * 2 * 16  # two positives
  assert found.numbers["image_tokens_per_step"] == 64 * 2 * 2


def test_without_a_compiler_sizes_remain(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(topology, "has_libtpu", lambda: False)
  found = _caption({"batch_size": 256 * 4, "mesh.fsdp": 2}, topology.target("v4-512"))
  numbers = found.numbers
  assert found.fits is None and numbers["peak_bytes_per_device"] is None
  assert numbers["params_bytes"] < 4 * numbers["num_params"]
  seconds = numbers["executed_flops_per_image"] * 4 / 275e12
  assert numbers["step_seconds"] == pytest.approx(seconds)
  assert numbers["chip_hours"] == pytest.approx(seconds * numbers["steps"] / 3600 * 256)
  text = report.table([found]) + report.assumptions(found, None)
  assert "hours" in text and "peak  " not in text and "nothing was compiled" in text


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 60}, "config.batch_size=60 is not a multiple of 8.*that is: 64"),
    ({"mesh.data": 3}, "needs exactly 3 devices, but there are 8"),
    ({"model.encoder": "XXL/14"}, "XXL"),
  ],
)
def test_incompatible_settings(changes: dict[str, Any], message: str):
  with pytest.raises(ValueError, match=message):
    _caption(changes)


def test_text_and_json(whole: Assessment):
  large = dataclasses.replace(
    whole, title="other", numbers=whole.numbers | {"fits": False, "missing_bytes": 3.5e9}
  )
  text = report.table([whole, large])
  rows = {line[:26].strip(): line[26:].split() for line in text.splitlines()[1:]}
  assert rows["fits"] == ["yes", "NO"]
  assert rows["missing"][-2:] == ["3.50", "GB"]
  more = report.details(whole)
  assert "mesh data=8 x fsdp=1 x tensor=1" in more and "all-reduce" in more
  assert "ERROR: x" in report.details(dataclasses.replace(whole, errors=["x"]))
  [row, _] = json.loads(report.to_json([whole, large]))
  for name in (
    "peak_bytes_per_device", "argument_bytes", "temp_bytes", "compile_seconds",
    "model_flops_per_image", "moved_bytes_per_step",
  ):  # fmt: skip
    assert math.isfinite(row[name]) and row[name] > 0


def test_devices():
  assert jax.device_count() == 8
