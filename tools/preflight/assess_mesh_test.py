"""Real steps of tiny models, compiled for 8 simulated CPU devices."""

import dataclasses
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict
import pytest

from apps.caption_task import CaptionTask
from apps.clip_task import ClipTask
from apps.configs.base import caption_config, clip_config
from apps.trainer.stages import Stage
from tools.preflight import peak, report, topology
from tools.preflight.assess import Assessment, assess

HERE = topology.Target("8 x cpu", None, 8, 1, None, None, here=True)
SMALL = {
  "batch_size": 64,
  "model.encoder": "mu/16",
  "model.image_size": 32,
  "model.vocab_size": 512,
  "model.token_len": 16,
  "model.remat": "full",
}


def _caption(changes: dict[str, Any], target: topology.Target = HERE) -> Assessment:
  config = caption_config()
  config.update_from_flattened_dict(SMALL | {"model.decoder": "Ti"} | changes)
  config.model.decoder_options = ConfigDict({"depth": 3})
  return assess(Stage(0, "main", config, 0), CaptionTask.from_config, target)


@pytest.fixture(scope="module")
def whole() -> Assessment:
  return _caption({})


def test_arguments_are_state_and_batch(whole: Assessment):
  numbers = whole.numbers
  state = numbers["params_bytes"] + numbers["optimizer_bytes"]
  # The CPU's layout fills nothing up, so both counts agree to the byte.
  assert numbers["argument_bytes"] == state + numbers["batch_bytes"]
  assert numbers["params_bytes"] == 4 * numbers["num_params"]
  # Moments in bfloat16 and float32, the counters of optimizer and step.
  assert numbers["optimizer_bytes"] == pytest.approx(6 * numbers["num_params"], abs=64)
  assert numbers["alias_bytes"] == pytest.approx(state, abs=64)  # donated
  parts = [numbers[f"{name}_bytes"] for name in ("argument", "output", "temp")]
  assert numbers["peak_bytes_per_device"] == sum(parts) - numbers["alias_bytes"]
  image, text = 32 * 32 * 3, 15 * 4
  assert numbers["batch_bytes"] == 8 * (image + text + 1 + 4)  # 8 rows, valid, index
  assert whole.fits and numbers["images_per_device"] == 8


def test_gradients_are_reduced_over_all_devices(whole: Assessment):
  kinds = {(kind, axes) for kind, axes, *_ in whole.exchanges}
  assert kinds == {("all-reduce", "data")}
  # Each gradient is reduced once, in float32: 2 x 7/8 of it leaves a device; norms and metrics are
  # scalars beside it.
  [(*_, sent)] = whole.exchanges
  assert sent == pytest.approx(whole.numbers["params_bytes"] * 2 * 7 / 8, rel=0.02)
  assert whole.faults == [] and whole.unknown_loops == []


def test_fsdp_splits_the_state_and_gathers_params(whole: Assessment):
  split = _caption({"mesh.data": 2, "mesh.fsdp": 4})
  assert split.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
  assert split.numbers["params_bytes"] < whole.numbers["params_bytes"] / 3
  assert "all-gather" in {kind for kind, axes, *_ in split.exchanges if axes == "fsdp"}
  assert split.faults == []


def test_layers_of_a_scan_count_each(whole: Assessment):
  """With twice the layers, twice as much of them is moved, for the loop is told by its length."""
  config = caption_config()
  config.update_from_flattened_dict(SMALL | {"model.decoder": "Ti"})
  config.model.decoder_options = ConfigDict({"depth": 6})
  deep = assess(Stage(0, "main", config, 0), CaptionTask.from_config, HERE)
  more = deep.numbers["params_bytes"] - whole.numbers["params_bytes"]
  sent = [sum(sent for *_, sent in one.exchanges) for one in (whole, deep)]
  assert sent[1] - sent[0] == pytest.approx(more * 2 * 7 / 8, rel=0.02)


def test_losses_between_rows():
  config = clip_config()
  config.update_from_flattened_dict(
    SMALL | {"model.text": "Ti", "model.decoder": "", "loss.caption": 0.0, "model.embed_dim": 64}
  )
  config.model.text_options = ConfigDict({"depth": 1})
  found = assess(Stage(0, "main", config, 0), ClipTask.from_config, HERE)
  assert found.fits and found.faults == []
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
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str):
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
  assert "FAULT: x" in report.details(dataclasses.replace(whole, faults=["x"]))
  [row, _] = json.loads(report.to_json([whole, large]))
  for name in (
    "peak_bytes_per_device", "argument_bytes", "temp_bytes", "compile_seconds",
    "model_flops_per_image",
  ):  # fmt: skip
    assert math.isfinite(row[name]) and row[name] > 0
  sources = [one["source"] for one in row["largest"]]  # none for what the compiler moved
  assert any(sources) and {source.count(":") for source in sources if source} == {1}


def test_a_compiler_that_does_not_tell_what_lives(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(peak, "at_peak", lambda *_: None)
  found = _caption({})
  assert found.fits and found.numbers["held_bytes"] is None
  assert "this compiler does not tell" in report.details(found)
  assert "alive at once" not in report.table([found])


def test_devices():
  assert jax.device_count() == 8
