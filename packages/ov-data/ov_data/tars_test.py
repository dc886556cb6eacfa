"""Tests of tars: which samples are found, damage, changed headers, and features."""

import gzip
import io
from pathlib import Path
import tarfile

import pytest

from ov_data import Dataset, Source
from ov_data.records import RecordError
from ov_data.testing.shards import write_tar

_FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))


def _tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
  with tarfile.open(path, "w", format=format) as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def _open(path: Path, **arguments) -> Dataset:
  return Dataset(Source(str(path), **arguments))


def _keys(dataset: Dataset) -> list[bytes]:
  return [dataset.read(n).texts["key"][0] for n in range(len(dataset))]


@pytest.mark.parametrize("format", _FORMATS)
def test_samples_of_every_tar_format(tmp_path, format):
  long = "d" * 60 + "/" + "n" * 90
  members = {
    "a.jpg": b"1" * 700, "a.txt": b"one", "x/b.JPG": b"2", "x/b.seg.png": b"mask",
    f"{long}.jpg": b"3" * 512, f"{long}.txt": b"three",
  }  # fmt: skip
  if format != "ustar":
    members["caf\xe9.jpg"] = b"4"
  found = _open(_tar(tmp_path / "a.tar", members, _FORMATS[format]))
  keys = [b"a", b"x/b", long.encode(), "caf\xe9".encode()]
  assert _keys(found) == keys[: 3 + (format != "ustar")]
  first, second = found.read(0), found.read(1)
  assert first.image == b"1" * 700 and first.texts["txt"] == [b"one"]
  assert second.image == b"2" and second.texts["seg.png"] == [b"mask"]
  assert found.read(2).texts["txt"] == [b"three"] and not found.skips


