import collections
import io
import logging
import os
import pathlib

import numpy as np
from PIL import Image
import pytest

from ov_data import example
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source


class FakeTokenizer:
  """Fake tokenizer; the token id is the number of characters."""

  pad_id = 0

  def encode_batch(self, texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    ids[:, 0] = [len(text) for text in texts]
    return ids, ids != 0


def _picture(path, value=100):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  Image.new("RGB", (6, 4), (value, value, value)).save(buffer, "PNG")
  path.write_bytes(buffer.getvalue())


def _classes(root, counts):
  """Create class folders with the given numbers of images."""
  for name, count in counts.items():
    (root / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
      _picture(root / name / f"{number}.png")
  return str(root)


def _features(dataset):
  return [dataset.features(n) for n in range(len(dataset))]


def _keys(dataset):
  return [features["key"][0].decode() for features in _features(dataset)]


def _evaluation(source, **arguments):
  return Loader.evaluation(
    source,
    image_size=4,
    batch_size=4,
    tokenizer=FakeTokenizer(),
    text_len=2,
    threads=2,
    **arguments,
  )


def _fails(message, path, split=None, **source):
  with pytest.raises(ValueError, match=message):
    Dataset(Source(str(path), split, **source))


def test_class_folders(tmp_path):
  path = _classes(tmp_path / "d", {"dog": 3, "cat": 2})
  dataset = Dataset(Source(path, image_key="image"))
  assert dataset.class_names == ("cat", "dog") and not dataset.indexes
  assert sorted(_keys(dataset)) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png"]
  for number, features in enumerate(_features(dataset)):
    name = features["key"][0].decode()
    assert features.keys() == {"image", "key", "label", "class"}
    assert features["class"] == [name.partition("/")[0].encode()]
    assert features["label"].tolist() == [["cat", "dog"].index(name.partition("/")[0])]
    assert features["image"] == [(tmp_path / "d" / name).read_bytes()]
    assert dataset.locate(number) == (f"{path}/{name}", 0)


def test_folders_of_splits_are_selected_by_name(tmp_path):
  _classes(tmp_path / "train", {"cat": 4, "dog": 4})
  _classes(tmp_path / "val", {"cat": 1, "dog": 1})
  assert len(Dataset(Source(str(tmp_path), "train"))) == 8
  assert len(Dataset(Source(f"{tmp_path}/", "train[:25%]"))) == 2
  assert sorted(_keys(Dataset(Source(str(tmp_path), "val")))) == ["cat/0.png", "dog/0.png"]
  _fails(r"holds the splits train, val; choose one with split=", tmp_path)
  _fails(r"holds the splits train, val; split='test' is not one of them", tmp_path, "test")
  _picture(tmp_path / "train" / "stray.jpg")
  _fails(r"holds the splits train, val; choose", tmp_path)  # neither is a class


def test_folders_that_are_not_classes(tmp_path):
  # The layouts of COCO and of images next to a list are not class folders.
  path = _classes(tmp_path / "coco", {"annotations": 0, "train2014": 2, "val2014": 1})
  _fails(r"holds the splits train2014, val2014; choose", path)
  _fails(r"images are in .*/val2014 itself", path, "val2014")
  path = _classes(tmp_path / "list", {"images": 2, "other": 0})
  _fails(r"all images in .*/list are in one folder, images, which defines neither", path)


def test_classes_may_be_named_like_splits(tmp_path):
  path = _classes(tmp_path, {"bus": 1, "train": 2})
  assert Dataset(Source(path)).class_names == ("bus", "train")


def test_a_split_without_folder(tmp_path):
  path = _classes(tmp_path, {f"c{n}": 1 for n in range(9)})
  _fails(r"no folder of split 'val', but the class folders c0, .*, c7 \.\.\.; omit", path, "val")


def test_hidden_nested_and_other_files(tmp_path):
  path = _classes(tmp_path / "d", {"cat": 1, "dog": 1, ".git": 1, "__MACOSX": 1, "lost+found": 1})
  _classes(
    tmp_path / "d", dict.fromkeys(("$RECYCLE.BIN", "System Volume Information", "@eaDir"), 1)
  )
  _picture(tmp_path / "d" / "cat" / "a" / "b" / "c" / "d" / "deep.PNG")
  _picture(tmp_path / "d" / "cat" / ".thumbs" / "1.png")
  _picture(tmp_path / "d" / "cat" / "._0.png")
  (tmp_path / "d" / "cat" / "notes.txt").write_text("x")
  (tmp_path / "d" / "classes.txt").write_text("x")
  (tmp_path / "d" / "dog.tar").write_text("x")
  dataset = Dataset(Source(path))
  assert sorted(_keys(dataset)) == ["cat/0.png", "cat/a/b/c/d/deep.PNG", "dog/0.png"]
  assert dataset.class_names == ("cat", "dog")


def test_links_to_classes_are_followed_and_cyclic_links_are_not(tmp_path):
  _classes(tmp_path / "elsewhere", {"cat": 2})
  path = _classes(tmp_path / "d", {"dog": 1})
  os.symlink(tmp_path / "elsewhere" / "cat", tmp_path / "d" / "cat")
  os.symlink(tmp_path / "d", tmp_path / "d" / "dog" / "round")
  source = Source(path, follow_links=True)
  assert sorted(_keys(Dataset(source))) == ["cat/0.png", "cat/1.png", "dog/0.png"]


def test_an_empty_class_keeps_its_number(tmp_path):
  dataset = Dataset(Source(_classes(tmp_path, {"ant": 1, "bee": 0, "cat": 1})))
  assert dataset.class_names == ("ant", "bee", "cat")
  assert {int(features["label"][0]) for features in _features(dataset)} == {0, 2}


def test_names_in_any_script_and_in_none(tmp_path):
  path = _classes(tmp_path / "d", {"Käse": 1, "犬": 1})
  _picture(tmp_path / "d" / "犬" / "ein Bild.png")
  odd = os.fsencode(tmp_path / "d" / "Käse") + b"/\xff.png"
  pathlib.Path(os.fsdecode(odd)).write_bytes((tmp_path / "d" / "Käse" / "0.png").read_bytes())
  dataset = Dataset(Source(path))
  assert dataset.class_names == ("Käse", "犬")
  keys = {features["key"][0] for features in _features(dataset)}
  assert keys == {*map(str.encode, ("Käse/0.png", "犬/0.png", "犬/ein Bild.png")),
                  "Käse/".encode() + b"\xff.png"}  # fmt: skip
  assert len(dataset.fingerprint) == 16
  with _evaluation(Source(path, caption_keys=("class",)), extra_keys=("class",)) as batches:
    assert sum(int(batch["valid"].sum()) for batch in batches) == 4


def test_slices_contain_a_fraction_of_every_class(tmp_path):
  for name, count in {"a": 600, "b": 300, "c": 100}.items():
    (tmp_path / name).mkdir()
    for number in range(count):
      (tmp_path / name / f"{number}.jpg").touch()
  parts = [Dataset(Source(str(tmp_path), f"[{a}%:{a + 50}%]")) for a in (0, 50)]
  keys = [[part.locate(n)[0] for n in range(len(part))] for part in parts]
  assert len(set(keys[0]) | set(keys[1])) == 1000 and len(keys[0]) == 500
  counts = collections.Counter(pathlib.Path(key).parent.name for key in keys[0])
  # Half of each class, hypergeometric with fraction p: 5 standard deviations of
  # sqrt(500/4 * p * (1 - p) * 1000/999) are 39, 36 and 24.
  for name, half, tolerance in (("a", 300, 39), ("b", 150, 36), ("c", 50, 24)):
    assert abs(counts[name] - half) <= tolerance


def test_a_new_image_keeps_the_order_of_the_others(tmp_path):
  path = _classes(tmp_path, {"a": 20, "c": 20})
  before = _keys(Dataset(Source(path)))
  _classes(tmp_path, {"b": 3})
  after = _keys(Dataset(Source(path)))
  assert [key for key in after if not key.startswith("b/")] == before
  assert before != sorted(before)


def test_images_without_class(tmp_path, caplog):
  _picture(tmp_path / "1.jpg")
  _fails("images are in .* itself, which defines neither classes nor captions", tmp_path)
  (tmp_path / "empty").mkdir()
  _fails("images are in .* itself", tmp_path)
  _classes(tmp_path, {"cat": 1, "dog": 1})
  with caplog.at_level(logging.WARNING, "ov_data"):
    assert sorted(_keys(Dataset(Source(str(tmp_path))))) == ["cat/0.png", "dog/0.png"]
  assert f"{tmp_path}: skipped 1: image in no class folder; for example 1.jpg" in caplog.text


def test_shards_take_precedence_over_images(tmp_path):
  path = _classes(tmp_path, {"samples": 1})
  (tmp_path / "0.tfrecord").write_bytes(b"")
  _fails("no usable record", path)


def test_fingerprint_of_classes_depends_on_names_but_not_the_path(tmp_path):
  path = _classes(tmp_path / "d", {"cat": 2, "dog": 1})
  fingerprint = Dataset(Source(path)).fingerprint
  moved = tmp_path / "moved"
  (tmp_path / "d").rename(moved)
  assert Dataset(Source(str(moved))).fingerprint == fingerprint
  assert Dataset(Source(str(moved), "[1:]")).fingerprint != fingerprint
  (moved / "ant").mkdir()  # shifts the labels
  assert Dataset(Source(str(moved))).fingerprint != fingerprint
  (moved / "ant").rmdir()
  assert Dataset(Source(str(moved))).fingerprint == fingerprint
  (moved / "cat" / "1.png").rename(moved / "cat" / "2.png")
  assert Dataset(Source(str(moved))).fingerprint != fingerprint


def test_a_missing_image_keeps_its_row_and_is_counted(tmp_path, caplog):
  source = Source(_classes(tmp_path, {"cat": 3, "dog": 3}), caption_keys=())
  with _evaluation(source, extra_keys=("label", "class"), max_bad_fraction=0.5) as batches:
    keys = _keys(batches.datasets[0])
    whole = np.concatenate([batch["valid"] for batch in batches])
    assert whole.tolist() == [True] * 6 + [False] * 2 and not batches.skipped
    (tmp_path / keys[1]).unlink()
    (tmp_path / keys[4]).write_bytes(b"no picture")
    first, second = batches
    assert first["valid"].tolist() == [True, False, True, True]
    assert second["valid"].tolist() == [False, True, False, False]
    assert not first["image"][1].any() and first["image"][0].any()
    assert first["label"][1] is None
    assert first["class"][0] == keys[0].partition("/")[0].encode()
    assert batches.skipped == {"image file is missing": 1, "unknown format": 1}
    assert batches.locate(1) == (f"{tmp_path}/{keys[1]}", 0)
  assert f"skipped {tmp_path}/{keys[1]} at byte 0 (1 so far): image file is missing" in caplog.text


def test_special_files_count_as_missing(tmp_path):
  path = _classes(tmp_path, {"cat": 0, "dog": 1})
  os.mkfifo(tmp_path / "cat" / "pipe.jpg")  # a plain open() would block
  os.symlink("/dev/zero", tmp_path / "cat" / "zero.jpg")
  os.symlink(tmp_path / "cat" / "loop.jpg", tmp_path / "cat" / "loop.jpg")
  (tmp_path / "cat" / "folder.jpg").mkdir()
  dataset = Dataset(Source(path))
  odd = [n for n in range(len(dataset)) if "/cat/" in dataset.locate(n)[0]]
  assert len(odd) == 4
  for number in odd:
    with pytest.raises(example.FeatureError, match="^image file is missing$"):
      dataset.read(number)


def test_a_huge_file_is_not_read(tmp_path):
  path = _classes(tmp_path, {"cat": 1, "dog": 1})
  for name in ("cat", "dog"):
    with open(tmp_path / name / "0.png", "wb") as file:
      file.truncate((1 << 30) + 1)  # sparse
  with pytest.raises(example.FeatureError, match="image file over 1 GiB"):
    Dataset(Source(path)).read(0)
