"""Loader on image files: features, selection and errors."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from ov_data import example
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source


def _image(path: Path, value: int = 100) -> bytes:
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  Image.new("RGB", (6, 4), (value, value, value)).save(buffer, "PNG")
  path.write_bytes(buffer.getvalue())
  return buffer.getvalue()


def _lines(path: Path, *rows: object) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(source: Source) -> list[dict[str, example.Feature]]:
  dataset = Dataset(source)
  return [dataset.features(n) for n in range(len(dataset))]


def _keys(source: Source) -> list[str]:
  return [row["key"][0].decode("utf-8", "surrogateescape") for row in _rows(source)]


class FakeTokenizer:
  """Fake tokenizer; the token id is the number of characters."""

  pad_id = 0

  def encode_batch(self, texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    ids[:, 0] = [len(text) for text in texts]
    return ids, ids != 0


def test_captions_and_labels_in_lists(tmp_path: Path):
  data = _image(tmp_path / "a.png")
  _image(tmp_path / "b.png")
  _lines(
    tmp_path / "captions.jsonl",
    {"file": "b.png", "captions": ["x", "y"]},
    {"file": "a.png", "captions": ["z"]},
  )
  labels = {"a.png": "hat ", "b.png": "cap"}
  _lines(tmp_path / "labels.jsonl", *({"file": f, "label": l} for f, l in labels.items()))
  source = Source(str(tmp_path), caption_keys=("txt", "alt"))
  rows = _rows(source)
  assert _keys(source) == ["b.png", "a.png"]  # the order of the list
  assert rows[0]["txt"] == rows[0]["alt"] == [b"x", b"y"]
  assert rows[1]["jpg"] == [data] and rows[1]["class"] == [b"hat"]
  assert [int(row["label"][0]) for row in rows] == [0, 1]
  assert Dataset(source).class_names == ("cap", "hat")
  with Loader.evaluation(
    source, image_size=4, batch_size=2, tokenizer=FakeTokenizer(), text_len=2, captions="all"
  ) as batches:
    assert [batch["captions"] for batch in batches] == [[["x", "y"], ["z"]]]


def test_a_list_by_its_file_with_another_root(tmp_path: Path):
  _image(tmp_path / "images/a.png")
  _lines(tmp_path / "lists/some.jsonl", {"file": "a.png", "caption": "x"})
  source = Source(f"{tmp_path}/lists/some.jsonl", image_root=f"{tmp_path}/images")
  assert _rows(source)[0]["txt"] == [b"x"]
  with pytest.raises(ValueError, match="none of 1 images .* exists"):
    Dataset(Source(f"{tmp_path}/lists/some.jsonl"))


def test_img2dataset(tmp_path: Path):
  for i in range(4):
    _image(tmp_path / f"0000{i % 2}/{i}.jpg")
    (tmp_path / f"0000{i % 2}/{i}.txt").write_text(f"caption {i}")
  source = Source(str(tmp_path))
  assert [row["txt"] for row in _rows(source)] == [[f"caption {i}".encode()] for i in (0, 2, 1, 3)]
  assert _keys(Source(str(tmp_path), "[:50%]")) == ["00000/0.jpg", "00000/2.jpg"]
  with pytest.raises(ValueError, match="has no splits, and split='train' names one"):
    Dataset(Source(str(tmp_path), "train"))


@pytest.mark.parametrize("at_root", [False, True])
def test_imagefolder_with_splits(tmp_path: Path, at_root: bool):
  rows = {}
  for split in ("train", "val"):
    _image(tmp_path / split / "1.png")
    rows[split] = {"file_name": "1.png", "text": split}
  if at_root:
    named = [{**row, "file_name": f"{split}/1.png"} for split, row in rows.items()]
    _lines(tmp_path / "metadata.jsonl", *named)
  else:
    for split, row in rows.items():
      _lines(tmp_path / split / "metadata.jsonl", row)
  assert [row["txt"] for row in _rows(Source(str(tmp_path), "val"))] == [[b"val"]]
  assert [row["txt"] for row in _rows(Source(str(tmp_path)))] == [[b"train"], [b"val"]]
  with pytest.raises(ValueError, match=r"has the splits train, val; split='dev'"):
    Dataset(Source(str(tmp_path), "dev"))


def test_coco_captions(tmp_path: Path):
  _image(tmp_path / "val/7.png")
  content = {
    "images": [{"id": 7, "file_name": "7.png"}],
    "annotations": [{"image_id": 7, "caption": c} for c in ("one", "two")],
  }
  (tmp_path / "captions.json").write_text(json.dumps(content))
  source = Source(f"{tmp_path}/captions.json", image_root=f"{tmp_path}/val")
  assert _rows(source)[0]["txt"] == [b"one", b"two"]


def test_captions_next_to_images_are_never_ignored(tmp_path: Path):
  _image(tmp_path / "dog/1.png")
  (tmp_path / "dog/1.txt").write_text("a dog")
  _image(tmp_path / "cat/2.png")
  with pytest.raises(ValueError, match="--format=img2dataset or --format=classes"):
    Dataset(Source(str(tmp_path)))
  rows = {row["key"][0]: row for row in _rows(Source(str(tmp_path), format="img2dataset"))}
  assert rows[b"dog/1.png"]["txt"] == [b"a dog"] and rows[b"cat/2.png"]["txt"] == []
  assert Dataset(Source(str(tmp_path), format="classes")).class_names == ("cat", "dog")
  with pytest.raises(ValueError, match="format='zip': expected 'auto' or one of jsonl"):
    Dataset(Source(str(tmp_path), format="zip"))


# Fingerprints of an earlier version, because interrupted runs must resume.
@pytest.mark.parametrize(
  ("split", "fingerprint", "first"),
  [
    (None, "62acc70ed1bc5d59", "cat/0.png"),
    ("[:50%]", "c5240c13facec6d9", "cat/0.png"),
    ("train", "1c8570c3ec20170b", "cat/0.png"),
  ],
)
def test_fingerprints_of_class_folders_stay(
  tmp_path: Path, split: str | None, fingerprint: str, first: str
):
  if split == "train":
    names = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png"]
  else:
    names = ["cat/0.png", "cat/deep/1.JPG", "dog/0.png", "Käse/ü.webp", "dog/\udcff.png",
             ".git/x.png", "lost+found/y.png", "ant/notes.txt", "stray.jpg"]  # fmt: skip
  for name in names:
    _image(tmp_path / name)
  source = Source(str(tmp_path), split, caption_keys=())
  assert Dataset(source).fingerprint == fingerprint
  assert _keys(source)[0] == first


def test_fingerprint_of_a_split_file_stays(tmp_path: Path):
  images = [
    {"filepath": "v", "filename": f"{i}.jpg", "split": ["train", "test"][i % 2],
     "sentences": [{"raw": f" a b {i} é\ud83d"}, {"raw": "a b"}, {"raw": ""},
                   {"raw": f" a b {i} é\ud83d"}]}
    for i in range(6)
  ]  # fmt: skip
  text = json.dumps({"images": images}).encode()
  (tmp_path / "k.json").write_bytes(text.replace(b"a b 3", b"a b\xff\xf0\x9f"))
  _image(tmp_path / "v/1.jpg")
  _image(tmp_path / "v/2.jpg")
  assert Dataset(Source(f"{tmp_path}/k.json")).fingerprint == "202ea990a5477ce8"
  assert Dataset(Source(f"{tmp_path}/k.json", "train")).fingerprint == "b55cc4237c4e676d"
