import io
import os
from pathlib import Path
import tarfile

import pytest

from ov_data.layouts.tar_members import DAMAGE, Member, SkippedMember, read_members


def _tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
    for name, data in members.items():
      header = tarfile.TarInfo(name)
      header.size = len(data)
      tar.addfile(header, io.BytesIO(data))
  return buffer.getvalue()


def _read(tmp_path: Path, data: bytes) -> tuple[dict[str, bytes], list[SkippedMember]]:
  path = tmp_path / "a.tar"
  path.write_bytes(data)
  found = list(read_members(str(path)))
  members = {m.name: data[m.offset : m.offset + m.size] for m in found if isinstance(m, Member)}
  return members, [m for m in found if isinstance(m, SkippedMember)]


_TEN = {f"{i}.bin": bytes([i]) * (300 * i) for i in range(10)}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unusual_names(tmp_path: Path, format: int):
  names = ["a" * 90, "d/" * 40 + "b", "Käse", "caf\udce9.jpg"]
  if format != tarfile.USTAR_FORMAT:
    names.append("x" * 5000)
  members = {name: name.encode("utf-8", "surrogateescape") for name in names}
  assert _read(tmp_path, _tar(members, format)) == (members, [])


def test_sizes_in_base_256_and_in_pax_headers(tmp_path: Path):
  data = bytearray(_tar({"a": b"x" * 600, "b": b"y"}, tarfile.GNU_FORMAT))
  data[124:136] = b"\x80" + (600).to_bytes(11, "big")
  _fix_checksum(data, 0)
  assert _read(tmp_path, bytes(data)) == ({"a": b"x" * 600, "b": b"y"}, [])
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
    header = tarfile.TarInfo("a")
    header.size, header.pax_headers = 600, {"comment": "c", "size": "600"}
    tar.addfile(header, io.BytesIO(b"x" * 600))
  assert _read(tmp_path, buffer.getvalue()) == ({"a": b"x" * 600}, [])


def _fix_checksum(data: bytearray, at: int) -> None:
  data[at + 148 : at + 156] = b" " * 8
  data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


@pytest.mark.parametrize("number", range(10))
def test_one_damaged_header_loses_one_member(tmp_path: Path, number: int):
  data = bytearray(_tar(_TEN))
  at = data.index(f"{number}.bin".encode())
  data[at + 100] ^= 1  # the mode
  members, passed = _read(tmp_path, bytes(data))
  assert members == {name: value for name, value in _TEN.items() if name != f"{number}.bin"}
  assert [p.reason for p in passed] == [DAMAGE]
  assert f"damaged at byte {at:,}" in passed[0].detail


@pytest.mark.parametrize("change", [-400, -3, -1, 1, 2, 300, 1000])
@pytest.mark.parametrize("number", [3, 8])
def test_lost_and_inserted_bytes_affect_one_member(tmp_path: Path, change: int, number: int):
  data = _tar(_TEN)
  at = data.index(f"{number}.bin".encode()) + 512 + 100  # in the data
  data = data[: at - min(change, 0)][:at] + b"!" * max(change, 0) + data[at - min(change, 0) :]
  members, passed = _read(tmp_path, data)
  assert members.keys() == _TEN.keys()
  assert all(members[name] == _TEN[name] for name in _TEN if name != f"{number}.bin")
  assert [p.reason for p in passed] == [DAMAGE]


def test_members_of_a_tar_in_the_tar_are_not_invented(tmp_path: Path):
  members = {"a": b"1", "inner.tar": _tar({"x": b"2", "y": b"3"})[:2048], "b": b"4", "c": b"5"}
  data = bytearray(_tar(members))
  data[data.rindex(b"b" + bytes(99)) + 100] ^= 1
  found, passed = _read(tmp_path, bytes(data))
  assert found.keys() == {"a", "inner.tar", "c"} and len(passed) == 1


def test_bytes_in_front_of_an_archive(tmp_path: Path):
  members, passed = _read(tmp_path, b"HTTP/1.1 200 OK\r\n\r\n" + _tar(_TEN))
  assert members == _TEN and [p.reason for p in passed] == [DAMAGE]


def test_damage_in_an_archive_without_magic(tmp_path: Path):
  data = bytearray(_tar(_TEN, tarfile.USTAR_FORMAT))
  for name in _TEN:
    at = data.index(name.encode())
    data[at + 257 : at + 265] = bytes(8)
    _fix_checksum(data, at)
  data[data.index(b"3.bin") + 100] ^= 1
  members, passed = _read(tmp_path, bytes(data))
  assert members == {name: value for name, value in _TEN.items() if name != "3.bin"}
  assert len(passed) == 1


