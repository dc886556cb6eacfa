"""Tests that every setting has a rule that rejects values of wrong type or size."""

import dataclasses
import functools
import math
import typing

from ml_collections import ConfigDict
import pytest

from apps import launch
from apps.configs import (
  base,
  caption_demo,
  clip_demo,
  icons_caption,
  icons_clip,
  openvision,
  openvision2,
  openvision2_curriculum,
  openvision_curriculum,
)
from apps.configs.objectives import OBJECTIVES
from apps.trainer.run_config import RunConfig
from apps.trainer.section import Section, rule_of
from apps.trainer.stages import resolve_stages


def settings_of(kind, path=""):
  """Yield the dotted name of each setting of a section, with its rule and its default."""
  default, hints = kind(), typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    if isinstance(getattr(default, field.name), Section):
      yield from settings_of(type(getattr(default, field.name)), f"{path}{field.name}.")
    else:
      yield f"{path}{field.name}", (rule_of(field, hints[field.name]), getattr(default, field.name))


SETTINGS = dict(settings_of(RunConfig))
SETTINGS.pop("stages")

NUMBERS = (-1e300, -(2**31) - 1, -2, 2**63, 10**30, 10**5000, math.inf, -math.inf, math.nan, 1e300)
STRINGS = ("\0", "a\nb", "\x1b[31m", "\udcff", "x" * 5000)
OTHERS = (b"x", {1: 2}, {1}, object(), 1j, ((((),),),), {"a": {"b": 1}}, [None], ("[",), ConfigDict)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_of_wrong_type_or_size_are_rejected(name):
  rule, default = SETTINGS[name]
  rule(name, default)
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
  ("name", "value", "message"),
  [
    ("optimizer.learning_rate", math.inf, "config.optimizer.learning_rate=inf; expected a finite"),
    ("optimizer.learning_rate", 1e39, "expected a finite number of at least 0"),
    ("optimizer.weight_decay", -1e-9, "expected a finite number of at least 0"),
    ("optimizer.learning_rate", math.nan, "learning_rate=nan; expected a finite number"),
    ("optimizer.lr_multipliers", (("a", -1.0),), r"\[0\]\[1\]=-1.0; expected a finite number of"),
    (
      "optimizer.schedule.kind",
      "cosine",
      "expected one of warmup_cosine, wsd, rsqrt",
    ),
    ("optimizer.schedule.cooldown_shape", "step", "expected one of linear, cosine, sqrt"),
    ("optimizer.schedule.min_multiplier", 1.0, r"expected a finite number in \[0, 1\)"),
    ("optimizer.schedule.timescale", 0, "timescale=0; expected at least 1"),
    ("optimizer.layer_decay", 1.5, r"expected a finite number in \(0, 1\]"),
    ("optimizer.grad_clip_norm", 0.0, "expected a finite number above 0"),
    ("optimizer.ema_decay", 1.0, r"expected a finite number in \(0, 1\)"),
    ("optimizer.b2", 0.99999999, r"b2=0.99999999; expected a finite number in \[0, 1\)"),
    ("optimizer.eps", 1e-46, r"expected a finite number in \(0, 1\]"),
    (
      "optimizer.layer_decay_regex",
      "*",
      r"'\*' is not a valid regular expression: nothing to repeat",
    ),
    (
      "optimizer.decay_regex",
      "a{5000000000}",
      "is not a valid regular expression: the repetition number",
    ),
    (
      "optimizer.frozen",
      ("[",),
      r"config.optimizer.frozen\[0\]='\[' is not a valid regular expression",
    ),
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
    ("batch_size", True, "batch_size=True; expected an integer"),
    ("eval.features.shots", (1, "a"), r"shots\[1\]='a'; expected an integer"),
    ("tokenizer.path", "a\nb", "expected a string of one line"),
  ],
)
def test_message(name, value, message):
  config = base.clip_config()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(ValueError, match=message):
    base.resolve(config)


@pytest.mark.parametrize("value", [5, None, "x", ()])
@pytest.mark.parametrize("name", ["optimizer", "optimizer.schedule", "input.demo", "model"])
def test_invalid_section(name, value):
  config = base.clip_config()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(ValueError, match=f"config.{name}=.*; expected a section of settings"):
    base.resolve(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": -1}, r"config.stages\[0\] \(stage0\): batch_size=-1; expected at least 1"),
    ({"model.token_len": 2**31}, "token_len=2147483648; expected at most"),
    ({"name": "a{b}"}, r"stages\[0\].name='a\{b\}'; expected 1 to 64 letters"),
    ({"name": "../a"}, "name='../a'; expected"),
    ({"name": ""}, "name=''; expected"),
    ({"name": 3}, "name=3; expected"),
    ({"name": ["a"]}, "name=.'a'.; expected"),
    ({1: 2}, r"stages\[0\] \(stage0\): unknown setting 1"),
    ({"stages": ()}, "unknown setting 'stages'"),
    ({"optimizer": 5}, r"\(stage0\): .*"),
    ({"total_steps": 2**31 - 1}, None),
    ({"optimizer.frozen": ("(",)}, r"frozen\[0\]='\(' is not a valid regular expression"),
  ],
)
def test_stage_changes_are_checked(changes, message):
  config = RunConfig(stages=(changes,))
  if message is None:
    assert resolve_stages(config)[0].last_step == 2**31 - 1
    return
  with pytest.raises(ValueError, match=message) as error:
    resolve_stages(config)
  assert "\n" not in str(error.value)


def test_total_steps_of_all_stages_are_limited():
  config = RunConfig(stages=({"total_steps": 2**30}, {"total_steps": 2**30}))
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
    ("caption_config", icons_caption.get_config),
    ("caption_config", lambda: icons_caption.get_config("runlocal")),
    *(
      ("clip_config", functools.partial(icons_clip.get_config, f"loss={loss}"))
      for loss in OBJECTIVES
    ),
    ("clip_config", lambda: icons_clip.get_config("runlocal,data=/data/icons")),
  ],
)
def test_recipes_are_valid(kind, make):
  launch.check_config(make(), kind)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({}, "returned a dict; expected a ConfigDict"),
    (ConfigDict(), "has no setting accumulate; start from caption_config"),
    (
      ConfigDict({"model": {}}),
      "has no setting accumulate; start from caption_config",
    ),
  ],
)
def test_invalid_configuration(config, message):
  with pytest.raises(ValueError, match=message):
    launch.check_config(config, "caption_config")
