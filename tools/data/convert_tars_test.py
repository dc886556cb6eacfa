"""Converter: tar members that are read or counted, and keys of records."""

import io
import json
import os
from pathlib import Path
import tarfile

import pytest

from ov_data import layouts
from tools.data.testing import convert_listing, jpeg, read_rows, run_app, skipped, tar, write


def test_webdataset(tmp_path: Path):
  tar(
    tmp_path / "data-000.tar",
    {
      "sub/0001.jpg": jpeg(1),
      "sub/0001.txt": "from text\n",
      "sub/0001.json": json.dumps({"caption": "not used"}),
      "sub/0002.png": jpeg(2, format="PNG"),
      "sub/0002.json": json.dumps({"caption": "from json", "url": "x"}),
      "0003.WEBP": jpeg(3, format="WEBP"),
      "0003.cls": "7",
      "0004.seg.jpg": jpeg(4),
      "0005.txt": "no image",
      "0006.jpg": jpeg(6),
      "0007.jpg": jpeg(7),
      "0007.json": "{broken",
      "0008.jpg": jpeg(8),
      "0008.txt": b"\xff\xff",
      "../escape.jpg": jpeg(9),
      "/absolute.jpg": jpeg(9),
    },
  )
  tar(tmp_path / "data-001.tar", {"0001.jpg": jpeg(11), "0001.txt": "second tar"})
  found = layouts.read(str(tmp_path))
  summary = convert_listing(found, tmp_path / "out")
  rows = read_rows(tmp_path / "out")
  assert {key: row.get("txt") for key, row in rows.items()} == {
    "data-000.tar/sub/0001": [b"from text"],
    "data-000.tar/sub/0002": [b"from json"],
    "data-000.tar/0003": None,
    "data-001.tar/0001": [b"second tar"],
  }
  assert rows["data-000.tar/0003"]["label"] == [b"7"]
  assert rows["data-000.tar/sub/0002"]["jpg"] == [jpeg(2, format="PNG")]
  assert summary.skipped == {
    "no image": 1,
    "dotted member name": 1,
    "no caption": 1,
    "unreadable caption": 2,
    "path outside the folder": 2,
  }