@pytest.mark.parametrize("size", [b"77777777777\0", b"00000010001\0", b"\xff" * 12])
def test_wrong_sizes_with_right_checksums(tmp_path: Path, size: bytes):
  """The size exceeds the file, reaches into other members, or is negative."""
  data = bytearray(_tar(_TEN))
  at = data.index(b"3.bin")
  data[at + 124 : at + 136] = size
  _fix_checksum(data, at)
  members, passed = _read(tmp_path, bytes(data))
  after = {f"{i}.bin" for i in range(10)} - {"3.bin", "4.bin", "5.bin", "6.bin"}
  assert after <= members.keys() and all(members[n] == _TEN[n] for n in after)
  assert len(passed) == 1 and passed[0].reason == DAMAGE


def test_concatenated_archives(tmp_path: Path):
  members, passed = _read(tmp_path, _tar({"a": b"1"}) + _tar({"b": b"2"}) + bytes(3 << 20))
  assert members == {"a": b"1", "b": b"2"} and not passed


@pytest.mark.parametrize("kept", [511, 512, 513, 1023, 1024, 1100, 2048, 3077])
def test_a_cut_is_reported_once(tmp_path: Path, kept: int):
  data = _tar({"a": b"x" * 100, "b": b"y" * 100, "c": b"z" * 100})[:kept]
  if kept < 612:  # no complete member
    with pytest.raises(ValueError, match="not a readable tar file"):
      _read(tmp_path, data)
    return
  members, passed = _read(tmp_path, data)
  complete = [name for name, end in zip("abc", (612, 1636, 2660)) if kept >= end]
  assert members == {name: b"xyz"["abc".index(name)].to_bytes() * 100 for name in complete}
  assert [p.reason for p in passed] == [DAMAGE]


def test_links_and_special_files(tmp_path: Path):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    first = tarfile.TarInfo("a")
    first.size = 3
    tar.addfile(first, io.BytesIO(b"abc"))
    for name, kind, target in [
      ("hard", tarfile.LNKTYPE, "a"),
      ("lost", tarfile.LNKTYPE, "nothing"),
      ("soft", tarfile.SYMTYPE, "/etc/passwd"),
      ("pipe", tarfile.FIFOTYPE, ""),
      ("device", tarfile.CHRTYPE, ""),
      ("folder", tarfile.DIRTYPE, ""),
    ]:
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, target
      tar.addfile(info)
  members, passed = _read(tmp_path, buffer.getvalue())
  assert members == {"a": b"abc", "hard": b"abc"}
  assert {p.name: p.reason for p in passed} == {
    "lost": "link to a missing member",
    "soft": "symbolic link in the tar",
    "pipe": "pipe in the tar",
    "device": "device in the tar",
  }


def test_a_gnu_tar_label_is_not_a_member(tmp_path: Path):
  (tmp_path / "d").mkdir()
  (tmp_path / "d/plain").write_bytes(b"plain")
  command = "tar --label=photos --listed-incremental=state -cf out.tar d"
  assert os.system(f"cd {tmp_path} && {command}") == 0
  assert _read(tmp_path, (tmp_path / "out.tar").read_bytes()) == ({"d/plain": b"plain"}, [])


@pytest.mark.parametrize(
  "form", ["gnu", "posix", "posix --sparse-version=0.0", "posix --sparse-version=0.1"]
)
def test_sparse_members_are_counted(tmp_path: Path, form: str):
  with open(tmp_path / "holes", "wb") as file:
    for i in range(30):  # more segments than a header can store
      file.seek(i << 20)
      file.write(b"x" * 4096)
  (tmp_path / "plain").write_bytes(b"plain")
  assert os.stat(tmp_path / "holes").st_blocks < 2000
  command = f"tar --sparse --format={form} -cf out.tar holes plain"
  assert os.system(f"cd {tmp_path} && {command}") == 0
  members, passed = _read(tmp_path, (tmp_path / "out.tar").read_bytes())
  assert members == {"plain": b"plain"}
  assert [(p.name, p.reason) for p in passed] == [("holes", "sparse file in the tar")]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "empty, 0 bytes"),
    (bytes(10240), "empty"),
    (b"<html>404</html>" * 100, "not a readable tar file"),
    (b"\x1f\x8b\x08" + bytes(600), "compressed with gzip; decompress it"),
    (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
    (b"PK\x03\x04" + bytes(600), "compressed with zip"),
  ],
)
def test_files_that_are_not_tars(tmp_path: Path, data: bytes, message: str):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, data)


def test_a_pipe_is_rejected(tmp_path: Path):
  os.mkfifo(tmp_path / "a.tar")
  with pytest.raises(ValueError, match="not a regular file"):
    list(read_members(str(tmp_path / "a.tar")))
