"""Converter: input formats, skipped images, rejected arguments, and the app."""

from collections.abc import Callable
import io
import json
import os
from pathlib import Path

from PIL import Image
import pytest

from ov_data import decode, layouts, sources
from tools.data import scenes, shards
from tools.data.testing import convert_listing, jpeg, lines, read_rows, run_app, write


def test_captions_jsonl(tmp_path: Path):
  source = tmp_path / "photos"
  write(source / "images/a.jpg", jpeg(1))
  write(source / "images/b.png", jpeg(2, format="PNG"))
  write(
    source / "captions.jsonl",
    lines(
      {"file": "images/a.jpg", "captions": ["one", " two ", "one", ""], "license": "CC BY"},
      {"file": "images/b.png", "caption": "three"},
      {"file": "images/a.jpg", "captions": ["four"]},
    )
    + "\n",
  )
  summary = convert_listing(layouts.read(str(source)), tmp_path / "out")
  rows = read_rows(tmp_path / "out")
  assert summary.examples == {"train": 2} and not summary.skipped
  assert rows["images/a.jpg"]["txt"] == [b"one", b"two", b"four"]
  assert rows["images/b.png"]["txt"] == [b"three"]
  assert rows["images/a.jpg"]["jpg"] == [jpeg(1)]  # stored unchanged
  assert rows["images/b.png"]["jpg"] == [jpeg(2, format="PNG")]
  assert rows["images/a.jpg"]["width"].tolist() == [40]
  assert rows["images/a.jpg"]["height"].tolist() == [30]
  assert "label" not in rows["images/a.jpg"]


def test_labels_jsonl(tmp_path: Path):
  source = tmp_path / "photos"
  rows = []
  for i, label in enumerate(["shoes", "dress", "shoes"]):
    write(source / f"{i}.jpg", jpeg(i))
    rows.append({"file": f"{i}.jpg", "label": label})
  write(source / "labels.jsonl", lines(*rows))
  options = shards.Options(caption_template="a photo of {}")
  convert_listing(layouts.read(str(source)), tmp_path / "out", options)
  found = read_rows(tmp_path / "out")
  assert [found[f"{i}.jpg"]["label"] for i in range(3)] == [[b"shoes"], [b"dress"], [b"shoes"]]
  assert [found[f"{i}.jpg"]["label_id"].tolist() for i in range(3)] == [[1], [0], [1]]
  assert found["1.jpg"]["txt"] == [b"a photo of dress"]


def test_class_folders(tmp_path: Path):
  source = tmp_path / "photos"
  write(source / "cat/1.jpg", jpeg(1))
  write(source / "cat/deep/2.JPEG", jpeg(2))
  write(source / "dog/1.webp", jpeg(3, format="WEBP"))
  write(source / "dog/notes.txt", "no picture")
  found = layouts.read(str(source))
  assert found.format == "classes"
  convert_listing(found, tmp_path / "out")
  rows = read_rows(tmp_path / "out")
  labels = {key: (row["label"][0], int(row["label_id"][0])) for key, row in rows.items()}
  assert labels == {
    "cat/1.jpg": (b"cat", 0),
    "cat/deep/2.JPEG": (b"cat", 0),
    "dog/1.webp": (b"dog", 1),
  }


def test_coco(tmp_path: Path):
  write(tmp_path / "images/7.jpg", jpeg(7))
  write(tmp_path / "images/8.jpg", jpeg(8))
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
  path = write(tmp_path / "captions_val.json", json.dumps(content))
  summary = convert_listing(
    layouts.read(str(path), images=str(tmp_path / "images")), tmp_path / "out"
  )
  assert read_rows(tmp_path / "out")["7.jpg"]["txt"] == [b"one", b"two"]
  assert summary.skipped == {
    "no caption": 1, "path outside the folder": 1, "caption without image": 1,
  }  # fmt: skip


