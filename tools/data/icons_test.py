"""Tests of the conversion of icons: content, copies, resuming, and messages."""

import io
import json

import numpy as np
from PIL import Image
import pytest

from tools.data import icon_baseline, icon_copies, icon_testing, icons, testing

FLAGS = ("--held_out=held,other", "--train_shards=2", "--names=2", "--workers=1")


def run(tmp_path, source, *flags, output="out"):
  return testing.run_app(
    f"--package={source}", f"--output={tmp_path / output}", *FLAGS, *flags, app=icons
  )


def shards_of(folder):
  return {file.name: file.read_bytes() for file in folder.rglob("*.tfrecord")}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  tmp_path = tmp_path_factory.mktemp("icons")
  source = icon_testing.write_folder(tmp_path / "package", icon_testing.package())
  done = run(tmp_path, source)
  assert done.returncode == 0, done.stderr
  return tmp_path, json.loads(done.stdout)


def test_splits_texts_and_skips(converted):
  tmp_path, summary = converted
  assert summary["examples"] == {
    "train": {"train": 7}, "heldout": {"held": 3, "other": 1}, "naming": {"naming": 3}
  }  # fmt: skip
  train = testing.read_rows(tmp_path / "out" / "train")
  assert train["one:square-outline"]["txt"] == [b"square", b"box"]
  assert train["one:square-outline"]["description"] == [b"outline icon of square"]
  assert train["two:home"]["description"] == [b"icon of home"]
  assert train["one:corner-16-outline"]["style"] == [b"outline"]
  image = Image.open(io.BytesIO(train["two:home"]["jpg"][0]))
  assert image.size == (32, 32) and np.asarray(image).min() == 0
  assert testing.skipped(tmp_path / "out" / "train") == {
    "one:corner-outline": "other size or variant",
    "two:24": "name without a word",
    "two:empty-icon": "blank",
    "two:entity": "unsupported XML",
    "two:external": "unsupported element image",
    "two:huge-icon": "invalid size",
    "two:many": "too many elements",
    "two:old-icon": "removed from its set",
    "two:recursion": "circular reference",
    "two:spinning": "animated",
    "two:wide-icon": "elongated",
  }
  assert testing.skipped(tmp_path / "out" / "heldout") == {"held:square": "copy of a training icon"}
  assert summary["skipped"]["heldout"] == {"copy of a training icon": 1}
  naming = testing.read_rows(tmp_path / "out" / "naming", "naming")
  assert {key: row["label"] for key, row in naming.items()} == {
    "held:bar": [b"bar"], "held:home": [b"home"], "other:bar": [b"bar"]
  }  # fmt: skip
  assert json.loads((tmp_path / "out" / "names.json").read_text()) == {
    "bar": ["bar"], "home": ["home"]
  }  # fmt: skip


def test_licence_table(converted):
  lines = (converted[0] / "out" / "licences.md").read_text().splitlines()
  assert lines[0] == "| set | title | author | licence | source | train | heldout |"
  assert lines[2] == "| held | Held | A / B | MIT | https://example.com/mit | 0 | 3 |"
  assert lines[3] == "| one | One | A / B | MIT | https://example.com/mit | 5 | 0 |"
  assert converted[1]["other licences"] == {"All rights reserved": {"sets": 1, "icons": 1}}


def test_the_baseline_finds_pixels_of_the_same_name(converted):
  results = converted[1]["nearest-pixel baseline"]
  assert results.keys() == {"heldout", "held", "other", "naming"}
  assert results["other"][0]["value"] == 1  # the only candidate
  square = lambda rows: {
    "jpg": [testing.jpeg(rows, format="PNG")], "txt": [f"name {rows}".encode()], "key": [b"s:n"]
  }  # fmt: skip
  icons_of = lambda numbers: icon_copies.small_icons(map(square, numbers))
  perfect = icon_baseline.text_to_image(icons_of(range(8)), icons_of(range(8)))
  assert [result.value for result in perfect] == [1, 1, 1] and perfect[0].count == 8
  chance = icon_baseline.text_to_image(icons_of(range(8)), icons_of(range(20, 25)))
  assert [result.value for result in chance] == pytest.approx([1 / 8, 5 / 8, 1])
  naming = icon_baseline.naming(icons_of(range(8)), icons_of(range(6, 12)), ["name 6", "name 7"])
  assert naming.value == 1 and naming.count == 2


def test_the_same_files_from_an_archive_with_more_processes_and_after_an_interruption(converted):
  tmp_path, summary = converted
  archive = icon_testing.write_archive(tmp_path / "a.tgz", icon_testing.package())
  done = run(tmp_path, archive, "--workers=2", output="again")
  assert done.returncode == 0 and json.loads(done.stdout) == summary
  # As after an interruption: one shard and everything that follows are missing.
  train = tmp_path / "again" / "train"
  files = shards_of(tmp_path / "out")
  assert files == {
    file.name: file.read_bytes() for file in (tmp_path / "again").rglob("*.tfrecord")
  }
  (tmp_path / "again" / "summary.json").write_text("{")
  for file in [
    *(tmp_path / "again" / "heldout").glob("*"),
    train / "train-00001-of-00002.tfrecord",
  ]:
    file.unlink()
  done = run(tmp_path, archive, "--overwrite", output="again")
  assert done.returncode == 0 and json.loads(done.stdout) == summary
  assert files == {
    file.name: file.read_bytes() for file in (tmp_path / "again").rglob("*.tfrecord")
  }
  before = (train / "dataset.json").stat().st_mtime_ns
  assert run(tmp_path, archive, output="again").stdout == done.stdout
  assert (train / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--held_out=held,none"], "--held_out=none is not among the 4 sets"),
    (["--held_out=one,two,held,other"], "names 4 of 4 sets"),
    (["--held_out="], "names 0 of 4 sets"),
    (["--image_size=4"], "image_size"),
    (["--package=nowhere"], "nowhere: expected the folder or .tgz archive"),
  ],
)
def test_mistakes_are_one_line(converted, flags, message):
  done = run(converted[0], converted[0] / "package", *flags, output="wrong")
  assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
  npm = testing.write(tmp_path / "bin" / "npm", "#!/bin/sh\necho 'npm error 404' >&2\nexit 1\n")
  npm.chmod(0o755)
  monkeypatch.setenv("PATH", str(npm.parent))
  done = testing.run_app(f"--output={tmp_path / 'out'}", app=icons)
  assert done.returncode == 2 and "npm view failed with exit code 1: npm error 404" in done.stderr
  npm.write_text("#!/bin/sh\necho 99999999999\n")
  done = testing.run_app(f"--output={tmp_path / 'out'}", app=icons)
  assert done.returncode == 2 and "unpacked size of '99999999999' bytes" in done.stderr
  assert not (tmp_path / "out").exists()
