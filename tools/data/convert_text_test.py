"""Converter: invalid UTF-8, unusual JSON, and labels."""

import json
import os
from pathlib import Path

import pytest

from ov_data import layouts
from tools.data.testing import convert_listing, jpeg, lines, read_rows, run_app, skipped, tar, write

_LATIN_1 = "caf\udce9"  # b"caf\xe9" decoded with surrogateescape


def _latin_1(path: Path, data: bytes) -> None:
  os.makedirs(path.parent, exist_ok=True)
  with open(os.fsencode(path), "wb") as file:
    file.write(data)


def test_a_lone_surrogate_is_repaired_and_counted(tmp_path: Path):
  for i in range(3):
    write(tmp_path / f"in/{i}.jpg", jpeg(i))
  captions = ["fine", "cut \ud83d", "fine"]
  listed = ({"file": f"{i}.jpg", "captions": [c]} for i, c in enumerate(captions))
  write(tmp_path / "in/captions.jsonl", lines(*listed))
  done = run_app(f"--input={tmp_path}/in", f"--output={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert "1 captions repaired" in done.stderr and "the first: 1.jpg" in done.stderr
  texts = {key: row["txt"] for key, row in read_rows(tmp_path / "out").items()}
  assert texts == {"0.jpg": [b"fine"], "1.jpg": ["cut \ufffd".encode()], "2.jpg": [b"fine"]}


def test_surrogates_in_tars(tmp_path: Path):
  source = tar(
    tmp_path / "a.tar",
    {
      "0.jpg": jpeg(1), "0.json": '{"caption": "cut \\ud83d"}',
      "1.jpg": jpeg(2), "1.txt": "caf\u00e9".encode("latin-1"),
      "2.jpg": jpeg(3), "2.cls": "caf\u00e9".encode("latin-1"),
      f"{_LATIN_1}.jpg": jpeg(4), f"{_LATIN_1}.txt": "x",
    },
  )  # fmt: skip
  convert_listing(layouts.read(str(source)), tmp_path / "out")
  rows = read_rows(tmp_path / "out")
  assert {key: row.get("txt") for key, row in rows.items()} == {
    "a.tar/0": ["cut \ufffd".encode()],
    "a.tar/1": ["caf\ufffd".encode()],
    "a.tar/2": None,
    f"a.tar/{_LATIN_1}": [b"x"],
  }
  assert rows["a.tar/2"]["label"] == [b"caf\\xe9"]


def test_a_latin_1_name_is_read_kept_as_key_and_reported_when_skipped(tmp_path: Path):
  _latin_1(tmp_path / f"in/dog/{_LATIN_1}.jpg", jpeg(1))
  _latin_1(tmp_path / f"in/{_LATIN_1}/broken{_LATIN_1}.jpg", b"broken")
  done = run_app(f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--workers=2")
  assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
  [row] = read_rows(tmp_path / "out").values()
  assert row["key"] == [b"dog/caf\xe9.jpg"] and row["jpg"] == [jpeg(1)]
  assert skipped(tmp_path / "out") == {"caf\\xe9/brokencaf\\xe9.jpg": "unknown format"}
  assert (tmp_path / "out/classes.txt").read_text() == "caf\\xe9\ndog\n"


def test_output_survives_a_terminal_without_unicode(tmp_path: Path, monkeypatch):
  _latin_1(tmp_path / f"in/犬/{_LATIN_1}.jpg", jpeg(1))
  monkeypatch.setenv("PYTHONIOENCODING", "ascii")
  done = run_app(f"--input={tmp_path}/in", f"--output={tmp_path}/犬")
  assert done.returncode == 0 and "1 train examples" in done.stdout, done.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_lists_in_any_role(tmp_path: Path, as_json: bool):
  """Invalid bytes in a list are preserved in names and repaired in captions and labels."""
  _latin_1(tmp_path / f"in/{_LATIN_1}.jpg", jpeg(1))
  if as_json:
    row = b'{"file_name": "caf\xe9.jpg", "text": "caf\xe9", "label": "caf\xe9", "caf\xe9": 1}'
    write(tmp_path / "in/metadata.jsonl", b"\xef\xbb\xbf" + row)
  else:
    text = b"file_name,text,label\r\ncaf\xe9.jpg,caf\xe9,caf\xe9\r\n"
    write(tmp_path / "in/metadata.csv", b"\xef\xbb\xbf" + text)
  convert_listing(layouts.read(str(tmp_path / "in")), tmp_path / "out")
  [row] = read_rows(tmp_path / "out").values()
  assert row["key"] == [b"caf\xe9.jpg"] and row["label"] == [b"caf\\xe9"]
  assert row["txt"] == ["caf\ufffd".encode()]


def test_invalid_file_names_are_counted(tmp_path: Path):
  write(tmp_path / "in/a.jpg", jpeg(1))
  names = ["a.jpg", "b\0.jpg", "c\ud83d.jpg", "d" * 5000 + ".jpg", "a.jpg/e.jpg"]
  write(tmp_path / "in/captions.jsonl", lines(*({"file": n, "caption": "x\0y"} for n in names)))
  convert_listing(layouts.read(str(tmp_path / "in")), tmp_path / "out")
  assert read_rows(tmp_path / "out")["a.jpg"]["txt"] == ["x\ufffdy".encode()]
  assert sorted(skipped(tmp_path / "out").values()) == [
    "name that no file can have",
    "name with a NUL character",
    "unreadable file",
    "unreadable file",
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("[" * 100_000, "nested too deeply"),
    ('{"file": "a.jpg", "label": 1.5}', "expected .label.*found 1.5"),
    ('{"file": "a.jpg", "label": true}', "expected .label.*found True"),
    ('{"file": "a.jpg", "label": NaN}', "expected .label.*found nan"),
    ('{"file": ["a.jpg"], "label": "x"}', "expected .file.*found"),
    ('{"file": "a.jpg", "captions": {"en": "x"}}', "expected .captions"),
    ('{"file": "a.jpg", "caption": "x", "n": ' + "1" * 5000 + "}", "not JSON .*4300 digits"),
    ('{"file": "a.jpg", "file_name": "x"}', "expected .captions. or .label."),
    ('{"file_name": "a.jpg", "text": "x"}', "use format imagefolder"),
  ],
)  # fmt: skip
def test_unusual_json_names_file_and_line(tmp_path: Path, line: str, message: str):
  path = write(tmp_path / "captions.jsonl", '{"file": "a.jpg", "caption": "x"}\n' + line)
  with pytest.raises(ValueError, match=f"captions.jsonl, line 2: .*{message}") as raised:
    layouts.read(str(path))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [[1], {"a": 1}, 1.5, True, None, float("nan"), float("inf")])
