"""Tests of prompt files {class: [prompt, ...]}: order and errors."""

import pytest

from ov_eval.lists import normalise_name, read_list, read_prompts


def test_names_have_one_normal_form():
  assert normalise_name(" a\tred \r\n dog\u2028\u00a0") == "a red dog"
  assert normalise_name("\n \u3000") == ""
  assert normalise_name("\ufeffcat") == "cat"  # byte order mark of a concatenated file


@pytest.mark.parametrize("path", ["none", "~no-such-user/a", "x" * 5000, "a\0b", "/dev/zero", ""])
def test_missing_files(path):
  with pytest.raises(ValueError, match="is neither a set nor a file"):
    read_list(path, "a set")


def test_classes_and_prompts_keep_their_order(tmp_path):
  path = tmp_path / "classes.json"
  path.write_bytes(b'\xef\xbb\xbf{" red\\ndog": ["a red  dog", "red dog"], "a": ["an a"]}')
  found = read_prompts(str(path))
  assert list(found.items()) == [("red dog", ("a red dog", "red dog")), ("a", ("an a",))]
  path.write_text('["a", "b"]')
  assert read_prompts(str(path)) is None


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"a": ["x"], "a": ["y"]}', "holds 'a' twice; use one entry per class"),
    ('{"a": ["x"], " a ": ["y"]}', "holds 'a' twice"),
    ('{"a": ["x"], " ": ["y"]}', "class 1 is empty"),
    ('{"a": ["x", ""]}', "class 'a', prompt 1 is empty"),
    ('{"a": ["x", 1]}', "class 'a', prompt 1: expected a text in quotes, got int"),
    ('{"a": []}', "class 'a' has .*expected a list of prompts"),
    ('{"a": "x"}', "class 'a' has 'x'; expected a list of prompts"),
    ('"a"', "expected an object of class names with lists of prompts, got str"),
    ("{", "is not JSON"),
    ("[" + "1" * 5000 + "]", "is not JSON: a number has more than 4300 digits"),
    ('{"a\\ud800": ["x"]}', "class 0: .* has an unpaired surrogate"),
  ],
)
def test_malformed_files(tmp_path, content, message):
  path = tmp_path / "classes.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message) as error:
    read_prompts(str(path))
  assert str(path) in str(error.value) and "\n" not in str(error.value)
