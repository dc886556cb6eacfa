"""Converter: layout detection, splits, and counts of skipped files."""

import json
import os
from pathlib import Path
import socket

import pytest

from ov_data import layouts
from ov_data.sources import Dataset, Source
from tools.data import shards
from tools.data.testing import convert_listing, jpeg, lines, read_rows, run_app, skipped, write


def _texts(output: Path, split: str = "train") -> dict[str, list[bytes]]:
  return {key: row.get("txt") for key, row in read_rows(output, split).items()}


def test_img2dataset_files(tmp_path: Path):
  for shard in ("00000", "00001"):
    for i in range(2):
      stem = f"in/{shard}/{shard}000{i}"
      write(tmp_path / f"{stem}.jpg", jpeg(i))
      write(tmp_path / f"{stem}.txt", f"caption {i}" if i else "")
      write(tmp_path / f"{stem}.json", json.dumps({"caption": f"json {i}", "status": "success"}))
    write(tmp_path / f"in/{shard}.parquet", b"")
    stats = {"count": 5, "successes": 2, "failed_to_download": 3}
    write(tmp_path / f"in/{shard}_stats.json", json.dumps(stats))
  write(tmp_path / "in/00001/000010009.txt", "without image")
  done = run_app(f"--input={tmp_path}/in", f"--output={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert (
    "as img2dataset: 4 images, 4 with captions; for example 00000/000000000.jpg: " in done.stderr
  )
  assert "6 failed downloads" in done.stderr
  assert _texts(tmp_path / "out") == {
    "00000/000000000.jpg": [b"json 0"],
    "00000/000000001.jpg": [b"caption 1"],
    "00001/000010000.jpg": [b"json 0"],
    "00001/000010001.jpg": [b"caption 1"],
  }
  assert skipped(tmp_path / "out") == {"00001/000010009": "no image"}
  assert not any("label" in row for row in read_rows(tmp_path / "out").values())


def test_captions_next_to_images_that_cannot_be_used(tmp_path: Path):
  for i in range(6):
    write(tmp_path / f"{i}.jpg", jpeg(i))
  os.mkfifo(tmp_path / "0.txt")
  write(tmp_path / "1.json", "[" * 100_000)
  write(tmp_path / "2.txt", "x" * (1 << 21))
  write(tmp_path / "3.json", '{"caption": 3}')
  write(tmp_path / "4.TXT", "\ufefffine")
  write(tmp_path / "4.tif", b"x")
  found = layouts.read(str(tmp_path))
  assert [(item.key, item.captions) for item in found.items] == [
    ("4.jpg", ("fine",)),
    ("5.jpg", ()),
  ]
  assert {skip.key: skip.reason for skip in found.skips} == {
    "0.jpg": "unreadable caption",
    "1.jpg": "unreadable caption",
    "2.jpg": "caption too long",
    "3.jpg": "unreadable caption",
    "4.tif": "unsupported image type",
  }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder_with_splits(tmp_path: Path, kind: str):
  for split in ("train", "test"):
    write(tmp_path / f"in/{split}/1.png", jpeg(1, format="PNG"))
    write(tmp_path / f"in/{split}/unnamed.jpg", jpeg(1))
    if kind == "jsonl":
      text = lines({"file_name": "1.png", "text": f"of {split}"})
    else:
      text = f'file_name,text,label\n1.png,"of {split}",\n'
    write(tmp_path / f"in/{split}/metadata.{kind}", text)
  summary = convert_listing(layouts.read(str(tmp_path / "in")), tmp_path / "out")
  assert summary.examples == {"train": 1, "test": 1}
  assert _texts(tmp_path / "out") == {"train/1.png": [b"of train"]}
  assert _texts(tmp_path / "out", "test") == {"test/1.png": [b"of test"]}
  assert summary.skipped == {"image that no line names": 2}


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("metadata.csv", "name,text\na,b\n", "line 1: expected a header with file_name"),
    ("metadata.csv", "file_name,text,text\na,b,c\n", "line 1: expected a header"),
    ("metadata.csv", "file_name,text\na.jpg,b\nc.jpg,d,e\n", "line 3: 3 fields; the header has 2"),
    ("metadata.csv", 'file_name,text\na.jpg,"b\n', r"line \d: not CSV .*; expected lines that end"),
    (
      "metadata.csv",
      "file_name,text\ra.jpg,b\r",
      r"line 1: not CSV .*unquoted field\)",
    ),
    ("metadata.csv", "file_name;text\na.jpg;b\n", "line 1: .* once, separated by commas, found"),
    ("metadata.csv", "file_name,text\n,b\n", "line 2: expected .file_name"),
    ("metadata.csv", "file_name,url\na.jpg,b\n", "line 2: expected one of text, caption"),
    ("metadata.jsonl", '{"file": "a.jpg", "text": "x"}', "line 1: expected .file_name"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "label": true}', "line 1: expected .label"),
    ("metadata.parquet", "PAR1", "Parquet is not supported; convert it to metadata.jsonl"),
  ],
)
def test_imagefolder_mistakes(tmp_path: Path, name: str, text: str, message: str):
  write(tmp_path / "a.jpg", jpeg(1))
  path = write(tmp_path / name, text)
  for given in (tmp_path, path):
    with pytest.raises(ValueError, match=f"{name}[,:] {message}"):
      layouts.read(str(given))


