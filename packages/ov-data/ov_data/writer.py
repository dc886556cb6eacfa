"""Resumable writer of sharded TFRecord data sets with indexes and a manifest.

    train-00000-of-00002.tfrecord    train-00000-of-00002.tfrecord.ovidx
    train-00001-of-00002.tfrecord    train-00001-of-00002.tfrecord.ovidx
    skipped.jsonl                    skipped inputs with reasons, if any
    dataset.json                     written last: a directory without it is incomplete

The content of a shard depends only on its number and the recipe. Shards can therefore be written in
any order by any number of processes, and an interrupted run resumes with the missing shards.
Directories must be local. They are validated before any work and locked while they are written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import google_crc32c

from ov_data import example, fs, index, outputs, processes, records, unfinished
from ov_data.manifest import FORMAT, MANIFEST, SKIPPED, add_checksum
from ov_data.record_source import Skip
from ov_data.request import Request, Source
from ov_data.shards import Shards
from ov_data.splits import Split

__all__ = ["MANIFEST", "SKIPPED", "Features", "MakeShard", "ShardWriter", "Skip", "Summary"]
__all__ += ["shard_count", "shard_name", "write_dataset"]

_MOST_WORKERS = 1024
_REPORT_EVERY = 50  # examples

Features = Mapping[str, example.Writable]


# (split, number of the shard) -> features or skips of the shard
MakeShard = Callable[[str, int], Iterable[Features | Skip]]


@dataclasses.dataclass(frozen=True)
class Summary:
  """Statistics of a written data set."""

  directory: str
  examples: Mapping[str, int]  # by split
  skipped: Mapping[str, int]  # by reason
  fingerprints: Mapping[str, str]  # by split, equal to `sources.Dataset.fingerprint`
  resumed: int  # number of reused shards
  damaged: tuple[str, ...] = ()  # finished shards that had changed and were written again

  def __str__(self) -> str:
    parts = [f"{n:,} {split}" for split, n in self.examples.items()]
    text = f"{fs.printable(self.directory)}: {', '.join(parts)} examples"
    if self.skipped:
      counts = sorted(self.skipped.items())
      reasons = ", ".join(f"{n:,} {fs.printable(reason)}" for reason, n in counts)
      text += f"; skipped {sum(self.skipped.values()):,} ({reasons}; listed in {SKIPPED})"
    if self.damaged:
      shown = ", ".join(map(fs.printable, self.damaged[:4]))
      more = " ..." if len(self.damaged) > 4 else ""
      text += f"; {len(self.damaged):,} damaged shards written again ({shown}{more})"
    return text


class ShardWriter:
  """Context manager that writes one shard atomically with its index.

  Raises:
    ValueError: if the path is remote, a directory, or in a directory that does not exist.
    OSError: if the shard cannot be written; the message has path, free space and remedy.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = str(outputs.check_file(path))
    self.examples = 0
    self.checksum = 0  # crc32c of all bytes
    self.kinds: dict[str, str] = {}  # feature -> "bytes", "int64" or "float"
    self._part = f"{self.path}.{os.getpid()}.part"

  def __enter__(self) -> "ShardWriter":
    with fs.writing(self.path):
      self._file: BinaryIO = open(self._part, "wb")
    return self

  def write(self, features: Features) -> None:
    """Append an example; see `example.serialise` for the supported values."""
    record = records.frame(example.serialise(features))
    with fs.writing(self.path):
      self._file.write(record)
    self.checksum = google_crc32c.extend(self.checksum, record)
    self.examples += 1
    for key, value in features.items():
      self.kinds.setdefault(key, _kind(value))

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      with fs.writing(self.path):
        self._file.close()
        if kind is None:
          os.replace(self._part, self.path)
    except OSError:
      if kind is None:  # do not hide an earlier error
        raise
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.remove(self._part)
    if kind is None:
      found = index.load_index(self.path, verify=True)  # verifies the shard, stores the index
      if len(found) != self.examples:
        raise OSError(
          f"{self.path}: {self.examples} records were written but {len(found)} can be read; "
          "the disk or file system has errors"
        )


def write_dataset(
  directory: str | os.PathLike[str],
  shards: Mapping[str, int],
  make_shard: MakeShard,
  recipe: Mapping[str, Any],
  *,
  workers: int | None = None,
  progress: Callable[[int], None] = lambda n: None,
  overwrite: bool = False,
) -> Summary:
  """Write all missing shards, then the manifest.

  Args:
    directory: local output directory, created if needed.
    shards: number of shards of each split. It should not depend on the machine.
    make_shard: function that yields the examples of a shard; pure and picklable by reference (for
      example an instance of a module-level class).
    recipe: JSON values that determine the data, including everything that `make_shard` depends on.
    workers: number of processes; None uses all cores, 0 runs in this process.
    progress: callback that receives the number of new examples, including skipped ones.
    overwrite: whether to replace a data set of another recipe.

  Raises:
    ValueError: if the directory is remote, contains data of another recipe or shards of unknown
      origin, is locked by another process, or would not be readable as a data set; or if `workers`
      is negative.
    OSError: if the data set cannot be written; the message has path, free space and remedy.
  """
  if workers is not None and not 0 <= workers <= _MOST_WORKERS:
    raise ValueError(
      f"workers={workers}: expected 0 (this process only) or a number of processes, at most "
      f"{_MOST_WORKERS:,}."
    )
  path = outputs.local_path(directory)
  outputs.check_readable(path, shards)
  # Normalize through JSON, which converts tuples to lists.
  wanted: dict[str, Any] = json.loads(json.dumps({**recipe, "shards": shards}))
  if content := unfinished.find_complete(path, wanted):
    if unfinished.has_temporary_files(path) or (path / outputs.LOCK).exists():
      # The data set may be read-only.
      with contextlib.suppress(OSError, ValueError), outputs.locked(path):
        unfinished.remove_temporary_files(path)
    return _summary(path, content)
  outputs.check_directory(path)
  with outputs.locked(path) as lock:
    unfinished.prepare_directory(path, wanted, overwrite)
    if content := unfinished.find_complete(path, wanted):  # another process may have finished it
      return _summary(path, content)
    names = {(s, i): shard_name(s, i, n) for s, n in shards.items() for i in range(n)}
    done, damaged = unfinished.read_logs(path, names.values(), wanted, progress)
    resumed = len(done)
    job = _Job(str(path), make_shard, names, wanted)
    missing = [shard for shard, name in names.items() if name not in done]
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    if len(missing) == 1:
      workers = 0
    for shard, log in processes.map_in_processes(job, missing, workers, progress, (lock,)):
      done[names[shard]] = log
    summary = _finish(path, wanted, names, done)
    return dataclasses.replace(summary, resumed=resumed, damaged=tuple(damaged))