def test_broken_images_are_counted_by_reason(tmp_path: Path):
  source = tmp_path / "photos"
  good = jpeg(1, (200, 200))
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
    write(source / name, data)
  (source / "folder.jpg").mkdir()
  names = [*files, "absent.jpg", "../out.jpg", "/etc/passwd", "a/../../b.jpg", "folder.jpg"]
  write(source / "captions.jsonl", lines(*({"file": n, "captions": ["x"]} for n in names)))
  summary = convert_listing(layouts.read(str(source)), tmp_path / "out")
  assert summary.examples == {"train": 1}
  assert summary.skipped["path outside the folder"] == 3
  assert summary.skipped["missing image"] == 1
  assert summary.skipped["not a regular file"] == 1
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
    ("gif", False, "JPEG", (40, 30)),  # not supported by every reader of the shards
    ("rotated", False, "JPEG", (30, 40)),
    ("rotated", True, "JPEG", (30, 40)),
    ("alpha", False, "PNG", (40, 30)),
    ("alpha", True, "JPEG", (40, 30)),
  ],
)
def test_stored_form(tmp_path: Path, kind: str, reencode: bool, stored: str, size: tuple[int, int]):
  write(tmp_path / "in/x/a.jpg", _odd_image(kind))
  convert_listing(
    layouts.read(str(tmp_path / "in")), tmp_path / "out", shards.Options(reencode=reencode)
  )
  [row] = read_rows(tmp_path / "out").values()
  data = row["jpg"][0]
  assert (row["width"][0], row["height"][0]) == size
  assert decode.full(data).size == size
  assert Image.open(io.BytesIO(data)).format == stored
  if kind == "alpha":  # transparent becomes white
    assert decode.full(data).getpixel((5, 5)) == (255, 255, 255)


def test_max_side_shrinks_only_larger_images(tmp_path: Path):
  write(tmp_path / "in/x/large.jpg", jpeg(1, (400, 200)))
  write(tmp_path / "in/x/small.jpg", jpeg(2, (50, 100)))
  convert_listing(
    layouts.read(str(tmp_path / "in")), tmp_path / "out", shards.Options(max_side=100)
  )
  rows = read_rows(tmp_path / "out")
  assert decode.full(rows["x/large.jpg"]["jpg"][0]).size == (100, 50)
  assert rows["x/small.jpg"]["jpg"] == [jpeg(2, (50, 100))]


def _many(tmp_path: Path, count: int) -> layouts.Listing:
  blob = layouts.Blob("", str(write(tmp_path / "same.jpg", jpeg(1, (8, 8)))))
  items = [layouts.Item(f"{i}.jpg", blob, (f"text {i}",)) for i in range(count)]
  return layouts.Listing("jsonl", items, [])


def test_splits_depend_on_the_key_alone(tmp_path: Path):
  many = _many(tmp_path, 300)
  fewer = layouts.Listing("jsonl", many.items[::-1][:200], [])
  convert_listing(many, tmp_path / "a", holdout=0.2)
  convert_listing(fewer, tmp_path / "b", holdout=0.2, shard_bytes=1000)
  held = set(read_rows(tmp_path / "a", "heldout"))
  # 300 draws with p = 0.2: mean 60, standard deviation 7.
  assert 35 < len(held) < 85 and not held & set(read_rows(tmp_path / "a"))
  keys = {item.key for item in fewer.items}
  assert set(read_rows(tmp_path / "b", "heldout")) == held & keys
  assert set(read_rows(tmp_path / "b")) == keys - held


def test_shards_are_filled_evenly_and_mixed(tmp_path: Path):
  many = _many(tmp_path, 100)
  size = os.path.getsize(many.items[0].image.path)
  summary = convert_listing(many, tmp_path / "out", shard_bytes=10 * size)
  assert summary.examples == {"train": 100}
  indexes = sources.Dataset(sources.Source(str(tmp_path / "out"), "train")).indexes
  assert [len(i) for i in indexes] == [10] * 10
  assert list(read_rows(tmp_path / "out")) != [item.key for item in many.items]


def test_sample_is_spread_over_the_splits(tmp_path: Path):
  some = shards.sample(_many(tmp_path, 300), 100, 0)
  keys = [item.key for item in some.items]
  assert len(set(keys)) == 100 and keys != [f"{i}.jpg" for i in range(100)]
  summary = convert_listing(some, tmp_path / "out", holdout=0.2)
  # 100 draws with p = 0.2: mean 20, standard deviation 4.
  assert summary.examples["train"] + summary.examples["heldout"] == 100
  assert 4 <= summary.examples["heldout"] <= 36


