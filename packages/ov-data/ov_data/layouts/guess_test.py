import json
import os
from pathlib import Path

import pytest

from ov_data import layouts

_STATS = {"count": 10, "successes": 7, "failed_to_download": 3}


def _make(root: Path, *names: str, **contents: object) -> str:
  """Write files, some with contents, as in `{"a.jsonl": rows}`."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
  for name, rows in contents.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # type: ignore[attr-defined]
  return str(root)


_METADATA = {"train/metadata.jsonl": [{"file_name": "1.png", "text": "t"}]}
_CAPTIONS = {"captions.jsonl": [{"file": "a/1.jpg", "captions": ["c"]}]}


@pytest.mark.parametrize(
  ("names", "contents", "expected"),
  [
    (("a/1.jpg",), _CAPTIONS, "jsonl"),
    (("a/1.jpg",), {"labels.jsonl": [{"file": "a/1.jpg", "label": "c"}]}, "jsonl"),
    (("train/1.png",), _METADATA, "imagefolder"),
    (("1.png",), {"metadata.jsonl": [{"file_name": "1.png", "text": "t"}]}, "imagefolder"),
    (("00000/000000000.jpg", "00000/000000000.txt"), {}, "img2dataset"),
    (("00000/000000000.webp", "00000/000000000.json", "00000.parquet"), {}, "img2dataset"),
    (("00000/000000000.png",), {"00000_stats.json": [_STATS]}, "img2dataset"),
    (("1.jpg", "1.txt"), {}, "img2dataset"),
    (("dog/1.jpg", "cat/2.jpg"), {}, "classes"),
    (("dog/1.jpg", "cat/2.jpg", "cat/notes.txt", "classes.txt"), {}, "classes"),
    (("00000/1.jpg", "00001/2.jpg"), {}, "classes"),  # no sidecars
    (("bus/1.jpg", "train/2.jpg"), {}, "classes"),
    ((".git/1.jpg", "dog/1.jpg"), {}, "classes"),
    (("dog/1.jpg", "classes.txt", "skipped.jsonl", "dataset.json"), {}, "classes"),  # converted
  ],
)
def test_layouts_are_detected(tmp_path: Path, names: tuple, contents: dict, expected: str):
  path = _make(tmp_path, *names, **contents)
  assert layouts.read(path).format == expected


@pytest.mark.parametrize(
  ("names", "contents", "message"),
  [
    (("a/1.jpg", "a/1.txt", "b/2.jpg"), {}, "--format=img2dataset or --format=classes"),
    (("train/cat/1.jpg", "val/cat/2.jpg"), {}, r"splits \(train, val\); choose --format=classes"),
    (("train/cat/1.jpg",), {}, r"splits \(train\); choose --format=classes"),
    (("cat/1.jpg", "stray.jpg"), {}, r"1 images, stray.jpg the first, next to .*--format=classes"),
    (("train/1.png",), {**_METADATA, **_CAPTIONS}, "--format=jsonl or --format=imagefolder"),
    (("0.tar", "cat/1.jpg"), {}, "--format=webdataset or --format=classes"),
    (("Images/1.jpg", "Captions.TXT"), {}, "holds Captions.TXT, which could hold the captions"),
    (("images/1.jpg", "styles.csv"), {}, r"holds styles.csv, .*, which does not read it; or write"),
    (("cat/1.jpg", "dog/2.jpg", "all.jsonl"), {}, "holds all.jsonl, which could"),
    (("images/1.jpg", "texts/1.txt"), {}, "holds texts/1.txt, which could"),
    (("train/1.jpg",), {"train/captions.jsonl": []}, "train/captions.jsonl could be the list of"),
    (
      ("train2017/1.jpg", "annotations/captions_train2017.json"),
      {},
      "annotations/captions_train2017.json could be the list of its images; pass that file",
    ),
    (("1.jpg", "2.jpg"), {}, "itself, which defines neither classes nor captions"),
    (("a.txt",), {}, "found no images, but 1 files such as a.txt, which is a text file"),
    (("d/0.tar.gz",), {}, "0.tar.gz, which is a compressed tar; decompress it"),
    (("data/train-0.parquet",), {}, "train-0.parquet, which is a Parquet table"),
    (("a/1.heic", "b/2.HEIC"), {}, "2 images of unsupported types such as a/1.heic; convert them"),
    (("a.xyz",), {}, "found none of captions.jsonl, labels.jsonl, metadata.jsonl"),
    ((), {}, "found none of captions.jsonl"),
  ],
)
def test_ambiguous_folders_require_a_format(
  tmp_path: Path, names: tuple, contents: dict, message: str
):
  path = _make(tmp_path, *names, **contents)
  with pytest.raises(ValueError, match=message) as raised:
    layouts.read(path)
  assert "--format=" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("photos.tar.gz", "is a compressed tar; decompress it"),
    ("photos.tgz", "is a compressed tar"),
    ("photos.tar.zst", "is a compressed tar"),
    ("photos.zip", "is an archive; extract it"),
    ("list.csv", "is a table; name it metadata.csv with a column file_name, or write captions"),
    ("list.tsv", "is a table; write captions.jsonl"),
    ("list.parquet", "is a Parquet table, which is not supported; write captions.jsonl"),
    ("list.txt", "is a text file; write captions.jsonl"),
    ("train.tfrecord", "already holds record shards"),
    ("a.jpg", "is a single image; pass its folder"),
    ("a.xyz", "is a file of an unknown type; expected a folder"),
    ("metadata.parquet", "Parquet is not supported; convert it to metadata.jsonl"),
  ],
)
def test_files_of_other_types(tmp_path: Path, name: str, message: str):
  with pytest.raises(ValueError, match=f"{name}:? {message}"):
    layouts.read(_make(tmp_path, name) + f"/{name}")


def test_missing_and_special_files(tmp_path: Path):
  os.mkfifo(tmp_path / "pipe.jsonl")
  os.symlink("nowhere", tmp_path / "link.jsonl")
  for name, message in (
    ("pipe.jsonl", "neither a folder nor a regular file"),
    ("link.jsonl", "No such file or directory; is it a broken link"),
    ("absent.jsonl", "no such file or folder"),
  ):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
      layouts.read(str(tmp_path / name))
  with pytest.raises(ValueError, match="neither a folder nor a regular file"):
    layouts.read("/dev/zero")


def test_special_characters_are_used_literally(tmp_path: Path):
  for name in ("a*b", "a?b", "[ab]", "x@512", "{0..1}"):
    path = _make(tmp_path / name, "dog/1.jpg")
    assert [item.key for item in layouts.read(path).items] == ["dog/1.jpg"]


def test_the_detected_layout_is_described(tmp_path: Path):
  path = _make(tmp_path, *(f"00000/{i}.jpg" for i in range(3)), "00000/0.txt")
  (tmp_path / "00000/1.json").write_text('{"caption": "a red\\ncar"}')
  (tmp_path / "00000/0.txt").write_text(" ")
  assert layouts.describe("photos", layouts.read(path)) == (
    'reading photos as img2dataset: 3 images, 1 with captions; for example 00000/1.jpg: "a red\\n'
    'car"'
  )
  listing = layouts.read(_make(tmp_path / "c", "dog/1.jpg", "cat/1.jpg"))
  assert layouts.describe("c", listing) == (
    'reading c as classes: 2 images, 2 with one of 2 labels; for example cat/1.jpg: "cat"'
  )


def test_unknown_format_and_needless_images(tmp_path: Path):
  path = _make(tmp_path, "dog/1.jpg")
  with pytest.raises(ValueError, match="format='zip': expected auto or one of jsonl"):
    layouts.read(path, "zip")
  with pytest.raises(ValueError, match="--images=.*: format classes has its images in"):
    layouts.read(path, images=path)
