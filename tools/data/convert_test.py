"""Converter: every input format, what is left out, what is refused, and the app itself."""

from collections.abc import Callable
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tarfile
import tempfile
from types import ModuleType

import numpy as np
from PIL import Image
import pytest

from ov_data import decode, example, sources, writer
from tools.data import convert, inputs, scenes, shards

Row = dict[str, example.Feature]


def _jpeg(value: int = 0, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
  rng = np.random.default_rng(value)
  buffer = io.BytesIO()
  pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
  Image.fromarray(pixels).save(buffer, format)
  return buffer.getvalue()


def _write(path: Path, data: bytes | str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def _lines(*rows: object) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


def _tar(path: Path, members: dict[str, bytes | str]) -> Path:
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      content = data if isinstance(data, bytes) else data.encode()
      header = tarfile.TarInfo(name)
      header.size = len(content)
      tar.addfile(header, io.BytesIO(content))
  return path


def _convert(
  found: inputs.Inputs,
  output: Path,
  options: shards.Options | None = None,
  *,
  holdout: float = 0.0,
  shard_bytes: int = 1 << 20,
) -> writer.Summary:
  with tempfile.TemporaryDirectory() as folder:
    plan = shards.plan(
      found, folder, options or shards.Options(), holdout=holdout, shard_bytes=shard_bytes, seed=0
    )
    recipe = {"digest": shards.digest(found)}
    return writer.write_dataset(output, plan.shards, plan, recipe, workers=0)


def _rows(output: Path, split: str = "train") -> dict[str, Row]:
  data = sources.Dataset(sources.Source(str(output), split))
  rows = [example.parse(data.read(i)) for i in range(len(data))]
  return {row["key"][0].decode(): row for row in rows}


def test_captions_jsonl(tmp_path: Path):
  source = tmp_path / "photos"
  _write(source / "images/a.jpg", _jpeg(1))
  _write(source / "images/b.png", _jpeg(2, format="PNG"))
  _write(
    source / "captions.jsonl",
    _lines(
      {"file": "images/a.jpg", "captions": ["one", " two ", "one", ""], "license": "CC BY"},
      {"file": "images/b.png", "caption": "three"},
      {"file": "images/a.jpg", "captions": ["four"]},
    )
    + "\n",
  )
  summary = _convert(inputs.read(str(source)), tmp_path / "out")
  rows = _rows(tmp_path / "out")
  assert summary.examples == {"train": 2} and not summary.skipped
  assert rows["images/a.jpg"]["txt"] == [b"one", b"two", b"four"]
  assert rows["images/b.png"]["txt"] == [b"three"]
  assert rows["images/a.jpg"]["jpg"] == [_jpeg(1)]  # stored as it was
  assert rows["images/b.png"]["jpg"] == [_jpeg(2, format="PNG")]
  assert rows["images/a.jpg"]["width"].tolist() == [40]
  assert rows["images/a.jpg"]["height"].tolist() == [30]
  assert "label" not in rows["images/a.jpg"]


def test_labels_jsonl(tmp_path: Path):
  source = tmp_path / "photos"
  rows = []
  for i, label in enumerate(["shoes", "dress", "shoes"]):
    _write(source / f"{i}.jpg", _jpeg(i))
    rows.append({"file": f"{i}.jpg", "label": label})
  _write(source / "labels.jsonl", _lines(*rows))
  options = shards.Options(caption_template="a photo of {}")
  _convert(inputs.read(str(source)), tmp_path / "out", options)
  found = _rows(tmp_path / "out")
  assert [found[f"{i}.jpg"]["label"] for i in range(3)] == [[b"shoes"], [b"dress"], [b"shoes"]]
  assert [found[f"{i}.jpg"]["label_id"].tolist() for i in range(3)] == [[1], [0], [1]]
  assert found["1.jpg"]["txt"] == [b"a photo of dress"]


def test_class_folders(tmp_path: Path):
  source = tmp_path / "photos"
  _write(source / "cat/1.jpg", _jpeg(1))
  _write(source / "cat/deep/2.JPEG", _jpeg(2))
  _write(source / "dog/1.webp", _jpeg(3, format="WEBP"))
  _write(source / "dog/notes.txt", "no picture")
  found = inputs.read(str(source))
  assert found.format == "classes"
  _convert(found, tmp_path / "out")
  rows = _rows(tmp_path / "out")
  labels = {key: (row["label"][0], int(row["label_id"][0])) for key, row in rows.items()}
  assert labels == {
    "cat/1.jpg": (b"cat", 0),
    "cat/deep/2.JPEG": (b"cat", 0),
    "dog/1.webp": (b"dog", 1),
  }


def test_coco(tmp_path: Path):
  _write(tmp_path / "images/7.jpg", _jpeg(7))
  _write(tmp_path / "images/8.jpg", _jpeg(8))
  content = {
    "images": [
      {"id": 7, "file_name": "7.jpg"},
      {"id": 8, "file_name": "8.jpg"},
      {"id": 9, "file_name": "../9.jpg"},
    ],
    "annotations": [
      {"id": 1, "image_id": 7, "caption": "one"},
      {"id": 2, "image_id": 7, "caption": "two "},
      {"id": 3, "image_id": 70, "caption": "of nothing"},
    ],
  }
  path = _write(tmp_path / "captions_val.json", json.dumps(content))
  summary = _convert(inputs.read(str(path), images=str(tmp_path / "images")), tmp_path / "out")
  assert _rows(tmp_path / "out")["7.jpg"]["txt"] == [b"one", b"two"]
  assert summary.skipped == {
    "no caption": 1, "path outside the folder": 1, "caption without image": 1,
  }  # fmt: skip


def test_webdataset(tmp_path: Path):
  _tar(
    tmp_path / "data-000.tar",
    {
      "sub/0001.jpg": _jpeg(1),
      "sub/0001.txt": "from text\n",
      "sub/0001.json": json.dumps({"caption": "not used"}),
      "sub/0002.png": _jpeg(2, format="PNG"),
      "sub/0002.json": json.dumps({"caption": "from json", "url": "x"}),
      "0003.WEBP": _jpeg(3, format="WEBP"),
      "0003.cls": "7",
      "0004.seg.jpg": _jpeg(4),
      "0005.txt": "no image",
      "0006.jpg": _jpeg(6),
      "0007.jpg": _jpeg(7),
      "0007.json": "{broken",
      "0008.jpg": _jpeg(8),
      "0008.txt": b"\xff\xfe",
      "../escape.jpg": _jpeg(9),
      "/absolute.jpg": _jpeg(9),
    },
  )
  _tar(tmp_path / "data-001.tar", {"0001.jpg": _jpeg(11), "0001.txt": "second tar"})
  found = inputs.read(str(tmp_path))
  summary = _convert(found, tmp_path / "out")
  rows = _rows(tmp_path / "out")
  assert {key: row.get("txt") for key, row in rows.items()} == {
    "data-000.tar/sub/0001": [b"from text"],
    "data-000.tar/sub/0002": [b"from json"],
    "data-000.tar/0003": None,
    "data-001.tar/0001": [b"second tar"],
  }
  assert rows["data-000.tar/0003"]["label"] == [b"7"]
  assert rows["data-000.tar/sub/0002"]["jpg"] == [_jpeg(2, format="PNG")]
  assert summary.skipped == {
    "no image": 2,
    "no caption": 1,
    "unreadable caption": 2,
    "path outside the folder": 2,
  }


def test_webdataset_links_are_not_followed(tmp_path: Path):
  secret = _write(tmp_path / "secret.jpg", _jpeg(5))
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    link = tarfile.TarInfo("0001.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar.addfile(link)
    text = tarfile.TarInfo("0001.txt")
    text.size = 2
    tar.addfile(text, io.BytesIO(b"hi"))
  found = inputs.read(str(tmp_path / "a.tar"))
  assert not found.items and [s.reason for s in found.skips] == ["no image"]


@pytest.mark.parametrize("missing", [1024, 15_000, 15_360, 15_900])
def test_truncated_tar_keeps_what_is_whole(tmp_path: Path, missing: int):
  """Cut off in a picture, in the padding behind one, in a header, in the end mark."""
  whole = _tar(
    tmp_path / "whole.tar",
    {f"{i}.{s}": _jpeg(i) if s == "jpg" else "text" for i in range(9) for s in ("txt", "jpg")},
  )
  cut = _write(tmp_path / "cut/a.tar", whole.read_bytes()[:-missing].rstrip(b"\0"))
  found = inputs.read(str(cut))
  summary = _convert(found, tmp_path / "out")
  assert 0 < summary.examples["train"] <= 9
  assert summary.skipped["broken tar file"] == 1


def test_tar_ranges(tmp_path: Path):
  for i in (8, 9, 10):
    _tar(tmp_path / f"d-{i:03d}.tar", {f"{i}.jpg": _jpeg(i), f"{i}.txt": "x"})
  assert len(inputs.read(f"{tmp_path}/d-{{008..010}}.tar").items) == 3
  assert len(inputs.read(f"{tmp_path}/d-0*.tar").items) == 3
  with pytest.raises(ValueError, match=r"1 of 4 files are missing, .*d-011\.tar first"):
    inputs.read(f"{tmp_path}/d-{{008..011}}.tar")


def test_broken_images_are_counted_by_reason(tmp_path: Path):
  source = tmp_path / "photos"
  good = _jpeg(1, (200, 200))
  bomb = io.BytesIO()
  Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
  files = {
    "good.jpg": good,
    "truncated.jpg": good[: len(good) // 2],
    "text.jpg": b"<html>404 Not Found</html>",
    "empty.jpg": b"",
    "bomb.png": bomb.getvalue(),
    "header.jpg": good[:40],
  }
  for name, data in files.items():
    _write(source / name, data)
  (source / "folder.jpg").mkdir()
  names = [*files, "absent.jpg", "../out.jpg", "/etc/passwd", "a/../../b.jpg", "folder.jpg"]
  _write(source / "captions.jsonl", _lines(*({"file": n, "captions": ["x"]} for n in names)))
  summary = _convert(inputs.read(str(source)), tmp_path / "out")
  assert summary.examples == {"train": 1}
  assert summary.skipped["path outside the folder"] == 3
  assert summary.skipped["missing image"] == 1
  assert summary.skipped["unreadable file"] == 1
  assert summary.skipped["too many pixels"] == 1
  assert sum(summary.skipped.values()) == len(names) - 1
  listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").open()]
  assert {row["key"] for row in listed} == set(names) - {"good.jpg"}
  reasons = {row["key"]: row["reason"] for row in listed}
  assert reasons["truncated.jpg"] == "truncated image"
  assert reasons["text.jpg"] == "unknown format"


def _odd_image(kind: str) -> bytes:
  buffer = io.BytesIO()
  if kind == "gif":
    Image.new("P", (40, 30), 3).save(buffer, "GIF")
  elif kind == "rotated":
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG", exif=exif)
  else:
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.mark.parametrize(
  ("kind", "reencode", "stored", "size"),
  [
    ("gif", False, "JPEG", (40, 30)),  # no format that every reader of the shards knows
    ("rotated", False, "JPEG", (30, 40)),
    ("rotated", True, "JPEG", (30, 40)),
    ("alpha", False, "PNG", (40, 30)),
    ("alpha", True, "JPEG", (40, 30)),
  ],
)
def test_stored_form(tmp_path: Path, kind: str, reencode: bool, stored: str, size: tuple[int, int]):
  _write(tmp_path / "in/x/a.jpg", _odd_image(kind))
  _convert(inputs.read(str(tmp_path / "in")), tmp_path / "out", shards.Options(reencode=reencode))
  [row] = _rows(tmp_path / "out").values()
  data = row["jpg"][0]
  assert (row["width"][0], row["height"][0]) == size
  assert decode.full(data).size == size
  assert Image.open(io.BytesIO(data)).format == stored
  if kind == "alpha":  # transparent is white
    assert decode.full(data).getpixel((5, 5)) == (255, 255, 255)


def test_max_side_shrinks_only_what_is_larger(tmp_path: Path):
  _write(tmp_path / "in/x/large.jpg", _jpeg(1, (400, 200)))
  _write(tmp_path / "in/x/small.jpg", _jpeg(2, (50, 100)))
  _convert(inputs.read(str(tmp_path / "in")), tmp_path / "out", shards.Options(max_side=100))
  rows = _rows(tmp_path / "out")
  assert decode.full(rows["x/large.jpg"]["jpg"][0]).size == (100, 50)
  assert rows["x/small.jpg"]["jpg"] == [_jpeg(2, (50, 100))]


def _many(tmp_path: Path, count: int) -> inputs.Inputs:
  blob = inputs.Blob(str(_write(tmp_path / "same.jpg", _jpeg(1, (8, 8)))))
  items = [inputs.Item(f"{i}.jpg", blob, (f"text {i}",)) for i in range(count)]
  return inputs.Inputs("jsonl", items, [])


def test_splits_depend_on_the_key_alone(tmp_path: Path):
  many = _many(tmp_path, 300)
  fewer = inputs.Inputs("jsonl", many.items[::-1][:200], [])
  _convert(many, tmp_path / "a", holdout=0.2)
  _convert(fewer, tmp_path / "b", holdout=0.2, shard_bytes=1000)
  held = set(_rows(tmp_path / "a", "heldout"))
  # 300 draws with p = 0.2: mean 60, standard deviation 7.
  assert 35 < len(held) < 85 and not held & set(_rows(tmp_path / "a"))
  keys = {item.key for item in fewer.items}
  assert set(_rows(tmp_path / "b", "heldout")) == held & keys
  assert set(_rows(tmp_path / "b")) == keys - held


def test_shards_are_filled_evenly_and_mixed(tmp_path: Path):
  many = _many(tmp_path, 100)
  size = os.path.getsize(many.items[0].image.path)
  summary = _convert(many, tmp_path / "out", shard_bytes=10 * size)
  assert summary.examples == {"train": 100}
  indexes = sources.Dataset(sources.Source(str(tmp_path / "out"), "train")).indexes
  assert [len(i) for i in indexes] == [10] * 10
  assert list(_rows(tmp_path / "out")) != [item.key for item in many.items]


def test_sample_is_spread(tmp_path: Path):
  keys = [item.key for item in shards.sample(_many(tmp_path, 100), 10, 0).items]
  assert len(set(keys)) == 10 and keys != [f"{i}.jpg" for i in range(10)]


def _captions(path: Path, text: str) -> Path:
  return _write(path / "captions.jsonl", text).parent


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda p: p / "nowhere", "no such file or folder"),
    (lambda p: p, "found none of captions.jsonl, labels.jsonl"),
    (lambda p: p / "none.jsonl", "No such file"),
    (lambda p: _captions(p, '{"file": "a.jpg", "captions": []}\n{"file"'), "line 2: not JSON"),
    (lambda p: _captions(p, "[1]\n"), "line 1: expected a JSON object"),
    (lambda p: _captions(p, _lines({"captions": ["x"]})), 'line 1: expected "file"'),
    (lambda p: _captions(p, _lines({"file": "a", "captions": [1]})), r'line 1: expected "capt'),
    (lambda p: _captions(p, _lines({"file": "a", "text": "x"})), "line 1: .*found file, text"),
    (lambda p: _captions(p, ""), "no images found"),
    (
      lambda p: _captions(p, _lines({"file": "a", "label": "x"}, {"file": "a", "label": "y"})),
      "line 2: a was labelled 'x' before, now 'y'",
    ),
    (lambda p: _write(p / "x.json", "{}"), "--images=FOLDER"),
    (lambda p: _write(p / "x.tar", b"no tar"), "no tar file that can be read"),
    (lambda p: p / "*.tar", "no tar file matches|files are missing"),
  ],
)
def test_mistakes_are_named(tmp_path: Path, make: Callable[[Path], Path], message: str):
  with pytest.raises((ValueError, OSError), match=message):
    inputs.read(str(make(tmp_path)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "not JSON"),
    ("[]", "expected COCO"),
    ('{"images": [{"id": 1}]}', r"images\[0\] has no id or file_name"),
    ('{"images": [], "annotations": [{"bbox": []}]}', "instances"),
    ('{"images": []}', "no images found"),
  ],
)
def test_coco_mistakes(tmp_path: Path, content: str, message: str):
  path = _write(tmp_path / "x.json", content)
  with pytest.raises(ValueError, match=message):
    inputs.read(str(path), images=str(tmp_path))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_side": 5}, "max_side=5"),
    ({"quality": 0}, "quality=0"),
    ({"caption_template": "a photo"}, "caption_template='a photo'"),
  ],
)
def test_options_are_checked(options: dict, message: str):
  with pytest.raises(ValueError, match=message):
    shards.Options(**options)


