"""Tests of the cleaning of icon names."""

import pytest

from tools.data.icon_names import CleanName, SetNames


def clean(name, *others, **declared):
  return SetNames([name, *others], **declared).clean(name)


@pytest.mark.parametrize(
  "name, others, expected",
  [
    ("home-outline", ["user-outline"], ("home", "outline")),
    ("home-24-filled", ["user-16-filled"], ("home", "filled")),
    ("user-two-tone", ["home-two-tone"], ("user", "two tone")),
    ("home-outline-24px", ["user-outline-24px"], ("home", "outline")),
    ("home-01", [], ("home", "")),
    ("user-2", ["user"], ("user", "")),
    ("user-two", ["user"], ("user", "")),
    ("arrow-up-left", [], ("arrow up left", "")),
  ],
)
def test_styles_sizes_and_numbers_are_removed(name, others, expected):
  if name == "user-two-tone":
    assert clean(name, *others, suffixes=["two-tone"]) == expected
  else:
    assert clean(name, *others) == expected


def test_a_rare_style_word_and_a_meaningful_number_are_kept():
  names = ["traffic-light", *(f"thing{chr(97 + i)}" for i in range(26))]
  assert SetNames(names).clean("traffic-light") == ("traffic light", "")
  assert clean("dice-6", "dice-5") == ("dice 6", "")
  assert clean("number-24", "home", "user", "gear", "key", "map") == ("number 24", "")


def test_declared_prefixes_and_suffixes_are_removed():
  names = SetNames(
    ["baseline-home", "twotone-user-16", "home"], prefixes=["baseline", "twotone"], suffixes=["16"]
  )
  assert names.clean("baseline-home") == ("home", "baseline")
  assert names.clean("twotone-user-16") == ("user", "twotone")
  assert names.clean("baseline") == ("baseline", "")


def test_skin_tones_are_variants():
  assert clean("waving-hand-medium-dark-skin-tone") == ("waving hand", "")
  tones = [f"person{i}-{tone}" for i in range(3) for tone in ("light", "medium", "dark")]
  assert clean("waving-hand-medium-dark", "waving-hand-light", *tones) == ("waving hand", "")


@pytest.mark.parametrize("name", ["", "24", "a-b", "Home", "home_x", "../x", "x" * 101, "é"])
def test_names_without_a_word_are_empty(name):
  assert clean(name) == CleanName("", "")


def test_a_name_is_never_removed_completely():
  for name in ("outline", "outline-filled", "filled-24"):
    assert clean(name, "x-outline", "y-outline", "x-filled", "y-filled", "a-24", "b-24").text
