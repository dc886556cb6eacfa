"""Loader on the webdataset layout of CLIP_benchmark: features, order and errors."""

import io
from pathlib import Path
import tarfile

import numpy as np
from PIL import Image
import pytest

from ov_data.example import FeatureError
from ov_data.sources import Dataset, Source


def _image(value: int, suffix: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (6, 4), (value, value, value)).save(buffer, suffix)
  return buffer.getvalue()


def _npy(values: object) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, np.asarray(values), allow_pickle=True)
  return buffer.getvalue()


def _tar(path: Path, members: dict[str, bytes]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A data set with two tars in its split `test`."""
  test = tmp_path / "wds_x" / "test"
  _tar(
    test / "0.tar", {"s1.png": _image(1), "s1.cls": b"3", "s0.webp": _image(2), "s0.cls": b" 0\n"}
  )
  _tar(
    test / "1.tar",
    {"a/s2.JPG": _image(3, "JPEG"), "a/s2.txt": "one\ntwö".encode(), "a/s2.npy": _npy([1, 0, 1])},
  )
  (test / "nshards.txt").write_text("2\n")
  (tmp_path / "wds_x" / "classnames.txt").write_text("a\nb\n")
  return tmp_path / "wds_x"


def test_features_in_stored_order(folder: Path):
  dataset = Dataset(Source(str(folder), split="test", caption_keys=("txt", "alt")))
  rows = [dataset.features(i) for i in range(len(dataset))]
  assert [row["key"] for row in rows] == [[b"0/s1"], [b"0/s0"], [b"1/a/s2"]]
  assert [row["label"].tolist() for row in rows[:2]] == [[3], [0]]
  assert rows[0]["jpg"] == [_image(1)] and "label" not in rows[2] and "txt" not in rows[0]
  assert rows[2]["txt"] == rows[2]["alt"] == [b"one", "twö".encode()]
  assert rows[2]["npy"].tolist() == [1, 0, 1] and rows[2]["npy"].dtype == np.int64
  file, offset = dataset.locate(2)
  assert Path(file).read_bytes()[offset : offset + 2] == b"\xff\xd8"


def test_split_folder_slices_and_fingerprint(folder: Path):
  everything = Dataset(Source(str(folder)))
  assert len(everything) == len(Dataset(Source(str(folder / "test")))) == 3
  some = Dataset(Source(str(folder), split="test[1:]"))
  assert len(some) == 2 and some.features(0, ("key",))["key"] == [b"0/s0"]
  assert some.fingerprint != everything.fingerprint
  copy = folder.rename(folder.with_name("copy"))
  assert Dataset(Source(str(copy))).fingerprint == everything.fingerprint


def test_an_incomplete_data_set_is_an_error(folder: Path):
  source = Source(str(folder), split="test")
  data = (folder / "test/1.tar").read_bytes()
  (folder / "test/1.tar").write_bytes(data.rstrip(b"\0")[:-10])
  with pytest.raises(ValueError, match=r"1\.tar: broken tar file .*download the tar again"):
    Dataset(source)
  (folder / "test/1.tar").write_bytes(b"<html>not found</html>" * 100)
  with pytest.raises(ValueError, match=r"1\.tar: not a readable tar file"):
    Dataset(source)
  (folder / "test/1.tar").unlink()
  with pytest.raises(ValueError, match=r"1\.tar: the tar is missing, but .*nshards\.txt requires"):
    Dataset(source)
  (folder / "test/nshards.txt").write_text("two")
  with pytest.raises(ValueError, match="contains 'two'; expected the number of tars"):
    Dataset(source)
  _tar(folder / "test/0.tar", {"s1.cls": b"1"})
  (folder / "test/nshards.txt").write_text("1")
  with pytest.raises(ValueError, match="sample 's1' has no image; expected one of webp"):
    Dataset(source)


@pytest.mark.parametrize(
  "name, data, reason",
  [
    ("cls", b"cat", "label that is not an integer"),
    ("npy", b"\x93NUMPY", "unreadable array"),
    ("npy", _npy([{"a": 1}]), "unreadable array"),  # pickled
    ("npy", _npy(["a"]), "array that does not contain numbers"),
    ("npy", b"0" * 2**21, "member of 2,097,152 bytes"),
  ],
)
def test_unusable_values(tmp_path: Path, name: str, data: bytes, reason: str):
  _tar(tmp_path / "test/0.tar", {"s.png": _image(1), f"s.{name}": data})
  (tmp_path / "test/nshards.txt").write_text("1")
  dataset = Dataset(Source(str(tmp_path)))
  with pytest.raises(FeatureError, match=reason):
    dataset.features(0, ("label", "npy"))
  assert dataset.features(0, ("jpg",))["jpg"] == [_image(1)]
