"""Every name of the published code is answered, and README.md shows the same table."""

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
  """Dotted names of a configuration, of its parts too."""
  for key, value in tree.items():
    yield f"{prefix}{key}"
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")


TREES = {
  False: set(leaves(base.clip_config())),
  True: set(leaves(base.caption_config())),
}


@pytest.mark.parametrize("family", published.FAMILIES)
def test_every_published_argument_is_taken_or_answered(family):
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
      with pytest.raises(ValueError, match=f"'{row.name}' is not one of this recipe"):
        recipe.get_config(f"{row.name}=x")


@pytest.mark.parametrize("caption", [False, True], ids=["clip_train", "caption_train"])
@pytest.mark.parametrize("name", NAMES["settings"])
def test_every_published_setting_is_taken_or_answered(name, caption):
  said = published.explain_setting(name, "x", caption=caption)
  assert said and "\n" not in said and f"config.{name}" in said
  row = published.find_setting(name)
  if said.endswith("leave it out"):
    return
  for word in said.partition(" is called ")[2].split():
    if word.startswith("--config."):
      leaf = word.removeprefix("--config.").partition("=")[0].rstrip(").,;")
      assert leaf in TREES[caption] or leaf == "optimizer.NAME" or leaf == row.name, said


@pytest.mark.parametrize("caption", [False, True])
def test_no_setting_of_ours_is_taken_for_a_published_one(caption):
  for name in TREES[caption]:
    if row := published.find_setting(name):
      here = row.here if row.caption is None or not caption else row.caption
      assert here == f"--config.{name}={{}}" or name == "model.text", name


def test_values_are_mapped_and_shown():
  explain = published.explain_setting
  assert "--config.wandb_project=run here" in explain("wandb.project", "run", caption=False)
  said = explain("model.text.remat_policy", "minimal_offloaded", caption=False)
  assert "--config.model.remat=offload here" in said
  weight = [explain("coca_caption_loss_weight", "2", caption=caption) for caption in (False, True)]
  assert "--config.loss.caption=2" in weight[0] and "--config.model.caption_weight=2" in weight[1]
  assert "'mask_ratio': 0.5" in explain("model.image.mask_ratio", "0.5", caption=False)
  assert explain("batchsize", "2", caption=False) is None


@pytest.mark.parametrize("name", ["arguments", "flags", "settings"])
def test_the_readme_shows_the_table(name):
  # `python -m apps.configs.published` prints what to paste.
  assert published.tables()[name] in README
