"""Every setting has a rule, and no value of another type or size passes it."""

import math

from ml_collections import ConfigDict
import pytest

from apps import launch
from apps.configs import (
  base,
  caption_demo,
  clip_demo,
  openvision,
  openvision2,
  openvision2_curriculum,
  openvision_curriculum,
)
from apps.trainer.names import leaves
from apps.trainer.settings import RULES, check_settings
from apps.trainer.stages import resolve_stages

BASES = {"caption_config": base.caption_config, "clip_config": base.clip_config}


def settings_of(config):
  """Return the names of all settings with their values; a dict of options is one of them."""
  found = {}
  for name in leaves(config):
    value = config
    for part in name.split("."):
      value = value[part]
    if name.endswith("options") or not isinstance(value, ConfigDict):
      found[name] = value
  return found


DEFAULTS = {kind: settings_of(make()) for kind, make in BASES.items()}
SETTINGS = {**DEFAULTS["caption_config"], **DEFAULTS["clip_config"]}
SETTINGS.pop("stages")

NUMBERS = (-1e300, -(2**31) - 1, -2, 2**63, 10**30, 10**5000, math.inf, -math.inf, math.nan, 1e300)
STRINGS = ("\0", "a\nb", "\x1b[31m", "\udcff", "x" * 5000)
OTHERS = (b"x", {1: 2}, {1}, object(), 1j, ((((),),),), {"a": {"b": 1}}, [None], ("[",), ConfigDict)


def test_every_setting_has_a_rule():
  assert set(RULES) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_value_of_another_type_or_size_passes(name):
  rule = RULES[name]
  rule(name, SETTINGS[name])
  odd = [*NUMBERS, *STRINGS, *OTHERS, None, True, 0, "", (), [], {}]
  passed = []
  for value in odd:
    try:
      rule(name, value)
      passed.append(value)
    except ValueError as error:
      text = str(error)
      assert name in text and "\n" not in text and len(text) < 400, text
  kinds = {type(value) for value in passed}
  default = SETTINGS[name]
  if isinstance(default, str):
    assert kinds <= {str, type(None)} and not set(passed) & set(STRINGS)
  elif isinstance(default, bool):
    assert passed == [True]
  elif isinstance(default, tuple):
    assert kinds <= {tuple, list}
    assert ("[",) not in passed or name.endswith("_keys")  # no regular expression
  elif isinstance(default, int | float):
    assert kinds <= {int, float} and not set(map(repr, passed)) & {"nan", "inf", "-inf", "1e+300"}
    assert 2**63 not in passed or isinstance(default, float)


@pytest.mark.parametrize(
  ("name", "value", "said"),
  [
    ("optimizer.learning_rate", math.inf, "config.optimizer.learning_rate=inf; expected a finite"),
    ("optimizer.learning_rate", 1e39, "expected a finite number of at least 0"),
    ("optimizer.weight_decay", -1e-9, "expected a finite number of at least 0"),
    ("optimizer.b2", 0.99999999, r"b2=0.99999999; expected a finite number in \[0, 1\)"),
    ("optimizer.eps", 1e-46, r"expected a finite number in \(0, 1\]"),
    ("optimizer.layer_decay_regex", "*", r"'\*' is no regular expression: nothing to repeat"),
    ("optimizer.decay_regex", "a{5000000000}", "is no regular expression: the repetition number"),
    ("optimizer.frozen", ("[",), r"config.optimizer.frozen\[0\]='\[' is no regular expression"),
    ("optimizer.frozen", (1,), r"frozen\[0\]=1; expected a string"),
    ("optimizer.lr_multipliers", ((1, 2),), r"lr_multipliers\[0\]\[0\]=1; expected a string"),
    ("optimizer.lr_multipliers", (("a",),), r"lr_multipliers\[0\]=\('a',\); expected a pair"),
    ("init_from.more", (1,), r"init_from.more\[0\]=1; expected a dict with path"),
    ("init_from.more", ({"include": ()},), r"init_from.more\[0\] has no path"),
    ("init_from.more", ({"paht": "/a"},), r"more\[0\] has 'paht'; did you mean 'path'"),
    (
      "init_from.more",
      ({"path": "a", "include": "x"},),
      r"more\[0\].include='x'; expected a tuple",
    ),
    (
      "input.sources",
      ({"path": "/a", "weight": 0},),
      r"\[0\].weight=0; expected .* above 0",
    ),
    ("input.sources", ("/a",), r"sources\[0\]='/a'; expected a dict with path"),
    ("model.token_len", 2147483648, "config.model.token_len=2147483648; expected at most 32,768"),
    ("model.encoder_options", {"depth": math.nan}, "encoder_options.depth=nan; expected a finite"),
    ("model.encoder_options", {1: 2}, "a field of config.model.encoder_options=1; expected a str"),
    ("mesh.data", 0, "config.mesh.data=0; expected at least 1, or -1"),
    ("batch_size", True, "batch_size=True; expected a whole number"),
    ("eval.features.shots", (1, "a"), r"shots\[1\]='a'; expected a whole number"),
    ("tokenizer.path", "a\nb", "expected a string of one line"),
  ],
)
def test_message(name, value, said):
  kind = next(kind for kind in BASES if name in DEFAULTS[kind])
  config = BASES[kind]()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(ValueError, match=said):
    check_settings(config)


