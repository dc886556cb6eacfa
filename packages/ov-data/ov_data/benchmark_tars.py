"""Record source over a split in the webdataset layout of CLIP_benchmark.

    test/nshards.txt    number of tars
    test/0.tar          s0000000.webp, s0000000.cls, ...
    test/1.tar

A sample has an image and a label (.cls), several labels or metadata (.npy), or captions (.txt, one
per line). A benchmark must be complete, so a missing or damaged tar is an error.
"""

from collections.abc import Collection, Iterator, Mapping
import functools
import hashlib
import io
import os

import numpy as np
from numpy.typing import NDArray

from ov_data import fs
from ov_data.example import Feature, FeatureError
from ov_data.layouts import text_rules
from ov_data.layouts.items import Blob, read_blob
from ov_data.layouts.tar_members import Member, SkippedMember, printable_name, read_members
from ov_data.record_source import Record, RecordSource
from ov_data.records import MAX_RECORD_BYTES
from ov_data.request import Request

COUNT_FILE = "nshards.txt"
_IMAGES = ("webp", "png", "jpg", "jpeg")  # in order of preference
_LABEL, _ARRAY, _CAPTIONS = "cls", "npy", "txt"
_MAX_SHARDS = 1_000_000
_MAX_VALUE_BYTES = 1 << 20  # of a member that is not an image


def open_benchmark_tars(request: Request) -> RecordSource | None:
  """Open the folder of a split, or of its splits; return None for a path of another format.

  Raises:
    ValueError: if a tar is missing or damaged, or a sample has no image.
    OSError: if a file cannot be read.
  """
  path, split = request.path, request.split
  if path is None or request.source.format != "auto" or fs.is_remote(path) or not fs.is_dir(path):
    return None
  for folder in [fs.join(path, split.name or "test")] + ([] if split.name else [path]):
    if fs.exists(fs.join(folder, COUNT_FILE)):
      return BenchmarkTars(request, folder)
  return None


class BenchmarkTars(RecordSource):
  """Samples of the tars of one split, in stored order.

  Features: the image under the image key, "key", "label" (.cls), "npy" (an array of numbers), and
  the lines of .txt under each of the caption keys.

  Args:
    request: request with the feature keys and slices.
    folder: folder of the split.
  """

  def __init__(self, request: Request, folder: str):
    self._source = request.source
    self._folder = folder
    count = _shard_count(fs.join(folder, COUNT_FILE))
    samples = [
      (shard, key, members)
      for shard in range(count)
      for key, members in _samples(fs.join(folder, f"{shard}.tar"), folder, shard).items()
    ]
    self._samples = [samples[i] for i in request.split.range(len(samples))]

  def __len__(self) -> int:
    return len(self._samples)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Return 16 hex digits of the names, sizes and positions of the members."""
    digest = hashlib.sha256()
    for shard, key, members in self._samples:
      rows = sorted((name, m.offset, m.size) for name, m in members.items())
      digest.update(repr((shard, key, rows)).encode())
    return digest.hexdigest()[:16]

  def locate(self, record: int) -> tuple[str, int]:
    """Return the tar of a sample and the offset of its image."""
    shard, _, members = self._samples[record]
    return fs.join(self._folder, f"{shard}.tar"), members[_image_of(members)].offset

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a sample; see `RecordSource.read`."""
    shard, key, members = self._samples[record]
    source = self._source
    wanted = lambda name: keys is None or name in keys
    features: dict[str, Feature] = {"key": [os.fsencode(f"{shard}/{key}")]} if wanted("key") else {}
    if wanted(source.image_key):
      features[source.image_key] = [
        self._bytes(shard, members[_image_of(members)], MAX_RECORD_BYTES)
      ]
    if _LABEL in members and wanted("label"):
      features["label"] = _label(self._bytes(shard, members[_LABEL], _MAX_VALUE_BYTES))
    if _ARRAY in members and wanted(_ARRAY):
      features[_ARRAY] = _array(self._bytes(shard, members[_ARRAY], _MAX_VALUE_BYTES))
    captions = [name for name in source.caption_keys if wanted(name)]
    if _CAPTIONS in members and captions:
      text = text_rules.decode(self._bytes(shard, members[_CAPTIONS], _MAX_VALUE_BYTES))
      lines = [line.encode("utf-8", "replace") for line in text.splitlines()]
      features |= dict.fromkeys(captions, lines)
    return Record.of(features, source.image_key)

  def _bytes(self, shard: int, member: Member, limit: int) -> bytes:
    if member.size > limit:
      raise FeatureError(f"member of {member.size:,} bytes, at most {limit:,}")
    return read_blob(Blob(self._folder, f"{shard}.tar", member.offset, member.size), limit, True)


def _shard_count(path: str) -> int:
  text = fs.read_regular(path, 1 << 10).decode("ascii", "replace").strip()
  if not text.isdigit() or not 1 <= int(text) <= _MAX_SHARDS:
    raise ValueError(
      f"{path} contains {text[:40]!r}; expected the number of tars, from 1 to {_MAX_SHARDS:,}"
    )
  return int(text)


def _samples(path: str, folder: str, shard: int) -> Mapping[str, dict[str, Member]]:
  """Return the members of each sample of a tar by lower-case suffix.

  Raises:
    ValueError: if the tar is missing or damaged, or a sample has no image.
  """
  if not os.path.exists(path):
    raise ValueError(
      f"{path}: the tar is missing, but {folder}/{COUNT_FILE} requires it; download it again"
    )
  samples: dict[str, dict[str, Member]] = {}
  for key, suffix, member in _members(path):
    samples.setdefault(key, {})[suffix] = member
  for key, members in samples.items():
    if not any(name in members for name in _IMAGES):
      raise ValueError(
        f"{path}: sample {printable_name(key)!r} has no image; expected one of "
        f"{', '.join(_IMAGES)}, found {', '.join(sorted(members))}"
      )
  return samples


def _members(path: str) -> Iterator[tuple[str, str, Member]]:
  """Yield key, lower-case suffix and member of each file of a tar."""
  for member in read_members(path):
    if isinstance(member, SkippedMember):
      raise ValueError(
        f"{path}: {member.reason} {member.detail}; a benchmark requires all samples: download the "
        "tar again"
      )
    directory, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if stem and dot:
      yield directory + slash + stem, suffix.lower(), member


def _image_of(members: Mapping[str, Member]) -> str:
  return next(name for name in _IMAGES if name in members)


def _label(data: bytes) -> NDArray[np.int64]:
  text = data.decode("ascii", "replace").strip()
  if not text.removeprefix("-").isdigit() or len(text) > 18:
    raise FeatureError("label that is not an integer")
  return np.array([int(text)], np.int64)


def _array(data: bytes) -> Feature:
  """Return the values of a .npy file as int64, or float32 if they are not integers."""
  try:
    values = np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise FeatureError(f"unreadable array ({type(error).__name__})") from None
  if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
    raise FeatureError("array that does not contain numbers")
  whole = values.dtype.kind != "f"
  return np.ravel(values).astype(np.int64 if whole else np.float32)