def _captions(path: Path, text: str) -> Path:
  return write(path / "captions.jsonl", text).parent


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda p: p / "nowhere", "no such file or folder"),
    (lambda p: p, "found none of captions.jsonl, labels.jsonl"),
    (lambda p: p / "none.jsonl", "no such file or folder"),
    (lambda p: _captions(p, '{"file": "a.jpg", "captions": []}\n{"file"'), "line 2: not JSON"),
    (lambda p: _captions(p, "[1]\n"), "line 1: expected a JSON object"),
    (lambda p: _captions(p, lines({"captions": ["x"]})), 'line 1: expected "file"'),
    (lambda p: _captions(p, lines({"file": "a", "captions": [1]})), r'line 1: expected "capt'),
    (lambda p: _captions(p, lines({"file": "a", "text": "x"})), "line 1: .*found file, text"),
    (lambda p: _captions(p, ""), "no images found"),
    (
      lambda p: _captions(p, lines({"file": "a", "label": "x"}, {"file": "a", "label": "y"})),
      "line 2: a has label 'y', but 'x' in an earlier line",
    ),
    (lambda p: write(p / "x.json", '{"images": [], "annotations": []}'), "--images=FOLDER"),
    (lambda p: write(p / "x.tar", b"no tar"), "not a readable tar file"),
    (lambda p: p / "*.tar", "no tar file matches|files are missing"),
  ],
)
def test_errors_name_the_entry(tmp_path: Path, make: Callable[[Path], Path], message: str):
  with pytest.raises((ValueError, OSError), match=message):
    layouts.read(str(make(tmp_path)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "not JSON"),
    ("[]", "expected {.images"),
    ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\] has no id or file_name"),
    ('{"images": [], "annotations": [{"bbox": []}]}', "instances"),
    ('{"images": [], "annotations": []}', "no images found"),
  ],
)
def test_coco_mistakes(tmp_path: Path, content: str, message: str):
  path = write(tmp_path / "x.json", content)
  with pytest.raises(ValueError, match=message):
    layouts.read(str(path), images=str(tmp_path))


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


# The app as a process.


def test_app(tmp_path: Path):
  for i in range(6):
    write(tmp_path / f"in/{'cat' if i % 2 else 'dog'}/{i}.jpg", jpeg(i))
  write(tmp_path / "in/cat/broken.jpg", "broken")
  arguments = (f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--workers=2")
  done = run_app(*arguments)
  assert done.returncode == 0, done.stderr
  assert "6 train examples; skipped 1 (1 unknown format" in done.stdout
  assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"
  before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  assert run_app(*arguments).returncode == 0
  assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
  other = run_app(*arguments, "--max_side=20")
  assert other.returncode == 2 and "data set: options.max_side was 0, now 20" in other.stderr
  assert run_app(*arguments, "--max_side=20", "--overwrite").returncode == 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "give --input=FOLDER and --output=FOLDER"),
    (("--input=nowhere",), "nowhere: no such file or folder"),
    (("--input=broken.jsonl",), r"broken.jsonl, line 2: not JSON"),
    (("--input=lost.jsonl",), "no image is usable"),
    (("--input=lost.jsonl", "--holdout=1.5"), "holdout=1.5"),
    (("--input=lost.jsonl", "--format=zip"), "zip"),
    (("--input=lost.jsonl", "--images=nowhere"), "--images=nowhere: no such folder"),
  ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str):
  write(tmp_path / "broken.jsonl", '{"file": "a", "caption": "x"}\nnot json\n')
  write(tmp_path / "lost.jsonl", lines({"file": "absent.jpg", "caption": "x"}))
  output = [f"--output={tmp_path}/out"] if arguments else []
  paths = [a.replace("=lost", f"={tmp_path}/lost").replace("=broken", f"={tmp_path}/broken")
           for a in arguments]  # fmt: skip
  done = run_app(*paths, *output)
  assert done.returncode == 2
  assert message in done.stderr and "Traceback" not in done.stderr


def test_scenes_app(tmp_path: Path):
  done = run_app(
    f"--output={tmp_path}/out", "--train=20", "--heldout=5", f"--sheet={tmp_path}/s.png",
    app=scenes,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "20 train, 5 heldout examples" in done.stdout
  assert Image.open(tmp_path / "s.png").width > 1000
  again = run_app(f"--output={tmp_path}/out", "--train=30", app=scenes)
  assert again.returncode == 2 and "another data set" in again.stderr
  assert "Traceback" not in again.stderr
