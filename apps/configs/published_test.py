"""Tests that every name of the released code is handled, and README.md shows the table."""

import json
from pathlib import Path

from ml_collections import ConfigDict
import pytest

from apps.configs import base, openvision, openvision2, published

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
RECIPES = {"openvision": openvision, "openvision2": openvision2}
# "openvision", "openvision2": the arguments that the published configuration files declare;
# "settings": what the scripts set beyond them, and leaves of each part of the published tree.
NAMES = json.loads((HERE / "testdata" / "published_names.json").read_text())


def leaves(tree, prefix=""):
  """Return the dotted names of a configuration and of its sections."""
  for key, value in tree.items():
    yield f"{prefix}{key}"
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")


TREE = set(leaves(base.clip_config()))


@pytest.mark.parametrize("family", published.FAMILIES)
def test_every_published_argument_is_handled(family):
  recipe = RECIPES[family]
  declared = set(NAMES[family])
  assert declared <= {row.name for row in published.ARGUMENTS}
  for row in published.ARGUMENTS:
    how, _, text = getattr(row, family).partition(": ")
    assert how in ("same", "renamed", "ignored", "refused")
    assert how != "refused" or row.name not in declared
    assert (how == "same") == (row.name in recipe.DEFAULTS), row.name
    if how == "renamed":
      assert text in recipe.DEFAULTS
    if how == "refused":
      with pytest.raises(ValueError, match=f"'{row.name}' is not an argument of this recipe"):
        recipe.get_config(f"{row.name}=x")


@pytest.mark.parametrize("name", NAMES["settings"])
def test_every_published_setting_is_handled(name):
  message = published.explain_setting(name, "x")
  assert message and "\n" not in message and f"config.{name}" in message
  row = published.find_setting(name)
  if message.endswith("leave it out"):
    return
  for word in message.partition(" is called ")[2].split():
    if word.startswith("--config."):
      leaf = word.removeprefix("--config.").partition("=")[0].rstrip(").,;")
      assert leaf in TREE or leaf == "optimizer.NAME" or leaf == row.name, message


def test_own_settings_are_not_published_names():
  for name in TREE:
    if row := published.find_setting(name):
      assert row.here == f"--config.{name}={{}}" or name == "model.text", name


def test_values_are_mapped():
  explain = published.explain_setting
  assert "--config.wandb_project=run here" in explain("wandb.project", "run")
  message = explain("model.text.remat_policy", "minimal_offloaded")
  assert "--config.model.remat=offload here" in message
  assert "--config.loss.caption=2" in explain("coca_caption_loss_weight", "2")
  assert "'mask_ratio': 0.5" in explain("model.image.mask_ratio", "0.5")
  assert explain("batchsize", "2") is None


@pytest.mark.parametrize("name", ["arguments", "flags", "settings"])
def test_readme_shows_table(name):
  # `python -m apps.configs.published` prints what to paste.
  assert published.tables()[name] in README