def shard_name(split: str, number: int, count: int) -> str:
  return f"{split}-{number:05d}-of-{count:05d}.tfrecord"


def shard_count(examples: int, bytes_each: int, shard_bytes: int = 64 << 20) -> int:
  """Return the number of shards of about `shard_bytes`, at least 1."""
  return max(1, round(examples * bytes_each / shard_bytes))


@dataclasses.dataclass(frozen=True)
class _Job:
  """Picklable function that writes one shard and its log."""

  directory: str
  make_shard: MakeShard
  names: dict[tuple[str, int], str]
  recipe: dict[str, Any]

  def __call__(self, shard: tuple[str, int], report: processes.Report) -> dict[str, Any]:
    path = Path(self.directory)
    name = self.names[shard]
    skipped: list[dict[str, str]] = []
    with ShardWriter(path / name) as writer:
      for features in _reported(self.make_shard(*shard), report):
        if isinstance(features, Skip):
          skipped.append(dataclasses.asdict(features))
        else:
          writer.write(features)
    log = {
      "examples": writer.examples,
      "features": writer.kinds,
      "skipped": skipped,
      "checksum": writer.checksum,
    }
    unfinished.write_log(path, name, self.recipe, log)
    return log


def _reported(items: Iterable[Any], report: processes.Report) -> Iterator[Any]:
  count = 0
  for item in items:
    yield item
    count += 1
    if count == _REPORT_EVERY:
      report(count)
      count = 0
  report(count)


def _finish(
  path: Path,
  recipe: Mapping[str, Any],
  names: Mapping[tuple[str, int], str],
  logs: Mapping[str, dict[str, Any]],
) -> Summary:
  ordered = [(split, logs[name]) for (split, _), name in names.items()]
  features: dict[str, str] = {}
  for _, log in ordered:
    features |= log["features"]
  skipped = [skip for _, log in ordered for skip in log["skipped"]]
  if skipped:
    lines = [json.dumps(skip, ensure_ascii=False) + "\n" for skip in skipped]
    _write_json(path / SKIPPED, "".join(lines))
  manifest = {
    "format": FORMAT,
    "recipe": recipe,
    "features": dict(sorted(features.items())),
    "splits": {
      split: _facts(path, split, [name for (s, _), name in names.items() if s == split], logs)
      for split in recipe["shards"]
    },
    "skipped": dict(Counter(skip["reason"] for skip in skipped)),
  }
  text = json.dumps(add_checksum(manifest), indent=1, ensure_ascii=False)
  _write_json(path / MANIFEST, text + "\n")
  unfinished.clear(path)
  return _summary(path, manifest)


def _facts(
  path: Path, split: str, names: list[str], logs: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
  """Return the manifest entry of a split.

  Raises:
    ValueError: if the record counts of the shards differ from the written ones.
  """
  counts = [logs[name]["examples"] for name in names]
  fingerprint = ""
  if sum(counts):
    shards = Shards(Request(Source(str(path)), Split(split)))
    found = {fs.basename(i.path): len(i) for i in shards.indexes}
    if changed := [name for name, count in zip(names, counts) if found.get(name) != count]:
      raise ValueError(
        f"{path}: {', '.join(changed[:4])} changed while the data set was written; remove them and "
        "repeat the command"
      )
    fingerprint = shards.fingerprint
  return {
    "examples": sum(counts),
    "shards": len(names),
    "fingerprint": fingerprint,
    "records": counts,
    "bytes": [fs.size(str(path / name)) for name in names],
    "checksums": [logs[name]["checksum"] for name in names],
  }


def _write_json(path: Path, text: str) -> None:
  """Write JSON as UTF-8; lone surrogates, for example in file names, become JSON escapes."""
  fs.write_atomic(str(path), text.encode("utf-8", "backslashreplace"))


def _summary(path: Path, manifest: Mapping[str, Any]) -> Summary:
  splits = manifest["splits"]
  return Summary(
    str(path),
    {name: split["examples"] for name, split in splits.items()},
    manifest["skipped"],
    {name: split["fingerprint"] for name, split in splits.items()},
    resumed=sum(split["shards"] for split in splits.values()),
  )


def _kind(value: example.Writable) -> str:
  first = value if isinstance(value, bytes | str | int | float) else next(iter(value), b"")
  if isinstance(first, bytes | str):
    return "bytes"
  return "float" if isinstance(first, float) else "int64"
