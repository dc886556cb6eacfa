"""Tests of the published CLIP protocols.

testdata/protocols.json holds the settings of each protocol that differ from the defaults of
clip_train.
"""

import json
from pathlib import Path
import re

from ml_collections import ConfigDict
import pytest

from apps.configs import base, datacomp, slip
from apps.launch import check_config
from apps.trainer.config import model_config, to_json
from apps.trainer.names import leaf_values
from apps.trainer.paths import flatten_paths, is_stacked
import ov_models

GOLDEN = json.loads((Path(__file__).parent / "testdata/protocols.json").read_text())
PROTOCOLS = {"datacomp": datacomp, "slip": slip}


def config_of(name: str) -> ConfigDict:
  protocol, _, arguments = name.partition(":")
  return PROTOCOLS[protocol].get_config(arguments)


def changes(config: ConfigDict):
  """Return the resolved settings that differ from the defaults, by dotted names."""
  resolved, default = (json.loads(to_json(base.resolve(c))) for c in (config, base.clip_config()))
  tree, defaults = dict(leaf_values(resolved)), dict(leaf_values(default))
  return {name: tree[name] for name in tree if tree[name] != defaults.get(name)}


@pytest.mark.parametrize("name", GOLDEN)
def test_resolved_settings(name):
  assert changes(config_of(name)) == GOLDEN[name]
  check_config(config_of(name), "clip_config")


def params_of(name: str):
  config = model_config(base.resolve(config_of(name)).model, vocab_size=49_408)
  return ov_models.abstract_params(config)


def test_towers_have_the_published_size():
  # open_clip's ViT-B-32, docs/model_profile.csv.
  assert ov_models.num_params(params_of("datacomp:small")) == 151_277_313


@pytest.mark.parametrize(("name", "cls_decays"), [("datacomp:small", False), ("slip:cc3m", True)])
def test_params_with_weight_decay_are_those_of_the_released_code(name, cls_decays):
  """Both decay what has two axes or more and is no bias or norm; timm's cls token has three."""
  decay = base.resolve(config_of(name)).optimizer.decay_regex
  for path, shape in flatten_paths(params_of(name)).items():
    axes = len(shape.shape) - is_stacked(path)
    expected = axes >= 2 or (path == "encoder/cls" and cls_decays)
    assert bool(re.search(decay, path)) == expected, path


def test_arguments():
  config = slip.get_config("data=yfcc15m,txt_key=title+description,vocab_path=/v,imagenet=/i")
  assert config.input.alt_keys == ("title", "description")
  assert config.tokenizer.path == "/v" and "pool" not in config.model.text_options
  assert (config.eval.zero_shot.dir, config.eval.zero_shot.classes) == ("/i", "imagenet")
  assert slip.get_config("pairs=2800000").total_steps == 40 * 683


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("datacomp:scale=large", "scale='large': expected one of small, medium"),
    ("slip:data=coco", "data='coco': expected one of cc3m, cc12m, yfcc15m"),
    ("slip:img=L/16", "img='L/16': expected one of B/16, S/16"),
    ("slip:pairs=4000", "pairs=4000: expected at least one batch of 4,096"),
  ],
)
def test_errors(name, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    config_of(name)
