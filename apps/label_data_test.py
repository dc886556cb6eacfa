"""Tests of the mapping from labels (names, numbers, folder numbers) to classes."""

import json

import numpy as np
import pytest

from apps.label_data import (
  ClassPrompts,
  check_distinct,
  check_labels,
  class_numbers,
  label_text,
  read_class_prompts,
  with_labels,
)
from apps.trainer.errors import UserError
from apps.trainer.run_config import ZeroShotSettings
import ov_data
from ov_data import example, records

NAMES = ["dog", "cat", "hot dog"]


def labels(values, numbers, valid=None):
  valid = np.ones(len(values), bool) if valid is None else np.array(valid)
  (batch,) = with_labels([{"key": values, "valid": valid}], "key", numbers)
  return batch["label"].tolist()


def test_names_and_numbers_of_records():
  numbers = class_numbers(NAMES, None)
  assert labels([b"cat", "hot dog", 0, b"2", [1]], numbers) == [1, 2, 0, 2, 1]


def test_labels_are_normalised():
  numbers = class_numbers(["dog", "hot dog"], None)
  assert labels([b" dog\n", "hot\u2028 dog"], numbers) == [0, 1]


def test_equal_names_use_lowest_number():
  numbers = class_numbers(["crane", "lemur", "crane", "dog"], None)
  assert labels(["crane", "dog", 2, "3"], numbers) == [0, 3, 2, 3]
  assert class_numbers(["crane", "lemur", "crane"], ("a", "b", "c")) == {
    "crane": 0,
    "lemur": 1,
    0: 0,
    1: 1,
    2: 2,
  }


def test_duplicate_imagenet_names_are_separate_classes():
  found = read_class_prompts(settings("imagenet", "openvision_81"), None)
  assert len(found.names) == len(found.prompts) == 1000 > len(set(found.names)) == 998
  assert {len(own) for own in found.prompts} == {81}
  assert class_numbers(found.names, None)[999] == 999


def test_invalid_rows_are_ignored():
  assert labels(["cat", None], class_numbers(NAMES, None), [True, False]) == [1, 0]


def test_strings_are_names_and_ints_are_numbers():
  assert labels(["7", "0", 0, 1], class_numbers(["7", "0"], None)) == [0, 1, 0, 1]


def test_folder_numbers_are_matched_by_name():
  folders = ("cat", "dog", "hot_dog")  # sorted, unlike the classes
  assert labels([0, 1, 2], class_numbers(NAMES, folders)) == [1, 0, 2]


def test_unknown_folders_are_matched_by_order():
  assert labels([0, 2], class_numbers(NAMES, ("n01", "n02", "n03"))) == [0, 2]


@pytest.mark.parametrize("folders", [("cat", "dog", "horse"), ("n01", "n02")])
def test_mismatching_folders(folders):
  with pytest.raises(ValueError, match="image folders, such as '(horse|n01)', are not among"):
    class_numbers(NAMES, folders)


def test_unknown_label():
  message = "label .horse. under .key. is not one of the 3 classes .dog, cat, hot dog, ..."
  with pytest.raises(UserError, match=message):
    labels(["horse"], class_numbers(NAMES, None))


def test_record_without_label():
  with pytest.raises(UserError, match="there is no label under .key."):
    labels([[]], class_numbers(NAMES, None))
  with pytest.raises(UserError, match="a record has no label"):
    label_text([])


def test_label_texts():
  assert [label_text(v) for v in (b"a", "b", 3, [b"c", b"d"])] == ["a", "b", "3", "c"]
  assert label_text(1, ("x", "y")) == "y"


def settings(classes, templates="photo"):
  return ZeroShotSettings(classes=str(classes), templates=templates)