@pytest.mark.parametrize("value", [5, None, "x", ()])
@pytest.mark.parametrize("name", ["optimizer", "optimizer.schedule", "input.demo", "model"])
def test_a_section_that_is_none(name, value):
  config = base.clip_config()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(ValueError, match=f"config.{name}=.*; expected a section of settings"):
    check_settings(config)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"batch_size": -1}, r"config.stages\[0\] \(stage0\): batch_size=-1; expected at least 1"),
    ({"model.token_len": 2**31}, "token_len=2147483648; expected at most"),
    ({"name": "a{b}"}, r"stages\[0\].name='a\{b\}'; expected 1 to 64 letters"),
    ({"name": "../a"}, "name='../a'; expected"),
    ({"name": ""}, "name=''; expected"),
    ({"name": 3}, "name=3; expected"),
    ({"name": ["a"]}, "name=.'a'.; expected"),
    ({1: 2}, r"stages\[0\] \(stage0\): there is no setting 1"),
    ({"stages": ()}, "there is no setting 'stages'"),
    ({"optimizer": 5}, r"\(stage0\): .*"),
    ({"total_steps": 2**31 - 1}, None),
    ({"optimizer.frozen": ("(",)}, r"frozen\[0\]='\(' is no regular expression"),
  ],
)
def test_changes_of_a_stage_are_checked(changes, said):
  config = base.clip_config()
  config.stages = (changes,)
  if said is None:
    assert resolve_stages(config)[0].last_step == 2**31 - 1
    return
  with pytest.raises(ValueError, match=said) as error:
    resolve_stages(config)
  assert "\n" not in str(error.value)


def test_all_stages_together_fit_the_counter():
  config = base.clip_config()
  config.stages = ({"total_steps": 2**30}, {"total_steps": 2**30})
  with pytest.raises(ValueError, match="all stages together have 2,147,483,648 steps"):
    resolve_stages(config)


@pytest.mark.parametrize(
  ("kind", "make"),
  [
    ("caption_config", caption_demo.get_config),
    ("clip_config", clip_demo.get_config),
    ("caption_config", openvision2.get_config),
    ("clip_config", openvision.get_config),
    ("caption_config", openvision2_curriculum.get_config),
    ("clip_config", openvision_curriculum.get_config),
  ],
)
def test_recipes_pass(kind, make):
  launch.check_config(make(), kind, "")


@pytest.mark.parametrize(
  ("config", "said"),
  [
    ({}, "returned a dict; expected a ConfigDict"),
    (ConfigDict(), "for another app"),
    (ConfigDict({"model": {}}), "for another app"),
    (
      ConfigDict({"model": base.model_config()}),
      "has no setting accumulate; start from caption_config",
    ),
  ],
)
def test_a_configuration_of_another_form(config, said):
  with pytest.raises(ValueError, match=said):
    launch.check_config(config, "caption_config", "")
