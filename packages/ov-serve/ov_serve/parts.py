"""Parts of an unfinished index, and vectors of earlier runs that can be copied.

A part has the vectors, records and errors of a range of records. It is written atomically and
checked when it is read. Damaged files are moved to a folder damaged-N of the index, counted, and
computed again.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import io
import itertools
import logging
import pathlib
import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from ov_data import fs, output_lock
from ov_serve import index as files

log = logging.getLogger("ov_serve")

INDEX_FILES = ("vectors-*.npy", "records-*.jsonl", "errors-*.jsonl", "graph-*.usearch")
FOLDERS = "parts-*"
_MODEL = "model.txt"  # fingerprint of the model of a folder of parts
_POLL_SECONDS = 0.5


class Failure(msgspec.Struct):
  """One line of errors-*.jsonl."""

  location: str
  reason: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Part:
  """Result of a range of records.

  Attributes:
    vectors: unit vectors, float16 [N, E].
    records: N lines of records-*.jsonl.
    errors: lines of errors-*.jsonl.
  """

  vectors: NDArray[np.float16]
  records: bytes
  errors: bytes

  def entries(self) -> list[files.RecordEntry]:
    """Return the records."""
    return [msgspec.json.decode(line, type=files.RecordEntry) for line in self.records.splitlines()]


class Parts:
  """The parts of one recipe: everything that determines them, except the bytes of the images.

  Args:
    index: folder of the index.
    recipe: 16 hex digits.
    model: fingerprint of the model.
    dim: size of the vectors E.

  Attributes:
    folder: folder of the parts.
    damaged: number of damaged files that were set aside.
  """

  def __init__(self, index: pathlib.Path, recipe: str, model: str, dim: int):
    self._index, self._model, self._dim = index, model, dim
    self.folder = index / f"parts-{recipe}"
    self.damaged = 0

  def create(self) -> None:
    """Create the folder, and store its model for later runs."""
    fs.make_folder(str(self.folder))
    fs.write_atomic(str(self.folder / _MODEL), self._model.encode())

  def file(self, part: int) -> pathlib.Path:
    """Return the file of a part."""
    return self.folder / f"{part:06}.npz"

  def write(self, part: int, content: Part) -> None:
    """Write a part atomically."""
    buffer = io.BytesIO()
    np.savez(
      buffer,
      allow_pickle=False,
      vectors=content.vectors,
      records=np.frombuffer(content.records, np.uint8),
      errors=np.frombuffer(content.errors, np.uint8),
    )
    fs.write_atomic(str(self.file(part)), buffer.getvalue())

  def is_complete(self, part: int) -> bool:
    """Return whether a part exists and is intact; a damaged part is set aside."""
    return self._read(self.file(part)) is not None

  def known(self) -> dict[str, NDArray[np.float16]]:
    """Return the vectors of the same model in the index and in parts of other recipes, by hash.

    A damaged index or part is set aside.
    """
    known: dict[str, NDArray[np.float16]] = {}
    if (self._index / files.INDEX).exists():
      try:
        old = files.Index.open(self._index, verify=True)
        if old.info.model.fingerprint == self._model:
          known = {entry.hash: old.vectors[row] for row, entry in enumerate(old.records())}
      except ValueError as error:
        found = [file for pattern in INDEX_FILES for file in self._index.glob(pattern)]
        self._set_aside([self._index / files.INDEX, *found], error)
    for folder in sorted(self._index.glob(FOLDERS)):
      if folder != self.folder and _model_of(folder) == self._model:
        for file in sorted(folder.glob("*.npz")):
          if (part := self._read(file)) is not None:
            known |= zip((entry.hash for entry in part.entries()), part.vectors)
    return known

  def _read(self, file: pathlib.Path) -> Part | None:
    """Read a part; return None if it does not exist or is damaged."""
    try:
      return read(file, self._dim)
    except FileNotFoundError:
      return None
    except ValueError as error:
      self._set_aside([file], error)
      return None

  def _set_aside(self, damaged: Sequence[pathlib.Path], error: ValueError) -> None:
    folder = _new_folder(self._index)
    for file in damaged:
      with contextlib.suppress(FileNotFoundError):  # an index without this file
        file.rename(folder / file.name)
    self.damaged += 1
    log.warning("moved damaged files to %s, their images are embedded again: %s", folder, error)


def read(file: pathlib.Path, dim: int) -> Part:
  """Read and check a part with vectors of size `dim`.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if the file is damaged.
  """
  try:
    with np.load(file, allow_pickle=False) as arrays:
      part = Part(arrays["vectors"], arrays["records"].tobytes(), arrays["errors"].tobytes())
    found, expected = (part.vectors.dtype, part.vectors.shape), (len(part.entries()), dim)
    if found != (np.float16, expected):
      raise ValueError(f"it has {found[0]} {list(found[1])}, expected float16 {list(expected)}")
    reasons(part.errors)
  except OSError:
    raise
  except Exception as error:  # BadZipFile, EOFError, struct.error, ..., depending on the damage
    raise ValueError(f"{file} is damaged: {error}") from None
  return part


def reasons(errors: bytes) -> dict[str, int]:
  """Return the number of lines of errors-*.jsonl by reason."""
  counts: dict[str, int] = {}
  for line in errors.splitlines():
    reason = msgspec.json.decode(line, type=Failure).reason
    counts[reason] = counts.get(reason, 0) + 1
  return counts


def lines(values: Iterable[msgspec.Struct]) -> bytes:
  """Return one JSON object per line."""
  return b"".join(msgspec.json.encode(value) + b"\n" for value in values)


@contextlib.contextmanager
def locked(index: pathlib.Path) -> Iterator[None]:
  """Lock the folder of an index; wait while another process or host holds the lock."""
  with contextlib.ExitStack() as stack:
    for attempt in itertools.count():
      try:
        stack.enter_context(output_lock.locked(index))
        break
      except ValueError as error:
        if not attempt:
          log.warning("waiting: %s", error)
        time.sleep(_POLL_SECONDS)
    yield


def _model_of(folder: pathlib.Path) -> str:
  file = folder / _MODEL
  return file.read_text("utf-8", "replace") if file.exists() else ""


def _new_folder(index: pathlib.Path) -> pathlib.Path:
  """Create the folder damaged-N of the first free number."""
  for number in itertools.count(1):
    folder = index / f"damaged-{number}"
    with contextlib.suppress(FileExistsError):
      folder.mkdir()
      return folder
  raise AssertionError  # the numbers do not end