def test_a_csv_with_long_fields_and_blank_lines(tmp_path: Path):
  for i in range(3):
    write(tmp_path / f"{i}.jpg", jpeg(i))
  longest, too_long = "x" * (1 << 20), "y" * (2 << 20)
  text = f"\nfile_name,text\n0.jpg,{longest}\n\n1.jpg,{too_long}\n2.jpg,fine\n"
  write(tmp_path / "metadata.csv", text)
  found = layouts.read(str(tmp_path))
  assert {item.key: item.captions for item in found.items} == {
    "0.jpg": (longest,),
    "2.jpg": ("fine",),
  }
  assert [(skip.key, skip.reason) for skip in found.skips] == [("1.jpg", "caption too long")]


def test_folders_of_one_label_are_noted(tmp_path: Path):
  for folder in ("a b", "a  b", "c"):
    write(tmp_path / folder / "0.jpg", jpeg(0))
  found = layouts.read(str(tmp_path), "classes")
  assert found.class_names == ("a b", "c")
  assert found.notes.counts == {"folders merged with another one of the same label": 1}


def test_a_list_that_is_a_broken_link(tmp_path: Path):
  write(tmp_path / "0.jpg", jpeg(0))
  (tmp_path / "captions.jsonl").symlink_to(tmp_path / "moved.jsonl")
  with pytest.raises(ValueError, match=r"captions.jsonl: no such file; is it a broken link"):
    layouts.read(str(tmp_path))


def test_class_folders_with_splits(tmp_path: Path):
  for name in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/emu/4.jpg", "val/5.jpg"):
    write(tmp_path / "in" / name, jpeg(1))
  arguments = (f"--input={tmp_path}/in", f"--output={tmp_path}/out")
  done = run_app(*arguments)
  assert done.returncode == 2 and "--format=classes" in done.stderr
  assert not (tmp_path / "out").exists()
  held = run_app(*arguments, "--format=classes", "--holdout=0.1")
  assert held.returncode == 2 and "has the splits train, val already" in held.stderr
  done = run_app(*arguments, "--format=classes", "--caption_template=a {}")
  assert done.returncode == 0 and "2 train, 2 val examples" in done.stdout, done.stderr
  assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\nemu\n"
  assert _texts(tmp_path / "out") == {"train/cat/1.jpg": [b"a cat"], "train/dog/2.jpg": [b"a dog"]}
  assert _texts(tmp_path / "out", "val") == {
    "val/cat/3.jpg": [b"a cat"],
    "val/emu/4.jpg": [b"a emu"],
  }
  assert skipped(tmp_path / "out") == {"val/5.jpg": "image in no class folder"}


_ODD = (
  ".ipynb_checkpoints/1-checkpoint.jpg", ".git/x.jpg", "lost+found/8.jpg", "__MACOSX/cat/._1.jpg",
  "cat/1.jpg", "cat/.2.jpg", "cat/deep/6.JPE", "dog/2.jpg", "dog/3.jfif", "dog/4.tif",
  "dog/5.heic", "dog/7.AVIF", "dog/notes.txt", "stray.jpg",
)  # fmt: skip


