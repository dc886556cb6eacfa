import io
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from ov_data import example, karpathy_file
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source

_PAIR = {"filename": "a.jpg", "sentences": [{"raw": "x"}], "split": "test"}


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


def _split_file(tmp_path, images, name="dataset.json"):
  (tmp_path / name).write_text(json.dumps({"images": images, "dataset": "coco"}))
  return str(tmp_path / name)


@pytest.fixture
def coco(tmp_path):
  """Five images in the COCO layout below tmp_path; the last has no captions."""
  images = []
  for number, split in enumerate(["test", "train", "restval", "train", "val"]):
    folder = "val2014" if number % 2 else "train2014"
    _picture(tmp_path / folder / f"{number}.jpg", 10 + number)
    raw = [f"{'x' * number} {'y' * k}." for k in range(5)] if number < 4 else []
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 9} for text in raw]
    images.append(
      {"filepath": folder, "filename": f"{number}.jpg", "split": split, "sentences": sentences}
    )
  return _split_file(tmp_path, images, "dataset_coco.json")


def test_all_sentences_are_captions(coco):
  source = Source(coco, "train", caption_keys=("txt", "alt"))
  with _evaluation(source, captions="all", extra_keys=("key",)) as batches:
    (batch,) = batches
  expected = [[f"{'x' * number} {'y' * k}." for k in range(5)] for number in (1, 3)]
  assert batch["captions"] == [*expected, [], []]  # once, although both keys hold all of them
  assert batch["key"] == [b"val2014/1.jpg", b"val2014/3.jpg", None, None]
  np.testing.assert_array_equal(
    batch["ids"][:, 0], [len(expected[0][0]), len(expected[1][0]), 0, 0]
  )
  assert batch["image"][:, 0, 0, 0].tolist() == [11, 13, 0, 0]


def test_captions_need_no_images(coco):
  dataset = Dataset(Source(coco))
  whole = _features(dataset)
  for picture in pathlib.Path(coco).parent.rglob("*.jpg"):
    picture.unlink()
  keys = {key for features in whole for key in features} - {"jpg"}
  bare = [dataset.features(n, keys) for n in range(len(dataset))]
  assert all("jpg" in features for features in whole)
  assert bare == [{k: v for k, v in features.items() if k != "jpg"} for features in whole]


@pytest.mark.parametrize(
  "split, expected",
  [
    ("train", [1, 3]),
    ("train+restval", [1, 2, 3]),  # file order
    ("restval+train[:2]", [1, 2]),
    ("test", [0]),
    ("[-2:]", [3, 4]),
    (None, [0, 1, 2, 3, 4]),
  ],
)
def test_splits_of_a_split_file(coco, split, expected):
  keys = _keys(Dataset(Source(coco, split)))
  assert [int(pathlib.Path(key).stem) for key in keys] == expected


def test_an_image_without_sentences_is_counted(coco):
  with _evaluation(Source(coco, "val+test")) as batches:
    (batch,) = batches
    assert batch["valid"].tolist() == [True, False, False, False]
    assert batches.skipped == {"no caption under txt": 1}


def test_unusual_sentences(tmp_path):
  _picture(tmp_path / "a.jpg")
  kinds = [{"raw": "é"}, {"raw": "\ud800!"}, {"raw": 3}, {}, "x", None, {"raw": " "}]
  path = _split_file(tmp_path, [{"filename": "a.jpg", "sentences": kinds}])
  with _evaluation(Source(path), captions="all") as batches:
    assert next(batches)["captions"][0] == ["é", "\ufffd!"]
  path = _split_file(tmp_path, [{"filename": "a.jpg", "sentences": "x", "split": ["odd"]}])
  assert _features(Dataset(Source(path)))[0]["txt"] == []


def test_image_root(coco, tmp_path, monkeypatch):
  listed = tmp_path / "lists" / "dataset_coco.json"
  listed.parent.mkdir()
  pathlib.Path(coco).rename(listed)
  _fails(
    r"none of 5 images .* exists, for instance .*/lists/train2014/0\.jpg; set image_root to "
    "the folder that holds train2014$",
    listed,
  )
  _fails(r"none of 2 images", listed, "train", image_root=str(tmp_path / "absent"))
  dataset = Dataset(Source(str(listed), "train", image_root=str(tmp_path)))
  assert dataset.locate(0) == (f"{tmp_path}/val2014/1.jpg", 0)
  monkeypatch.chdir(listed.parent)
  assert len(Dataset(Source("dataset_coco.json", image_root=".."))) == 5
  _fails("none of 5 images", "dataset_coco.json")  # ./ by default
  _fails(r"image_root='\.\.' requires a split file", tmp_path, image_root="..")


@pytest.mark.parametrize(
  "path, root", [("/d.json", "/"), ("d.json", "."), ("a/d.json", "a"), ("gs://b/d.json", "gs://b")]
)
def test_images_are_next_to_their_file_by_default(path, root, monkeypatch):
  class Opened(Exception):
    pass

  def check(path, root, *_):
    raise Opened(path, root)

  monkeypatch.setattr(karpathy_file, "check_some_exist", check)
  monkeypatch.setattr(karpathy_file.karpathy, "entries", lambda collection: [])
  monkeypatch.setattr(karpathy_file.fs, "is_dir", lambda path: False)
  with pytest.raises(Opened) as opened:
    Dataset(Source(path))
  assert opened.value.args == (path, root)


