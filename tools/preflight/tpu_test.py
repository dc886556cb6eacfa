"""Compile steps for TPUs that are not present. Needs libtpu (OV_EXTRAS=tpu); takes 15 minutes.

OV_EXTRAS=tpu tools/bazel test //tools/preflight:tpu_test
"""

import json
from pathlib import Path
from typing import Any

import pytest

from apps.configs import openvision, openvision2
from apps.configs.base import caption_config, resolve
from apps.trainer.stages import Stage
from tools.preflight import assess as assess_lib
from tools.preflight import topology

pytestmark = pytest.mark.skipif(
  not topology.has_libtpu(), reason="no libtpu; OV_EXTRAS=tpu brings it"
)
RECIPES = {
  "openvision": openvision,
  "openvision2": openvision2,
}
# Arguments of these recipes, and the memory of their step on each chip.
MEMORY = json.loads((Path(__file__).parent / "testdata/memory.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def environment():
  topology.prepare_environment()


def _stage(changes: dict[str, Any]) -> Stage:
  config = resolve(caption_config()).with_settings(
    {
      "model.encoder": "mu/16",
      "model.decoder": "Ti",
      "model.image_size": 32,
      "model.vocab_size": 512,
      "model.token_len": 16,
      "model.remat": "full",
      "model.decoder_options": {"depth": 2},
      **changes,
    }
  )
  return Stage(0, "main", config, 0)


def _assess(changes: dict[str, Any], name: str) -> assess_lib.Assessment:
  return assess_lib.assess(_stage(changes), topology.target(name))


def test_a_small_slice_gives_the_metrics_of_a_large_one(monkeypatch: pytest.MonkeyPatch):
  """4, 16 and 64 chips at 8 images each have equal memory, and equal traffic within 0.1%."""
  found = {}
  for chips in (4, 16, 64):
    with monkeypatch.context() as patch:
      patch.setattr(assess_lib, "_smaller_target", lambda *_: None)  # compile each size itself
      found[chips] = _assess({"batch_size": 8 * chips}, f"v4-{2 * chips}")
    assert found[chips].compiled_on == f"v4-{2 * chips}"
  stood_in = _assess({"batch_size": 8 * 64}, "v4-128")
  assert stood_in.compiled_on == "v4-8"
  for name in ("argument_bytes", "output_bytes", "alias_bytes"):
    assert len({one.numbers[name] for one in found.values()}) == 1
  for other in (found[16], found[64], stood_in):
    # All-reduces among more chips may be split differently, which changes scratch memory.
    for name in ("temp_bytes", "moved_bytes_per_step"):
      assert other.numbers[name] == pytest.approx(found[4].numbers[name], rel=0.01)
  # Scaled to groups of 64, the small slice sends as much as the large one.
  sent = [one.numbers["sent_bytes_per_step"] for one in (stood_in, found[64])]
  assert sent[0] == pytest.approx(sent[1], rel=0.01)


def test_a_program_that_is_too_large_is_reported():
  found = _assess({"batch_size": 4 * 65536, "model.remat": "none"}, "v5e-4")
  assert found.fits is False and found.numbers["missing_bytes"] > 0
  assert found.numbers["peak_bytes_per_device"] is None


@pytest.mark.parametrize("golden", MEMORY, ids=lambda golden: golden["arguments"].replace("/", "-"))
def test_memory_is_as_recorded(golden: dict[str, Any]):
  """Memory stays within 5% of the recorded value. After an improvement, record the new value."""
  recipe = RECIPES[golden["recipe"]]
  stage = Stage(0, "main", resolve(recipe.get_config(golden["arguments"])), 0)
  found = assess_lib.assess(stage, topology.target(golden["topology"]))
  expected = golden["peak_bytes_per_device"]
  assert found.numbers["peak_bytes_per_device"] == pytest.approx(expected, rel=0.05)
  assert found.errors == []