def test_hidden_stray_and_unsupported_files(tmp_path: Path):
  for name in _ODD:
    write(tmp_path / "in" / name, jpeg(1))
  with pytest.raises(ValueError, match=r"1 images, stray.jpg the first.*--format=classes"):
    layouts.read(str(tmp_path / "in"))
  found = layouts.read(str(tmp_path / "in"), "classes")
  convert_listing(found, tmp_path / "out")
  images = {"cat/1.jpg", "cat/deep/6.JPE", "dog/2.jpg", "dog/3.jfif"}
  assert read_rows(tmp_path / "out").keys() == images
  assert skipped(tmp_path / "out") == {
    "dog/4.tif": "unsupported image type",
    "dog/5.heic": "unsupported image type",
    "dog/7.AVIF": "unsupported image type",
    "stray.jpg": "image in no class folder",
  }
  assert found.notes.counts == {"hidden files and folders": 5, "files that are not images": 1}
  assert found.class_names == ("cat", "dog")
  data = Dataset(Source(str(tmp_path / "in"), caption_keys=()))  # same result as the loader
  assert data.class_names == ("cat", "dog")
  assert {data.read(n).texts["key"][0].decode() for n in range(len(data))} == images
  assert sorted(skip.key for skip in data.skips) == sorted(skipped(tmp_path / "out"))


def test_both_lists_and_unlisted_files(tmp_path: Path):
  for name in ("a.jpg", "b.jpg", "c.jpg", "sub/d.heic"):
    write(tmp_path / name, jpeg(1))
  captions = lines({"file": "a.jpg", "caption": "x"}, {"file": "./a.jpg", "captions": ["y", "x"]})
  write(tmp_path / "captions.jsonl", "\ufeff" + captions)
  labels = {"a.jpg": "l", "b.jpg": "m"}
  listed = lines(*({"file": file, "label": label} for file, label in labels.items()))
  write(tmp_path / "labels.jsonl", listed)
  found = layouts.read(str(tmp_path))
  assert [(i.key, i.captions, i.label) for i in found.items] == [
    ("a.jpg", ("x", "y"), "l"),
    ("b.jpg", (), "m"),
  ]
  assert [(s.key, s.reason) for s in found.skips] == [
    ("c.jpg", "image that no line names"),
    ("sub/d.heic", "image that no line names"),
  ]
  merged = "lines merged with an earlier one of the same file"
  assert found.notes.counts[merged] == 2


def test_karpathy_splits_become_splits(tmp_path: Path):
  images = []
  for i, split in enumerate(["train", "restval", "test"]):
    write(tmp_path / f"v/{i}.jpg", jpeg(i))
    sentences = [*({"raw": f"{split} {n}"} for n in range(2)), {"raw": 3}, "x"]
    images.append({"filepath": "v", "filename": f"{i}.jpg", "split": split, "sentences": sentences})
  path = write(tmp_path / "dataset_coco.json", json.dumps({"images": images}))
  found = layouts.read(str(path))
  assert found.format == "karpathy" and found.notes.counts == {"sentences without text": 6}
  assert convert_listing(found, tmp_path / "out").examples == {"train": 1, "restval": 1, "test": 1}
  assert _texts(tmp_path / "out", "restval") == {"v/1.jpg": [b"restval 0", b"restval 1"]}


@pytest.mark.parametrize("split", ["../x", "a b", "é"])
def test_names_of_splits_that_are_invalid_file_names(tmp_path: Path, split: str):
  path = write(tmp_path / "k.json", json.dumps({"images": [{"filename": "a.jpg", "split": split}]}))
  with pytest.raises(ValueError, match="expected letters, digits, _ and - only"):
    convert_listing(layouts.read(str(path)), tmp_path / "out")


def test_special_files_are_counted_and_never_block(tmp_path: Path):
  write(tmp_path / "in/cat/ok.jpg", jpeg(1))
  os.mkfifo(tmp_path / "in/cat/pipe.jpg")
  os.symlink("/dev/zero", tmp_path / "in/cat/device.jpg")
  os.symlink("loop.jpg", tmp_path / "in/cat/loop.jpg")
  os.symlink("nowhere", tmp_path / "in/cat/dangling.jpg")
  (tmp_path / "in/cat/folder.jpg").mkdir()
  server = socket.socket(socket.AF_UNIX)
  os.chdir(tmp_path)  # socket paths have at most 107 bytes
  server.bind("in/cat/socket.jpg")
  done = run_app("--input=in", f"--output={tmp_path}/out")
  server.close()
  assert done.returncode == 0, done.stderr
  assert read_rows(tmp_path / "out").keys() == {"cat/ok.jpg"}
  assert skipped(tmp_path / "out") == {
    "cat/pipe.jpg": "not a regular file",
    "cat/device.jpg": "not a regular file",
    "cat/folder.jpg": "not a regular file",
    "cat/socket.jpg": "not a regular file",
    "cat/loop.jpg": "unreadable file",
    "cat/dangling.jpg": "missing image",
  }