def test_only_shards_are_read_as_one(coco, tmp_path):
  with pytest.raises(ValueError, match="a separate Source for each split file"):
    Dataset(Source((coco, coco)))
  with pytest.raises(ValueError, match="requires a split file"):
    Dataset(Source((str(tmp_path), str(tmp_path)), image_root="x"))


def test_fingerprint_of_a_split_file(coco, tmp_path):
  fingerprint = Dataset(Source(coco, "train")).fingerprint
  assert Dataset(Source(coco, "train", caption_keys=("a", "b"))).fingerprint == fingerprint
  assert Dataset(Source(coco, "train+val")).fingerprint != fingerprint
  moved = tmp_path / "moved.json"
  moved.write_text(pathlib.Path(coco).read_text())
  assert Dataset(Source(str(moved), "train")).fingerprint == fingerprint
  moved.write_text(pathlib.Path(coco).read_text().replace("x yy.", "x yz."))
  assert Dataset(Source(str(moved), "train")).fingerprint != fingerprint


def test_files_that_are_not_split_files(coco, tmp_path):
  path = tmp_path / "other.json"
  _fails(r"no split file at .*other\.json: no such file", path)
  path.write_text(pathlib.Path(coco).read_text()[:-100])
  _fails(r"other\.json, line 1 column \d+: not JSON", path)
  for text in ("[]", "3", "{}", '{"images": []}', '{"images": {"a": 1}}'):
    path.write_text(text)
    _fails(r'other\.json: expected \{"images"', path)
  path.write_text("[" * 200_000)
  _fails("nested too deeply", path)
  path.write_text('{"images": ' + "1" * 5000 + "}")
  _fails("not a split file .*4300 digits", path)
  with open(path, "wb") as file:
    file.truncate((1 << 30) + 1)
  _fails("over 1 GiB, too large for a split file", path)
  own = {"images": [{"file_name": "COCO_val2014_000000000042.jpg", "id": 42}], "annotations": []}
  path.write_text(json.dumps(own))
  _fails(r'image 0 has no "filename"; .* COCO\'s own captions_\*\.json need image_root', path)
  path.write_text(json.dumps({"images": [_PAIR, "x"]}))
  _fails('image 1 has no "filename"', path)


def test_an_unknown_split_names_the_known_ones(coco):
  known = "has the splits test, train, restval, val"
  _fails(rf"{known}; split='dev' is not one", coco, "dev")
  _fails(rf"{known}; split='' is not one", coco, "train+")
  _fails("selects none of the records", coco, "train[2:]")


@pytest.mark.parametrize(
  "image",
  [
    {"filename": "../secret.jpg"},
    {"filename": "a/../../secret.jpg"},
    {"filename": "/etc/passwd"},
    {"filename": ""},
    {"filename": "gs://bucket/a.jpg"},
    {"filename": "secret.jpg", "filepath": ".."},
    {"filename": "secret.jpg", "filepath": "/etc"},
    {"filename": "secret.jpg", "filepath": "/"},
    {"filename": "/secret.jpg", "filepath": "train2014"},
  ],
)
@pytest.mark.parametrize("split", ["test", None])
def test_names_that_leave_the_folder(tmp_path, image, split):
  _picture(tmp_path / "secret.jpg")
  _picture(tmp_path / "lists" / "a.jpg")
  path = _split_file(tmp_path / "lists", [_PAIR, {**_PAIR, "split": "train", **image}])
  _fails("image 1 leaves the folder of images: ", path, split)


def test_invalid_file_names(tmp_path):
  _picture(tmp_path / "a.jpg")
  for name in ("a\0b.jpg", "\ud800.jpg"):
    path = _split_file(tmp_path, [_PAIR, {**_PAIR, "filename": name}])
    _fails("image 1 has a name that no file can have", path)
  path = _split_file(tmp_path, [_PAIR, {**_PAIR, "filename": "a" * 10_000 + ".jpg"}])
  with pytest.raises(example.FeatureError, match="image file is missing"):
    Dataset(Source(path)).read(1)


def test_a_folder_may_end_in_a_slash(tmp_path):
  _picture(tmp_path / "val2014" / "a.jpg")
  path = _split_file(tmp_path, [{**_PAIR, "filepath": "val2014/"}])
  assert _keys(Dataset(Source(path))) == ["val2014/a.jpg"]


def test_training_resumes_on_images(coco):
  arguments = dict(image_size=4, batch_size=4, tokenizer=FakeTokenizer(), text_len=2, threads=2)
  with Loader(Source(coco, "train+restval"), **arguments) as batches:
    next(batches)
    state = json.loads(json.dumps(batches.state()))
    expected = next(batches)
  with Loader(Source(coco, "train+restval"), **arguments) as batches:
    batches.restore(state)
    for key, value in next(batches).items():
      np.testing.assert_array_equal(value, expected[key])
  other = Source(coco, "train")
  with Loader(other, **arguments) as batches, pytest.raises(ValueError, match="fingerprint"):
    batches.restore(state)
