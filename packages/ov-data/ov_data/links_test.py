"""Links in image folders: links to outside are counted, others are followed."""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from ov_data import example, layouts, links, records
from ov_data.sources import Dataset, Source


def _image(path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
  path.write_bytes(buffer.getvalue())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
  """Class folders with links to inside and outside, and a file outside."""
  _image(tmp_path / "private/secret.png")
  for name in ("cat", "dog"):
    _image(tmp_path / "photos" / name / "own.png")
  (tmp_path / "photos/cat/inside.png").symlink_to("../dog/own.png")
  (tmp_path / "photos/cat/outside.png").symlink_to("../../private/secret.png")
  (tmp_path / "photos/ant").symlink_to(tmp_path / "private")
  return tmp_path / "photos"


def _readable(source: Source) -> tuple[set[str], set[str]]:
  """Return the keys of readable records and the reasons of the others."""
  data = Dataset(source)
  keys, reasons = set(), set()
  for record in range(len(data)):
    try:
      keys.add(data.read(record).texts["key"][0].decode())
    except example.FeatureError as error:
      reasons.add(error.reason)
  return keys, reasons | {skip.reason for skip in data.skips}


_INSIDE = {"cat/own.png", "cat/inside.png", "dog/own.png"}


def test_class_folders(photos: Path):
  source = Source(str(photos), caption_keys=())
  assert _readable(source) == (_INSIDE, {links.POINTS_OUTSIDE})
  [skip] = Dataset(source).skips
  assert skip.key == "ant" and f"-> {photos.parent}/private" in skip.detail
  assert Dataset(source).class_names == ("cat", "dog")
  trusted = Source(str(photos), caption_keys=(), follow_links=True)
  assert _readable(trusted) == (_INSIDE | {"cat/outside.png", "ant/secret.png"}, set())
  assert Dataset(trusted).class_names == ("ant", "cat", "dog")


def test_the_folder_itself_may_be_a_link(photos: Path, monkeypatch: pytest.MonkeyPatch):
  (photos.parent / "link").symlink_to(photos)
  assert _readable(Source(str(photos.parent / "link"), caption_keys=()))[0] == _INSIDE
  monkeypatch.chdir(photos)
  for path in (".", "../link", f"{photos}/"):
    assert _readable(Source(path, caption_keys=()))[0] == _INSIDE


@pytest.mark.parametrize("name", ["dataset_coco.json", "captions.jsonl"])
def test_lists(photos: Path, name: str):
  names = sorted(_INSIDE | {"cat/outside.png", "ant/secret.png"})
  images = [{"filename": file, "sentences": [{"raw": "x"}]} for file in names]
  rows = "".join(json.dumps({"file": file, "caption": "x"}) + "\n" for file in names)
  path = photos / name
  path.write_text(json.dumps({"images": images}) if name.endswith(".json") else rows)
  assert _readable(Source(str(path)))[0] == _INSIDE
  assert links.POINTS_OUTSIDE in _readable(Source(str(path)))[1]
  assert _readable(Source(str(path), follow_links=True))[0] == set(names)


def test_a_list_of_links_only_names_the_remedy(photos: Path):
  """For example an image_root whose train2014 is a link to another disk."""
  path = photos / "dataset_coco.json"
  path.write_text(json.dumps({"images": [{"filename": "ant/secret.png", "sentences": []}]}))
  with pytest.raises(
    ValueError, match="all images are links that point outside .* ant/secret.png -> .*follow_links"
  ):
    Dataset(Source(str(path)))


def test_a_folder_of_links_only_names_the_remedy(tmp_path: Path):
  _image(tmp_path / "private/secret.png")
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos/ant").symlink_to("../private")
  with pytest.raises(ValueError, match="link leads outside: ant -> .*set follow_links"):
    Dataset(Source(str(tmp_path / "photos")))
  with pytest.raises(ValueError, match="links that point outside, for example ant -> "):
    layouts.read(str(tmp_path / "photos"))


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_list_in_a_folder_that_points_outside(photos: Path, name: str):
  """Otherwise its content would appear in messages and captions."""
  secret = photos.parent / "private/passwords"
  secret.write_text("root:x:0:0\n")
  (photos / name).symlink_to(secret)
  with pytest.raises(ValueError, match=f"link leads outside: {name} -> ") as error:
    layouts.read(str(photos))
  assert "root:x" not in str(error.value)


def test_a_caption_next_to_an_image_that_points_outside(tmp_path: Path):
  for number in range(2):
    _image(tmp_path / f"photos/{number}.png")
  (tmp_path / "secret").write_text("a password")
  (tmp_path / "photos/0.txt").symlink_to("../secret")
  (tmp_path / "photos/1.txt").write_text("a cat")
  found = layouts.read(str(tmp_path / "photos"))
  assert [item.captions for item in found.items] == [("a cat",)]
  assert [(skip.key, skip.reason) for skip in found.skips] == [("0.png", links.POINTS_OUTSIDE)]
  assert len(layouts.read(str(tmp_path / "photos"), follow_links=True).items) == 2


def test_shards_may_be_links_to_anywhere(tmp_path: Path):
  (tmp_path / "disk").mkdir()
  (tmp_path / "data").mkdir()
  shard = tmp_path / "disk/train-00000-of-00001.tfrecord"
  shard.write_bytes(records.frame(example.serialise({"key": "a"})))
  (tmp_path / "data" / shard.name).symlink_to(shard)
  assert _readable(Source(str(tmp_path / "data"), "train")) == ({"a"}, set())


def test_links_in_cycles_are_broken(tmp_path: Path):
  os.symlink("b", tmp_path / "a")
  os.symlink("a", tmp_path / "b")
  assert links.target_outside(str(tmp_path), "a") is None
  assert links.target_outside("gs://bucket/folder", "a") is None