def test_links_to_folders(tmp_path: Path):
  write(tmp_path / "elsewhere/1.jpg", jpeg(1))
  write(tmp_path / "in/dog/2.jpg", jpeg(2))
  os.symlink(tmp_path / "elsewhere", tmp_path / "in/cat")
  os.symlink(tmp_path / "in", tmp_path / "in/up")
  os.symlink(tmp_path / "in", tmp_path / "in/dog/round")
  found = layouts.read(str(tmp_path / "in"), follow_links=True)
  assert [item.key for item in found.items] == ["cat/1.jpg", "dog/2.jpg"]
  assert found.notes.counts == {"links to folders that were not followed": 2}


def test_links_that_point_outside_of_the_input(tmp_path: Path):
  """Outside links are counted, or used with --follow_links. Links within the input are used."""
  write(tmp_path / "private/secret.jpg", jpeg(1))
  write(tmp_path / "in/cat/own.jpg", jpeg(2))
  write(tmp_path / "in/dog/own.jpg", jpeg(3))
  (tmp_path / "in/cat/inside.jpg").symlink_to("../dog/own.jpg")
  (tmp_path / "in/cat/\x1b[31m.jpg").symlink_to(tmp_path / "private/secret.jpg")
  (tmp_path / "in/ant").symlink_to("../private")
  (tmp_path / "link to in").symlink_to("in")  # given by the user
  arguments = (f"--input={tmp_path}/link to in", f"--output={tmp_path}/out")
  done = run_app(*arguments)
  assert done.returncode == 0, done.stderr
  own = {"cat/inside.jpg", "cat/own.jpg", "dog/own.jpg"}
  assert read_rows(tmp_path / "out").keys() == own
  assert skipped(tmp_path / "out") == dict.fromkeys(
    ("ant", "cat/\\x1b[31m.jpg"), "link leads outside"
  )
  detail = f"ant -> {tmp_path}/private; copy it into the folder, or set follow_links if you trust"
  assert detail in (tmp_path / "out/skipped.jsonl").read_text()
  assert "skipped 2 (2 link leads outside" in done.stdout and "\x1b" not in done.stdout
  refused = run_app(*arguments, "--follow_links")
  assert refused.returncode == 2 and "another data set" in refused.stderr
  assert "\x1b" not in refused.stderr
  assert run_app(*arguments, "--follow_links", "--overwrite").returncode == 0
  assert read_rows(tmp_path / "out").keys() == own | {"cat/\x1b[31m.jpg", "ant/secret.jpg"}


@pytest.mark.parametrize("list_name", ["captions.jsonl", "captions_val.json", "dataset_coco.json"])
def test_links_in_lists_that_point_outside(tmp_path: Path, list_name: str):
  write(tmp_path / "private/secret.jpg", jpeg(1))
  write(tmp_path / "in/own.jpg", jpeg(2))
  (tmp_path / "in/linked.jpg").symlink_to(tmp_path / "private/secret.jpg")
  (tmp_path / "in/folder").symlink_to(tmp_path / "private")
  names = ["own.jpg", "linked.jpg", "folder/secret.jpg"]
  contents: dict[str, object] = {
    "captions_val.json": {
      "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
      "annotations": [{"image_id": i, "caption": "x"} for i in range(3)],
    },
    "dataset_coco.json": {
      "images": [{"filename": name, "sentences": [{"raw": "x"}]} for name in names]
    },
  }
  text = lines(*({"file": name, "caption": "x"} for name in names))
  if list_name in contents:
    text = json.dumps(contents[list_name])
  path = write(tmp_path / "in" / list_name, text)
  found = layouts.read(str(path), images=str(tmp_path / "in"))
  convert_listing(found, tmp_path / "out")
  assert read_rows(tmp_path / "out").keys() == {"own.jpg"}
  assert skipped(tmp_path / "out") == dict.fromkeys(names[1:], "link leads outside")
  convert_listing(found, tmp_path / "all", shards.Options(follow_links=True))
  assert read_rows(tmp_path / "all").keys() == set(names)


def test_buckets_are_rejected_before_any_work(tmp_path: Path):
  for arguments in (("--input=gs://b/in",), ("--input=x.json", "--images=gs://b/in")):
    done = run_app(*arguments, f"--output={tmp_path}/out")
    assert done.returncode == 2 and "only local files can be converted" in done.stderr
