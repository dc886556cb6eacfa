"""Tests that every stage of all curricula can be built and has the published number of params."""

import pytest

from apps.configs import openvision2_curriculum, openvision_curriculum
from apps.configs.base import resolve
from apps.trainer.config import model_config
from apps.trainer.stages import resolve_stages
import ov_models

VOCABULARY = 30_522  # entries of the published vocabulary

# Counted in the published code: image tower with its head, text tower, decoder.
OPENVISION = {
  "Ti/16": (5_523_264, 11_534_976, 11_581_056),
  "Ti/8": (5_412_672, 11_534_976, 11_581_056),
  "S/16": (21_737_088, 33_760_512, 33_926_400),
  "S/8": (21_515_904, 33_760_512, 33_926_400),
  "B/16": (86_039_808, 54_516_736, 54_934_528),
  "B/8": (85_597_440, 54_516_736, 54_934_528),
  "L/14": (303_700_992, 110_283_264, 111_106_560),
  "So400m/14": (413_474_544, 449_752_176, 451_134_576),
  "H/14": (631_745_280, 336_209_920, 337_569_792),
}
# The image tower alone; decoders of the published code cannot be constructed.
OPENVISION2 = {
  "L/14": 302_914_560,
  "So400m/14": 412_147_440,
  "H/14": 630_434_560,
  "g/14": 1_010_839_168,
}


def models(recipe, name):
  return [
    stage.config.model for stage in resolve_stages(resolve(recipe.get_config(f"model={name}")))
  ]


@pytest.mark.parametrize(("name", "towers"), OPENVISION.items())
def test_openvision(name, towers):
  for model in models(openvision_curriculum, name):
    params = ov_models.abstract_params(model_config(model, vocab_size=VOCABULARY))
    assert ov_models.num_params(params) == sum(towers) + 1  # and the scale of the logits


@pytest.mark.parametrize(("name", "encoder"), OPENVISION2.items())
def test_openvision2(name, encoder):
  for model in models(openvision2_curriculum, name):
    params = ov_models.abstract_params(model_config(model, vocab_size=VOCABULARY))
    assert ov_models.num_params(params["encoder"]) == encoder