def test_prompts_from_files(tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("dog\ncat\n")
  found = read_class_prompts(settings(names), None)
  assert found.names == ("dog", "cat")
  assert found.prompts == (("a photo of a dog",), ("a photo of a cat",))
  ready = tmp_path / "prompts.json"
  ready.write_text(json.dumps({"dog": ["one dog", "a dog"], "cat": ["a cat"]}))
  found = read_class_prompts(settings(ready), None)
  assert found.names == ("dog", "cat") and found.prompts == (("one dog", "a dog"), ("a cat",))
  hashes = {
    read_class_prompts(settings(names, t), None).description["templates_hash"]
    for t in ("photo", "plain", "openai_best")
  }
  assert len(hashes) == 3


def test_class_names_from_folders():
  found = read_class_prompts(settings("folders"), ("hot_dog", "cat"))
  assert found.names == ("hot dog", "cat")
  with pytest.raises(ValueError, match="are not stored in class folders"):
    read_class_prompts(settings("folders"), None)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"dog": "a dog"}', "class 'dog' has 'a dog'; expected a list of prompts"),
    ('{"dog": ["a dog"], "dog": ["one dog"], "cat": ["a cat"]}', "holds 'dog' twice"),
    ('["dog", "", "cat"]', "entry 1 is empty"),
    ("{", "not JSON"),
    ('{"dog": ["x"]}', "1 classes"),
  ],
)
def test_invalid_class_files(tmp_path, content, message):
  path = tmp_path / "classes.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    read_class_prompts(settings(path), None)


def shards(folder, values):
  """Write records with these labels; None means no label."""
  path = folder / "a.tfrecord"
  labelled = [{} if value is None else {"label": value} for value in values]
  made = [example.serialise({"jpg": b"", **label}) for label in labelled]
  path.write_bytes(b"".join(map(records.frame, made)))
  return ov_data.Dataset(ov_data.Source(str(path)))


def test_labels_are_checked_before_training(tmp_path):
  dataset = shards(tmp_path, [b"dog", 1, b"cat", b"2"])
  check_labels(dataset, "label", class_numbers(NAMES, None), "names.txt")
  with pytest.raises(
    ValueError, match=r"a.tfrecord at byte \d+: the label '2' under 'label' is not one"
  ):
    check_labels(dataset, "label", class_numbers(["dog", "cat"], None), "names.txt")


def test_label_number_out_of_range(tmp_path):
  dataset = shards(tmp_path, [0, 1, 2, 3])
  message = "label '3' .* not one of the 3 classes .* of names.txt .1 of 4 .*a name for each class"
  with pytest.raises(ValueError, match=message):
    check_labels(dataset, "label", class_numbers(NAMES, None), "names.txt")


def test_records_without_label(tmp_path):
  dataset = shards(tmp_path, [b"dog", None, b"cat"])
  for numbers in (None, class_numbers(NAMES, None)):
    with pytest.raises(ValueError, match="the record has no label under 'label' .1 of 3 records"):
      check_labels(dataset, "label", numbers, "names.txt")


def distinct(names, captions, length=12, **options):
  """Check the classes with a tokenizer trained on captions."""
  tokenizer = ov_data.Tokenizer.train(captions, 500, **options)
  prompts = tuple((f"a photo of a {name}",) for name in names)
  ids, _ = tokenizer.encode_batch([text for own in prompts for text in own], length)
  check_distinct(ClassPrompts(tuple(names), prompts, {}), tokenizer, ids)


def test_classes_with_identical_tokens():
  captions = ["a photo of a red dog cat hôte hote café é"]
  distinct(["red dog", "red cat", "hôte", "hote"], captions)
  distinct(["dog", "cat", "dog"], captions)  # as two of ImageNet's, equal by name
  for names, options, message in (
    (["hôte", "hote"], {"strip_accents": True}, "'hôte' and 'hote' are identical for the model"),
    (["Dog", "dog"], {}, "'Dog' and 'dog' are identical for the model .'a photo of a dog'."),
    (["red dog", "red cat"], {"length": 7}, "'red dog' and 'red cat' are identical"),
    (
      ["dog", "東京"],
      {},
      "class '東京' .* has no word that the tokenizer knows; write",
    ),
  ):
    with pytest.raises(ValueError, match=message) as error:
      distinct(names, captions, **options)
    assert "\n" not in str(error.value)


def test_exact_folder_names_are_preferred():
  names = ["C", "C++", "C#"]
  assert class_numbers(names, ("C#", "C++", "C"))[0] == 2
  assert [class_numbers(names, ("C#", "C++", "C"))[i] for i in range(3)] == [2, 1, 0]
  with pytest.raises(ValueError, match="image folder 'c' may be the class 'C' or 'C..' or 'C#'"):
    class_numbers(names, ("c", "C++", "C#"))
  with pytest.raises(ValueError, match="folders 'hot dog' and 'hot_dog' both give the class name"):
    read_class_prompts(settings("folders"), ("hot dog", "hot_dog"))
