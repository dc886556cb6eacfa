"""Atomic, checksummed tokenizer folders.

Each JSON file that describes the tokenizer is sealed: it contains the SHA-256 of its content. A new
folder is written under a temporary name and renamed. In an existing folder, the files that mark it
as complete are removed first and written last, so an interrupted save is detected.
"""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any
import uuid

from ov_data import fs, outputs, tokenizer_json

_SEAL = "sha256"
_SEAL_VALUE = re.compile(rb'("sha256": ")([0-9a-f]{64})"')
_ZEROS = b"0" * 64
FORMAT = 2  # 1: without a seal
_MAX_GOLDEN = 100


def seal(content: Mapping[str, Any]) -> bytes:
  """Return a JSON file with the SHA-256 of its content, computed with zeros for the digest."""
  sealed = {"format": FORMAT, _SEAL: _ZEROS.decode(), **content}
  data = json.dumps(sealed, ensure_ascii=False, indent=1).encode() + b"\n"
  return data.replace(_ZEROS, hashlib.sha256(data).hexdigest().encode(), 1)


def read_sealed(file: pathlib.Path) -> dict[str, Any]:
  """Return the content of a sealed file, or of a file of format 1, which may have no seal.

  Raises:
    ValueError: if the file was modified after it was written, or has another format.
    FileNotFoundError: if there is no regular file of that name.
  """
  data = fs.read_regular(os.fspath(file), tokenizer_json.MAX_BYTES)
  try:
    content = tokenizer_json.load_object(data)
  except ValueError as error:
    raise ValueError(f"{file} is damaged: {error}.") from None
  version = content.get("format", 1)
  if type(version) is not int or version < 1:
    raise ValueError(f"{file} is damaged: its format is {str(version)[:40]!r}.")
  if version > FORMAT:
    raise ValueError(
      f"{file} has format {version}, but this version of ov_data supports formats up to {FORMAT}; "
      "use the version that wrote the file."
    )
  if version > 1 or _SEAL in content:
    found = _SEAL_VALUE.search(data)
    plain = data[: found.start(2)] + _ZEROS + data[found.end(2) :] if found else data
    if not found or hashlib.sha256(plain).hexdigest().encode() != found[2]:
      raise ValueError(
        f"{file} is damaged: it was modified after it was written. Copy the folder from its run "
        "again."
      )
  return content


def golden(entries: object) -> list[tuple[str, list[int]]]:
  """Return texts and their ids from the entries of a file; raise ValueError if malformed."""
  if not isinstance(entries, list) or len(entries) > _MAX_GOLDEN:
    raise ValueError(f"expected a list of at most {_MAX_GOLDEN} texts with ids")
  pairs = []
  for entry in entries:
    text, ids = (entry["text"], entry["ids"]) if isinstance(entry, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(ids, list):
      raise ValueError("expected a text and a list of ids in each entry")
    pairs.append((text, ids))
  return pairs


def sha256(data: bytes) -> str:
  """Return the SHA-256 of the bytes as hex digits."""
  return hashlib.sha256(data).hexdigest()


def write(folder: pathlib.Path, files: Mapping[str, bytes], marks: Sequence[str]) -> None:
  """Write files to a folder and keep its other files.

  Args:
    folder: folder to write to; created with its parents if needed.
    files: content by name, in the order of writing; `marks` must be last.
    marks: all names that can mark the folder as complete, the most important first. They are
      removed in this order before another file is replaced.
  """
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
    new.mkdir()
    try:
      for name, data in files.items():
        _write(new / name, data)
      new.rename(folder)
    except BaseException:
      shutil.rmtree(new, ignore_errors=True)
      raise
    return
  changed = {name: data for name, data in files.items() if not _holds(folder / name, data)}
  if any(name not in marks for name in changed):
    changed = dict(files)
    for mark in marks:
      (folder / mark).unlink(missing_ok=True)
  for name, data in changed.items():
    _write(folder / f".{name}.partial", data)
    (folder / f".{name}.partial").replace(folder / name)


def check_local(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Return a folder to write to; raise ValueError if it is remote."""
  return outputs.local_path(folder)


def _remove_unfinished(folder: pathlib.Path) -> None:
  """Remove temporary folders of interrupted saves."""
  name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}\.partial")
  for path in folder.parent.iterdir():
    if name.fullmatch(path.name) and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)


def _holds(file: pathlib.Path, data: bytes) -> bool:
  with contextlib.suppress(OSError):
    return file.is_file() and file.stat().st_size == len(data) and file.read_bytes() == data
  return False


def _write(file: pathlib.Path, data: bytes) -> None:
  """Write a new file without following links, and sync it to disk."""
  file.unlink(missing_ok=True)
  with fs.writing(str(file)), open(file, "xb") as stream:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())