def test_webdataset_links_are_not_followed(tmp_path: Path):
  secret = write(tmp_path / "secret.jpg", jpeg(5))
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    link = tarfile.TarInfo("0001.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar.addfile(link)
    text = tarfile.TarInfo("0001.txt")
    text.size = 2
    tar.addfile(text, io.BytesIO(b"hi"))
  found = layouts.read(str(tmp_path / "a.tar"))
  assert not found.items
  assert [s.reason for s in found.skips] == ["symbolic link in the tar", "no image"]


@pytest.mark.parametrize("missing", [1024, 15_000, 15_360, 15_900])
def test_truncated_tar_keeps_complete_members(tmp_path: Path, missing: int):
  """Truncate inside an image, its padding, a header, and the end marker."""
  whole = tar(
    tmp_path / "whole.tar",
    {f"{i}.{s}": jpeg(i) if s == "jpg" else "text" for i in range(9) for s in ("txt", "jpg")},
  )
  cut = write(tmp_path / "cut/a.tar", whole.read_bytes()[:-missing].rstrip(b"\0"))
  found = layouts.read(str(cut))
  summary = convert_listing(found, tmp_path / "out")
  assert 0 < summary.examples["train"] <= 9
  assert summary.skipped["broken tar file"] == 1


def test_a_range_without_end_is_rejected(tmp_path: Path):
  with pytest.raises(ValueError, match="a range of 100,000,000,000 files; expected at most"):
    layouts.read(f"{tmp_path}/{{000..99999999999}}.tar")


def test_tar_ranges(tmp_path: Path):
  for i in (8, 9, 10):
    tar(tmp_path / f"d-{i:03d}.tar", {f"{i}.jpg": jpeg(i), f"{i}.txt": "x"})
  assert len(layouts.read(f"{tmp_path}/d-{{008..010}}.tar").items) == 3
  assert len(layouts.read(f"{tmp_path}/d-0*.tar").items) == 3
  with pytest.raises(ValueError, match=r"1 of 4 files are missing, .*d-011\.tar first"):
    layouts.read(f"{tmp_path}/d-{{008..011}}.tar")


def _texts(output: Path) -> dict[str, list[bytes]]:
  return {key: row.get("txt") for key, row in read_rows(output).items()}


def _converted(source: Path, output: Path) -> dict[str, list[bytes]]:
  convert_listing(layouts.read(str(source)), output)
  return _texts(output)


def test_concatenated_archives(tmp_path: Path):
  parts = [tar(tmp_path / f"p/{i}", {f"{i}.jpg": jpeg(i), f"{i}.txt": f"t{i}"}) for i in range(2)]
  same = tar(tmp_path / "p/2", {"0.jpg": jpeg(2), "0.txt": "again"})
  data = b"".join(part.read_bytes() for part in (*parts, same))
  source = write(tmp_path / "cat.tar", data)
  assert _converted(source, tmp_path / "out") == {
    "cat.tar/0": [b"t0"],
    "cat.tar/1": [b"t1"],
    "cat.tar/0 (archive 3)": [b"again"],
  }


def test_hard_links_of_gnu_tar(tmp_path: Path):
  for suffix, data in (("jpg", jpeg(1)), ("txt", "x")):
    write(tmp_path / f"in/0.{suffix}", data)
    os.link(tmp_path / f"in/0.{suffix}", tmp_path / f"in/1.{suffix}")
  assert os.system(f"tar --sort=name -cf {tmp_path}/a.tar -C {tmp_path}/in .") == 0
  assert _converted(tmp_path / "a.tar", tmp_path / "out") == {
    "a.tar/./0": [b"x"],
    "a.tar/./1": [b"x"],
  }
  assert read_rows(tmp_path / "out")["a.tar/./1"]["jpg"] == [jpeg(1)]


def test_repeated_names_are_counted(tmp_path: Path):
  members = [("0.jpg", jpeg(1)), ("0.txt", "first"), ("0.jpg", jpeg(2)), ("0.txt", "second")]
  source = tar(tmp_path / "a.tar", members)
  found = layouts.read(str(source))
  assert [(s.key, s.reason) for s in found.skips] == [
    ("a.tar/0.jpg", "repeated name in the tar"),
    ("a.tar/0.txt", "repeated name in the tar"),
  ]
  assert "at byte 0" in found.skips[0].detail
  assert _converted(source, tmp_path / "out") == {"a.tar/0": [b"second"]}
  assert read_rows(tmp_path / "out")["a.tar/0"]["jpg"] == [jpeg(2)]


def test_equal_names_in_several_folders(tmp_path: Path):
  for name in ("x/a/0.tar", "x/b/0.tar", "y/b/0.tar", "y/1.tar"):
    tar(tmp_path / name, {"0.jpg": jpeg(1), "0.txt": name})
  assert _converted(tmp_path, tmp_path / "out") == {
    "a/0.tar/0": [b"x/a/0.tar"],
    "x/b/0.tar/0": [b"x/b/0.tar"],
    "y/b/0.tar/0": [b"y/b/0.tar"],
    "1.tar/0": [b"y/1.tar"],
  }


def test_sources_of_captions_and_labels(tmp_path: Path):
  source = tar(
    tmp_path / "a.tar",
    {
      "0.jpg": jpeg(0), "0.txt": "", "0.json": '{"caption": "in the json"}',
      "1.jpg": jpeg(1), "1.cls": "",
      "2.jpg": jpeg(2), "2.cls": " 3\n", "2.json": '{"caption": null}',
      "3.jpg": jpeg(3), "3.txt": "text", "3.json": '{"captions": ["text", "other"]}',
      "4.JPG": jpeg(4), "4.TXT": "\ufeffwith a mark",
      "5.jpg": jpeg(5), "5.png": jpeg(5, format="PNG"), "5.txt": "two images",
      "6.jpg": jpeg(6), "6.json": '{"x": [' + "0.5," * 300_000 + '0.5], "caption": "long file"}',
      "7.jpg": jpeg(7), "7.txt": "!?", "7.npy": b"1",
      "8.jpg": jpeg(8), "8.cls": "a\nb", "8.txt": "x",
      "9.jpg": jpeg(9), "9.txt": "x", "9.json": "{broken",
    },
  )  # fmt: skip
  found = layouts.read(str(source))
  summary = convert_listing(found, tmp_path / "out")
  rows = read_rows(tmp_path / "out")
  assert {key[-1]: row.get("txt") for key, row in rows.items()} == {
    "0": [b"in the json"], "2": None, "3": [b"text"], "4": [b"with a mark"], "5": [b"two images"],
    "6": [b"long file"], "7": [b"!?"], "8": [b"x"], "9": [b"x"],
  }  # fmt: skip
  labels = {key[-1]: row["label"] for key, row in rows.items() if "label" in row}
  assert labels == {"2": [b"3"], "8": [b"a b"]}
  assert summary.skipped == {"empty label": 1, "another image under the same key": 1}
  assert rows["a.tar/5"]["jpg"] == [jpeg(5)]
  assert found.notes.counts == {
    "empty captions": 1,
    "captions in JSON not used next to a text file": 1,
    "members of other types not used": 1,
  }


def test_samples_that_cannot_be_used_are_counted_with_their_reason(tmp_path: Path):
  names = {
    "s0.input.jpg": "dotted member name",
    "1.tif": "unsupported image type",
    "2.txt": "no image",
    "4.jpg": "unreadable caption",
    "5.jpg": "caption too long",
    "6.jpg": "caption too long",
    "7.jpg": "unreadable caption",
  }
  contents: dict[str, bytes | str] = dict.fromkeys(names, jpeg(1))
  contents |= {
    "s0.output.txt": "x", "1.txt": "x", "4.json": "[" * 100_000, "5.txt": "é" * (1 << 20),
    "6.txt": "e" + "é" * (1 << 20), "7.json": '{"caption": [1, 2]}',
  }  # fmt: skip
  found = layouts.read(str(tar(tmp_path / "a.tar", contents)))
  assert not found.items
  reasons = {skip.key: skip.reason for skip in found.skips}
  assert reasons == {f"a.tar/{n.partition('.')[0]}": reason for n, reason in names.items()}
  assert "rename the members (s0.jpg, s0.txt)" in found.skips[0].detail


def test_one_damaged_header_loses_one_image(tmp_path: Path):
  members: dict[str, bytes | str] = {}
  for i in range(20):
    members |= {f"{i:02d}.jpg": jpeg(i), f"{i:02d}.txt": f"t{i}"}
  data = bytearray(tar(tmp_path / "whole.tar", members).read_bytes())
  data[data.index(b"03.jpg") + 20] ^= 255
  source = write(tmp_path / "a.tar", bytes(data))
  assert len(_converted(source, tmp_path / "out")) == 19
  assert skipped(tmp_path / "out") == {"a.tar": "broken tar file", "a.tar/03": "no image"}


def test_an_unreadable_tar_among_others_is_counted(tmp_path: Path):
  tar(tmp_path / "in/0.tar", {"0.jpg": jpeg(1), "0.txt": "x"})
  write(tmp_path / "in/1.tar", b"")
  write(tmp_path / "in/2.tar.gz", b"")
  assert _converted(tmp_path / "in", tmp_path / "out") == {"0.tar/0": [b"x"]}
  assert skipped(tmp_path / "out") == {"1.tar": "broken tar file", "2.tar.gz": "compressed tar"}


def test_compressed_tars_are_rejected(tmp_path: Path):
  with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
    pass
  write(tmp_path / "b.tar", (tmp_path / "a.tar.gz").read_bytes())
  for name in ("a.tar.gz", "b.tar"):
    done = run_app(f"--input={tmp_path}/{name}", f"--output={tmp_path}/out")
    assert done.returncode == 2 and "compressed" in done.stderr and "decompress" in done.stderr
    assert "Traceback" not in done.stderr


def test_statistics_of_downloads_are_counted(tmp_path: Path):
  tar(tmp_path / "00000.tar", {"0.jpg": jpeg(1), "0.txt": "x", "0.json": '{"caption": "x"}'})
  write(tmp_path / "00000_stats.json", '{"count": 10, "successes": 1}')
  write(tmp_path / "00000.parquet", b"")
  found = layouts.read(str(tmp_path))
  assert len(found.items) == 1 and found.notes.counts == {"failed downloads": 9}
