"""Tests of the published curricula: stages, effects of arguments, and errors.

testdata/curricula.json contains the main values of all recipes. Steps and warm-ups are those that
the published scripts print for their virtual epochs; they are repeated below.
"""

import importlib
import json
from pathlib import Path

import pytest

from apps.configs import openvision, openvision2_curriculum, openvision_curriculum
from apps.configs.base import resolve
from apps.trainer.config import to_json
from apps.trainer.stages import resolve_stages

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "testdata" / "curricula.json").read_text())
README = (HERE / "README.md").read_text()
FAMILIES = {"openvision": openvision_curriculum, "openvision2": openvision2_curriculum}
RECIPES = [f"{family}_{model}" for family, of in FAMILIES.items() for model in of.FAMILY.models]


def named(recipe):
  """Return `get_config` of the file named after a model."""
  return importlib.import_module(f"apps.configs.{recipe.replace('/', '').lower()}").get_config


def facts(config):
  """Return the main values of each stage."""
  return [
    {"name": stage.name, **decisive(stage.config)} for stage in resolve_stages(resolve(config))
  ]


def decisive(config):
  model = config.model
  towers = [model.encoder, model.text, model.decoder]
  return {
    "model": "+".join(tower for tower in towers if tower),
    "px": model.image_size,
    "tokens": [length for length in (model.token_len, model.caption_len) if length],
    "dtype": model.dtype,
    "batch": config.batch_size,
    "steps": config.total_steps,
    "warmup": config.optimizer.schedule.warmup_steps,
    "rate": float(f"{config.optimizer.learning_rate:.6g}"),
  }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_published_model_has_a_file_with_its_values(recipe):
  config = named(recipe)()
  assert facts(config) == GOLDEN[recipe]
  family, _, model = recipe.partition("_")
  chosen = FAMILIES[family].get_config(f"model={model}")
  assert resolve(chosen) == resolve(config)


def test_golden_file_has_no_unused_recipes():
  assert sorted(GOLDEN) == sorted(RECIPES)
  files = {f"{path.stem}" for path in HERE.glob("openvision*_*[0-9].py")}
  assert files == {recipe.replace("/", "").lower() for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stages_have_the_steps_of_the_published_scripts(recipe):
  printed = [  # batch, peak rate, steps, warm-up steps
    (32_768, 1.024e-3, 390_981, 1_563),
    (16_384, 2.56e-5, 62_556, 1_563),
    (8_192, 3.2e-6, 31_278, 0),
  ]
  stages = GOLDEN[recipe]
  got = [(stage["batch"], stage["rate"], stage["steps"], stage["warmup"]) for stage in stages]
  assert got == printed[: len(stages)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_readme_lists_recipe(recipe):
  file = f"`{recipe.replace('/', '').lower()}.py`"
  (row,) = [line for line in README.splitlines() if line.startswith(f"| {file} |")]
  first, *_ = stages = GOLDEN[recipe]
  pixels = ", ".join(str(stage["px"]) for stage in stages)
  for value in (first["model"].replace("+", " + "), pixels, first["dtype"]):
    assert f"| {value} |" in row


def test_scales_preserve_examples_and_adjust_rate():
  small = facts(named("openvision2_L/14")("batch_scale=0.125"))
  for own, published in zip(small, GOLDEN["openvision2_L/14"], strict=True):
    assert own["batch"] * 8 == published["batch"]
    assert own["rate"] * 8 == pytest.approx(published["rate"], rel=1e-5)  # stored with six digits
    assert 0 <= own["steps"] - 8 * published["steps"] < 8  # one is rounded down
  short = facts(named("openvision2_L/14")("epochs_scale=0.01"))
  assert [stage["steps"] for stage in short] == [3_909, 625, 312]
  assert [stage["warmup"] for stage in short] == [15, 15, 0]
  assert [stage["batch"] for stage in short] == [32_768, 16_384, 8_192]


def test_res_selects_stages_and_extra_stages_repeat_the_last():
  stages = facts(named("openvision2_H/14")("res=84+224+336+448"))
  assert [stage["name"] for stage in stages] == ["84px", "224px", "336px", "448px"]
  assert stages[3] == stages[2] | {"name": "448px", "px": 448}
  assert [stage["px"] for stage in facts(named("openvision_L/14")("84+224"))] == [84, 224]


def test_recipe_arguments_apply_to_all_stages():
  config = named("openvision_So400m/14")(
    "vocab_path=/data/vocab.txt,remat=dots,fsdp_parallelism=4,init=/runs/a,txt_decoder_name=L,"
    "token_len=64,txt_key2=a+b"
  )
  for stage in resolve_stages(resolve(config)):
    own = stage.config
    assert (own.model.decoder, own.model.text, own.model.remat) == ("L", "So400m", "dots")
    assert (own.model.token_len, own.mesh.fsdp, own.init_from.path) == (64, 4, "/runs/a")
    assert own.tokenizer.path == "/data/vocab.txt"
    assert own.input.caption_keys == ("a", "b")


def test_runlocal_runs_one_step_per_stage():
  stages = facts(named("openvision_B/8")("runlocal"))
  assert [(stage["px"], stage["steps"], stage["batch"]) for stage in stages] == [
    (160, 1, 8),
    (224, 1, 8),
    (384, 1, 8),
  ]


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("model=Q/14", "model='Q/14': expected one of L/14, So400m/14, H/14, g/14"),
    ("batch_scale=0", "batch_scale=0.0: expected a number above 0"),
    ("epochs_scale=-1", "epochs_scale=-1.0: expected a number above 0"),
    ("batch_factor=1", "unknown config argument 'batch_factor'; did you mean 'batch_scale'"),
    ("res=84+big", "res='84\\+big': expected different sizes, such as 84\\+224\\+336"),
    ("res=84+84", "expected different sizes"),
    ("res=0", "expected different sizes"),
  ],
)
def test_mistakes_are_named(arg, message):
  with pytest.raises(ValueError, match=message):
    openvision2_curriculum.get_config(arg)


def test_model_files_reject_model_argument():
  with pytest.raises(ValueError, match="unknown config argument 'model'"):
    named("openvision2_L/14")("model=H/14")


def test_stages_equal_recipe_with_published_arguments():
  script = [
    "res=160,batch_factor=2,base_lr=8e-6,imagenet_epoch=10000,vitual_warmup_epoch=40",
    "res=224,batch_factor=1,base_lr=4e-7,imagenet_epoch=800,vitual_warmup_epoch=20",
    "res=384,batch_factor=0.5,base_lr=1e-7,imagenet_epoch=200,vitual_warmup_epoch=0",
  ]
  stages = resolve_stages(resolve(named("openvision_S/16")()))
  for stage, arguments in zip(stages, script, strict=True):
    alone = openvision.get_config(
      f"{arguments},img=S/16,txt_name=S/16,txt_decoder_name=S,dtype=bfloat16"
    )
    assert to_json(stage.config) == to_json(resolve(alone))
