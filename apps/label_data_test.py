"""Labels meet classes: names, numbers, numbers of folders, and classes from files."""

import json

from ml_collections import ConfigDict
import numpy as np
import pytest

from apps.label_data import class_numbers, label_text, read_class_prompts, with_labels
from apps.trainer.errors import UserError

NAMES = ["dog", "cat", "hot dog"]


def labels(values, numbers, valid=None):
  valid = np.ones(len(values), bool) if valid is None else np.array(valid)
  (batch,) = with_labels([{"key": values, "valid": valid}], "key", numbers)
  return batch["label"].tolist()


def test_names_and_numbers_of_records():
  numbers = class_numbers(NAMES, None)
  assert labels([b"cat", "hot dog", 0, b"2", [1]], numbers) == [1, 2, 0, 2, 1]


def test_rows_that_are_not_valid_are_not_looked_at():
  assert labels(["cat", None], class_numbers(NAMES, None), [True, False]) == [1, 0]


def test_classes_called_by_digits_go_by_name():
  assert labels(["7", "0"], class_numbers(["7", "0"], None)) == [0, 1]


def test_numbers_of_folders_follow_their_names():
  folders = ("cat", "dog", "hot_dog")  # sorted, unlike the classes
  assert labels([0, 1, 2], class_numbers(NAMES, folders)) == [1, 0, 2]


def test_folders_that_are_no_names_go_by_their_order():
  assert labels([0, 2], class_numbers(NAMES, ("n01", "n02", "n03"))) == [0, 2]


@pytest.mark.parametrize("folders", [("cat", "dog", "horse"), ("n01", "n02")])
def test_folders_that_do_not_fit_are_named(folders):
  with pytest.raises(ValueError, match="folders of pictures, such as '(horse|n01)', are none of"):
    class_numbers(NAMES, folders)


def test_a_label_that_is_no_class_is_named():
  with pytest.raises(UserError, match="labelled .horse. under .key., which is no class; there"):
    labels(["horse"], class_numbers(NAMES, None))


def test_label_texts():
  assert [label_text(v) for v in (b"a", "b", 3, [b"c", b"d"])] == ["a", "b", "3", "c"]
  assert label_text(1, ("x", "y")) == "y"


def settings(classes, templates="photo"):
  return ConfigDict({"classes": str(classes), "templates": templates})


def test_prompts_of_files(tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("dog\ncat\n")
  found = read_class_prompts(settings(names), None)
  assert found.prompts == {"dog": ("a photo of a dog",), "cat": ("a photo of a cat",)}
  ready = tmp_path / "prompts.json"
  ready.write_text(json.dumps({"dog": ["one dog", "a dog"], "cat": ["a cat"]}))
  assert read_class_prompts(settings(ready), None).prompts["dog"] == ("one dog", "a dog")
  hashes = {
    read_class_prompts(settings(names, t), None).description["templates_hash"]
    for t in ("photo", "plain", "openai_best")
  }
  assert len(hashes) == 3


def test_folders_can_name_the_classes():
  found = read_class_prompts(settings("folders"), ("hot_dog", "cat"))
  assert found.names == ["hot dog", "cat"]
  with pytest.raises(ValueError, match="do not lie in folders"):
    read_class_prompts(settings("folders"), None)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ('{"dog": "a dog"}', "object of class names"),
    ("{", "no JSON"),
    ('{"dog": ["x"]}', "1 classes"),
  ],
)
def test_broken_class_files(tmp_path, content, said):
  path = tmp_path / "classes.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=said):
    read_class_prompts(settings(path), None)
