"""Loader on the lists of compositional benchmarks."""

import json
from pathlib import Path

from PIL import Image
import pytest

from ov_data.sources import Dataset, Source


def _image(path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 4)).save(path)


def _rows(path: Path, format: str) -> list[tuple[str, list[str], int, int]]:
  dataset = Dataset(Source(str(path), format=format))
  rows = [dataset.features(i, ("key", "txt", "instance", "right")) for i in range(len(dataset))]
  return [
    (
      row["key"][0].decode(),
      [text.decode() for text in row["txt"]],
      int(row["instance"][0]),
      int(row["right"][0]),
    )
    for row in rows
  ]


def test_sugar_crepe(tmp_path: Path):
  _image(tmp_path / "val2017/1.jpg")
  entries = {
    "0": {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"},
    "7": {"filename": "1.jpg", "caption": "a hat", "negative_caption": "a cap"},
  }
  (tmp_path / "add_att.json").write_text(json.dumps(entries))
  assert _rows(tmp_path / "add_att.json", "sugar_crepe") == [
    ("1.jpg", ["a dog", "a cat"], 0, 1),
    ("1.jpg", ["a hat", "a cap"], 1, 1),
  ]
  entries["7"] = {"filename": "1.jpg", "caption": "a hat"}
  (tmp_path / "add_att.json").write_text(json.dumps(entries))
  with pytest.raises(ValueError, match="entry '7': expected an object with texts under filename"):
    _rows(tmp_path / "add_att.json", "sugar_crepe")
  entries["7"] = {"filename": "../1.jpg", "caption": "a", "negative_caption": "b"}
  (tmp_path / "add_att.json").write_text(json.dumps(entries))
  with pytest.raises(ValueError, match=r"the image '../1.jpg' is a path outside the folder"):
    _rows(tmp_path / "add_att.json", "sugar_crepe")


def test_winoground(tmp_path: Path):
  row = {"caption_0": "a b", "caption_1": "b a", "image_0": "x", "image_1": "y", "id": 3}
  (tmp_path / "examples.jsonl").write_text(json.dumps(row) + "\n\n")
  with pytest.raises(ValueError, match="none of 2 images"):
    _rows(tmp_path, "winoground")
  for name in "xy":
    _image(tmp_path / f"images/{name}.png")
  assert _rows(tmp_path, "winoground") == [
    ("x.png", ["a b", "b a"], 0, 1),
    ("y.png", ["a b", "b a"], 0, 1),
  ]


def test_winogavil(tmp_path: Path):
  for name in ("x", "y"):
    _image(tmp_path / f"images/{name}.jpg")
  row = {"cue": "Owl", "candidates": ["x", "y"], "associations": ["y"]}
  (tmp_path / "examples.jsonl").write_text(json.dumps(row))
  assert _rows(tmp_path, "winogavil") == [
    ("x.jpg", ["An owl"], 0, 0),
    ("y.jpg", ["An owl"], 0, 1),
  ]
  row["associations"] = ["z"]
  (tmp_path / "examples.jsonl").write_text(json.dumps(row))
  with pytest.raises(ValueError, match="line 1: the association 'z' is not among the candidates"):
    _rows(tmp_path, "winogavil")