# The app, as the user runs it.


def _app(*arguments: str, app: ModuleType = convert) -> subprocess.CompletedProcess[str]:
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-m", app.__name__, *arguments]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_app(tmp_path: Path):
  for i in range(6):
    _write(tmp_path / f"in/{'cat' if i % 2 else 'dog'}/{i}.jpg", _jpeg(i))
  _write(tmp_path / "in/cat/broken.jpg", "broken")
  arguments = (f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--workers=2")
  done = _app(*arguments)
  assert done.returncode == 0, done.stderr
  assert "6 train examples; skipped 1 (1 unknown format" in done.stdout
  assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"
  before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  assert _app(*arguments).returncode == 0
  assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
  other = _app(*arguments, "--max_side=20")
  assert other.returncode == 2 and "holds another data set: options was" in other.stderr
  assert _app(*arguments, "--max_side=20", "--overwrite").returncode == 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "give --input=FOLDER and --output=FOLDER"),
    (("--input=nowhere",), "nowhere: no such file or folder"),
    (("--input=broken.jsonl",), r"broken.jsonl, line 2: not JSON"),
    (("--input=lost.jsonl",), "not one picture could be used"),
    (("--input=lost.jsonl", "--holdout=1.5"), "holdout=1.5"),
    (("--input=lost.jsonl", "--format=zip"), "zip"),
    (("--input=lost.jsonl", "--images=nowhere"), "--images=nowhere: no such folder"),
  ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str):
  _write(tmp_path / "broken.jsonl", '{"file": "a", "caption": "x"}\nnot json\n')
  _write(tmp_path / "lost.jsonl", _lines({"file": "absent.jpg", "caption": "x"}))
  output = [f"--output={tmp_path}/out"] if arguments else []
  paths = [a.replace("=lost", f"={tmp_path}/lost").replace("=broken", f"={tmp_path}/broken")
           for a in arguments]  # fmt: skip
  done = _app(*paths, *output)
  assert done.returncode == 2
  assert message in done.stderr and "Traceback" not in done.stderr


def test_scenes_app(tmp_path: Path):
  done = _app(
    f"--output={tmp_path}/out", "--train=20", "--heldout=5", f"--sheet={tmp_path}/s.png",
    app=scenes,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "20 train, 5 heldout examples" in done.stdout
  assert Image.open(tmp_path / "s.png").width > 1000
  again = _app(f"--output={tmp_path}/out", "--train=30", app=scenes)
  assert again.returncode == 2 and "another data set" in again.stderr
  assert "Traceback" not in again.stderr