def test_members_that_are_no_samples_are_left_out(tmp_path):
  path = tmp_path / "a.tar"
  members = {"._a.jpg": b"x", "readme": b"x", "a.jpg": b"1", "._b.jpg": b"x", "a.txt": b"one"}
  _tar(path, members)
  with tarfile.open(path, "a") as tar:
    folder = tarfile.TarInfo("c")
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
    link = tarfile.TarInfo("c/1.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "../a.jpg"
    tar.addfile(link)
  found = _open(path)
  assert _keys(found) == [b"a"] and found.read(0).texts["txt"] == [b"one"]


def test_json_label_and_other_image_types(tmp_path):
  meta = b'{"caption": "a cat", "width": 640, "score": 0.5, "tags": ["a", "b"], "none": null}'
  path = _tar(tmp_path / "a.tar", {"1.webp": b"w", "1.json": meta, "1.cls": b"7\n", "2.png": b"p"})
  found = _open(path, caption_keys=("json/caption", "json/tags"))
  record = found.read(0)
  assert record.image == b"w" and record.texts["json/tags"] == [b"a", b"b"]
  assert record.texts["json/caption"] == [b"a cat"] and record.texts["json"] == [meta]
  assert record.labels["label"].tolist() == [7] and record.labels["json/width"].tolist() == [640]
  assert record.extra["json/score"].tolist() == [0.5] and "json/none" not in record.texts
  some = found.read(0, ["jpg", "json/caption"])
  assert some.texts.keys() == {"jpg", "json/caption"} and not some.labels and not some.extra
  assert found.read(1).image == b"p"
  assert _open(path, image_key="webp").read(0).image == b"w"
  found.check_keys(["label"])
  with pytest.raises(ValueError, match="feature 'text' is in none of .* they have cls, jpg, json"):
    _open(path, caption_keys=("text",)).check_keys()


@pytest.mark.parametrize(
  "meta", [b"[1]", b"{", b"[" * 100_000, b'{"a":"' + b"x" * (2 << 20) + b'"}']
)
def test_unusable_json_is_an_error_of_the_record(tmp_path, meta):
  found = _open(_tar(tmp_path / "a.tar", {"1.jpg": b"w", "1.json": meta}))
  with pytest.raises(ValueError, match="json is not an object"):
    found.read(0, ["json/caption"])
  assert found.read(0, ["jpg"]).image == b"w"


def test_damage_is_reported_with_its_location(tmp_path):
  path = tmp_path / "a.tar"
  write_tar(path, [{"jpg": bytes([n]) * 600, "txt": f"{n}"} for n in range(5)])
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    headers = [member.offset_data - 512 for member in tar.getmembers()]
  data[headers[4] + 150] ^= 1  # checksum of the header of the third image
  path.write_bytes(data)
  found = _open(path)
  assert [key for key in _keys(found) if key != b"00000002"] == [b"00000000", b"00000001",
    b"00000003", b"00000004"]  # fmt: skip
  (skip,) = found.skips
  assert skip.reason == "broken tar file" and f"at byte {headers[4]}" in skip.key


@pytest.mark.parametrize("kept", [1500, 3300])
def test_a_truncated_tar_keeps_its_complete_samples(tmp_path, kept):
  members = {f"{n}.{end}": b"x" * 300 for n in range(3) for end in ("jpg", "txt")}
  path = _tar(tmp_path / "a.tar", members, tarfile.USTAR_FORMAT)
  path.write_bytes(path.read_bytes()[:kept])
  found = _open(path)
  assert _keys(found) == [b"0", b"1"][: 1 + (kept > 2048)]
  assert [skip.reason for skip in found.skips] == ["broken tar file"]


def test_headers_that_changed_after_indexing_are_detected(tmp_path):
  path = tmp_path / "a.tar"
  content = b"x" * (64 << 10)
  members = {"0.jpg": content, "1.jpg": b"1", "1.txt": b"a", "2.jpg": content}
  _tar(path, members, tarfile.USTAR_FORMAT)
  assert _open(path).read(1).image == b"1"
  _tar(path, {**members, "1.txt": b"b"}, tarfile.USTAR_FORMAT)
  assert _open(path).read(1).texts["txt"] == [b"b"]  # only headers are verified
  renamed = {("3.txt" if name == "1.txt" else name): value for name, value in members.items()}
  _tar(path, renamed, tarfile.USTAR_FORMAT)  # same size and edges
  found = _open(path)
  with pytest.raises(RecordError, match="tar headers differ from the index"):
    found.read(1)
  assert found.locate(1) == (str(path), 512 + len(content))


def test_members_of_a_sample_that_are_apart_are_counted(tmp_path):
  path = _tar(tmp_path / "a.tar", {"0.jpg": b"0", "1.jpg": b"1", "0.txt": b"zero", "2.jpg": b"2"})
  found = _open(path)
  assert _keys(found) == [b"0", b"1", b"2"]
  assert [skip.reason for skip in found.skips] == ["members of a sample are apart"]


def test_concatenated_tars_are_read_to_the_end(tmp_path):
  parts = [_tar(tmp_path / f"{n}", {"0.jpg": b"%d" % n}).read_bytes() for n in range(2)]
  (tmp_path / "a.tar").write_bytes(b"".join(parts))
  found = _open(tmp_path / "a.tar")
  assert [found.read(n).image for n in range(len(found))] == [b"0", b"1"]


def test_files_that_are_no_uncompressed_tars_are_refused(tmp_path):
  path = _tar(tmp_path / "a.tar", {"0.jpg": b"0"})
  compressed = gzip.compress(path.read_bytes())
  (tmp_path / "b.tar.gz").write_bytes(compressed)
  with pytest.raises(ValueError, match="a compressed tar file.*; decompress it .gunzip"):
    _open(tmp_path / "b.tar.gz")
  (tmp_path / "b.tar").write_bytes(compressed)
  with pytest.raises(ValueError, match="1 of 2 shards have .*gzip-compressed shard.*Decompress"):
    _open(tmp_path / "*.tar")
  (tmp_path / "b.tar").write_bytes(b"<html>not found</html>")
  with pytest.raises(ValueError, match="not a readable tar file. Are they tar files"):
    _open(tmp_path / "b.tar")
  (tmp_path / "b.tar").write_bytes(bytes(10240))  # valid, without members
  assert len(_open(tmp_path / "*.tar")) == 1
  (tmp_path / "b.tar").unlink()
  with pytest.raises(ValueError, match="1 of 2 files are missing, .*1.tar is the first"):
    _tar(tmp_path / "0.tar", {"0.jpg": b"0"})
    _open(tmp_path / "{0..1}.tar")


def test_paths_of_tars(tmp_path):
  for number in range(3):
    _tar(tmp_path / f"part_{number:03d}.tar", {"0.jpg": b"%d" % number})
  (tmp_path / "part_000.parquet").write_bytes(b"statistics of img2dataset")
  (tmp_path / "part_000_stats.json").write_text("{}")
  for path in (tmp_path, tmp_path / "part_*.tar", tmp_path / "part_{000..002}.tar"):
    found = _open(path)
    assert [found.read(n).image for n in range(len(found))] == [b"0", b"1", b"2"]
  (tmp_path / "photos" / "cat").mkdir(parents=True)
  (tmp_path / "photos" / "dog").mkdir()
  (tmp_path / "photos" / "archive.tar").write_bytes(b"")
  for name in ("cat", "dog"):
    (tmp_path / "photos" / name / "1.jpg").write_bytes(b"x")
  assert _open(tmp_path / "photos").class_names == ("cat", "dog")