def test_ids_of_wrong_type(tmp_path: Path, value: object):
  good = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
  for content, where in (
    ({**good, "images": [*good["images"], {"id": value, "file_name": "b.jpg"}]}, "images.1. "),
    ({**good, "annotations": [{"image_id": value, "caption": "x"}]}, "annotations.0. "),
  ):
    path = write(tmp_path / "c.json", json.dumps(content))
    with pytest.raises(ValueError, match=rf"c.json: {where}has the .*expected an integer or a str"):
      layouts.read(str(path), images=str(tmp_path))


def test_repeated_ids_and_names_of_coco(tmp_path: Path):
  write(tmp_path / "a.jpg", jpeg(1))
  content = {
    "images": [
      {"id": 1, "file_name": "a.jpg"},
      {"id": 2, "file_name": "./a.jpg"},
      {"id": 1, "file_name": "b.jpg"},
    ],
    "annotations": [{"image_id": i, "caption": f"c{i}"} for i in (1, 2)],
  }
  path = write(tmp_path / "c.json", json.dumps(content))
  found = layouts.read(str(path), images=str(tmp_path))
  assert [(item.key, item.captions) for item in found.items] == [("a.jpg", ("c1", "c2"))]
  assert [(s.key, s.reason) for s in found.skips] == [("b.jpg", "repeated image id")]


def test_labels_are_normalized_and_numbered_by_line(tmp_path: Path):
  labels = ["dress", "dress ", "hat", "", "a\nb", 7, " \u2028", "x\x85y"]
  for i in range(len(labels)):
    write(tmp_path / f"in/{i}.jpg", jpeg(i))
  listed = ({"file": f"{i}.jpg", "label": label} for i, label in enumerate(labels))
  write(tmp_path / "in/labels.jsonl", lines(*listed))
  done = run_app(f"--input={tmp_path}/in", f"--output={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  classes = (tmp_path / "out/classes.txt").read_text().splitlines()
  assert classes == ["7", "a b", "dress", "hat", "x y"]
  rows = read_rows(tmp_path / "out")
  assert {key: row["label"][0].decode() for key, row in rows.items()} == {
    "0.jpg": "dress", "1.jpg": "dress", "2.jpg": "hat", "4.jpg": "a b", "5.jpg": "7",
    "7.jpg": "x y",
  }  # fmt: skip
  for row in rows.values():
    assert classes[int(row["label_id"][0])] == row["label"][0].decode()
  assert skipped(tmp_path / "out") == {"3.jpg": "empty label", "6.jpg": "empty label"}
