"""Write data sets: sharded TFRecords with their indexes, and a manifest when all is complete.

    train-00000-of-00002.tfrecord    train-00000-of-00002.tfrecord.ovidx
    train-00001-of-00002.tfrecord    train-00001-of-00002.tfrecord.ovidx
    skipped.jsonl                    one line for each input that was left out, if any, and why
    dataset.json                     written last: a directory without it is incomplete

The content of a shard depends on its number and the recipe alone, so that shards are made in any
order by any number of processes, and an interrupted run resumes with those that are missing.
Directories are local. They are checked before any work, and locked while they are written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import google_crc32c

from ov_data import example, fs, index, outputs, processes, records, scenes, unfinished
from ov_data.manifest import FORMAT, MANIFEST, SKIPPED, sealed
from ov_data.record_source import Skip
from ov_data.shards import Shards
from ov_data.splits import Split

__all__ = ["MANIFEST", "SKIPPED", "Features", "MakeShard", "ShardWriter", "Skip", "Summary"]
__all__ += ["make_scenes_dataset", "shard_count", "shard_name", "write_dataset"]

_SCENES_IN_SHARD = 2500  # about 6 MB at 64 px
_MOST_WORKERS = 1024
_MOST_SCENES = 1_000_000_000
_REPORT_EVERY = 50  # examples

Features = Mapping[str, example.Writable]


# The examples of one shard: (split, number of the shard) -> features, or what was skipped.
MakeShard = Callable[[str, int], Iterable[Features | Skip]]


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a data set holds and what was left out."""

  directory: str
  examples: Mapping[str, int]  # by split
  skipped: Mapping[str, int]  # by reason
  fingerprints: Mapping[str, str]  # by split, as `sources.Dataset.fingerprint` gives them
  resumed: int  # shards that were there already
  damaged: tuple[str, ...] = ()  # finished shards that were written again since they had changed

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
      text += f"; {len(self.damaged):,} finished but damaged written again ({shown}{more})"
    return text


class ShardWriter:
  """One shard: appears whole, with its index, when the `with` block ends without an error.

  Raises:
    ValueError: the path is remote, a directory, or in a directory that does not exist.
    OSError: it cannot be written; names path, free space and remedy.
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
    """Append one example; strings are stored as UTF-8, lists as several values."""
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
      if kind is None:  # otherwise the first error counts
        raise
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.remove(self._part)
    if kind is None:
      found = index.load_index(self.path, verify=True)  # reads the shard back, stores the index
      if len(found) != self.examples:
        raise OSError(
          f"{self.path}: {self.examples} records were written and {len(found)} can be read back; "
          "the disk or the file system fails"
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
  """Write all shards that are not there yet, then the manifest.

  Args:
    directory: local; created if need be.
    shards: number of shards of each split. It should not depend on the machine.
    make_shard: yields the examples of a shard; a pure function of its arguments, picklable by
      reference (an object of a module-level class, for instance).
    recipe: JSON values that determine the data: what else `make_shard` depends on.
    workers: processes; None takes one for each core, 0 stays in this process.
    progress: gets the number of examples done since it was called last, skipped ones included.
    overwrite: replaces a data set of another recipe instead of refusing.

  Raises:
    ValueError: the directory is remote, holds the data of another recipe or shards of unknown
      origin, is being written by another process, or could not be read as a data set; or workers is
      negative.
    OSError: it cannot be written; names path, free space and remedy.
  """
  if workers is not None and not 0 <= workers <= _MOST_WORKERS:
    raise ValueError(
      f"workers={workers}: expected 0 (this process alone) or a number of processes, at most "
      f"{_MOST_WORKERS:,}."
    )
  path = outputs.local_path(directory)
  outputs.check_readable(path, shards)
  # A data set is what the recipe says; whoever reads JSON back gets lists for tuples.
  wanted: dict[str, Any] = json.loads(json.dumps({**recipe, "shards": shards}))
  if content := unfinished.find_complete(path, wanted):
    if unfinished.has_leftovers(path) or (path / outputs.LOCK).exists():
      # The data set may be read-only by now.
      with contextlib.suppress(OSError, ValueError), outputs.locked(path):
        unfinished.tidy(path)
    return _summary(path, content)
  outputs.check_directory(path)
  with outputs.locked(path) as lock:
    unfinished.claim(path, wanted, overwrite)
    if content := unfinished.find_complete(path, wanted):  # by now, by another process
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
  """Shards of about `shard_bytes`, at least one."""
  return max(1, round(examples * bytes_each / shard_bytes))


@dataclasses.dataclass(frozen=True)
class _Job:
  """Writes one shard and logs it, in whatever process."""

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
  text = json.dumps(sealed(manifest), indent=1, ensure_ascii=False)
  _write_json(path / MANIFEST, text + "\n")
  unfinished.clear(path)
  return _summary(path, manifest)


def _facts(
  path: Path, split: str, names: list[str], logs: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
  """Return what the manifest records of a split.

  Raises:
    ValueError: the shards hold other numbers of records than were written.
  """
  counts = [logs[name]["examples"] for name in names]
  fingerprint = ""
  if sum(counts):
    shards = Shards([str(path)], Split(split))
    found = {fs.basename(i.path): len(i) for i in shards.indexes}
    if changed := [name for name, count in zip(names, counts) if found.get(name) != count]:
      raise ValueError(
        f"{path}: {', '.join(changed[:4])} changed while the data set was written; remove them and "
        "give the same command again"
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
  """Write JSON as UTF-8; lone surrogates, of file names for instance, become escapes of JSON."""
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


# The demo data.


@dataclasses.dataclass(frozen=True)
class _Scenes:
  sizes: dict[str, int]  # scenes of each split
  seed: int
  image_size: int
  num_objects: int | None
  label: scenes.ClassKind

  def __call__(self, split: str, number: int) -> Iterator[Features]:
    start = number * _SCENES_IN_SHARD
    for i in range(start, min(start + _SCENES_IN_SHARD, self.sizes[split])):
      scene = scenes.sample_scene(self.seed, i, cast(scenes.Split, split), self.num_objects)
      yield scenes.scene_example(scene, self.image_size, self.label)


def make_scenes_dataset(
  directory: str | os.PathLike[str],
  sizes: Mapping[str, int],
  *,
  seed: int = 0,
  image_size: int = 64,
  num_objects: int | None = None,
  label: scenes.ClassKind = "shape",
  workers: int | None = None,
  progress: Callable[[int], None] = lambda n: None,
  overwrite: bool = False,
) -> Summary:
  """Write the demo data set: scenes of `ov_data.scenes` with jpg, txt, description, alt, truth.

  Args:
    directory: see `write_dataset`, also for workers, progress, overwrite.
    sizes: number of scenes of each split, for instance {"train": 60_000, "heldout": 1_000}.
    seed: of all scenes.
    image_size: 32 to 256 px.
    num_objects: 1 or 2 for all scenes; None mixes them.
    label: the kind of class under `label`, in scenes that have it; see `scenes.class_prompts`.

  Raises:
    ValueError: an unknown split, class or size, no scenes, or a directory with other data; see also
      `write_dataset`.
  """
  if (
    not sizes
    or not set(sizes) <= set(scenes.SPLITS)
    or not all(1 <= size <= _MOST_SCENES for size in sizes.values())
  ):
    raise ValueError(
      f"sizes={dict(sizes)}: expected 1 to {_MOST_SCENES:,} of {', '.join(scenes.SPLITS)}."
    )
  for split in sizes:  # fails here, with one clear line, rather than in a worker
    scene = scenes.sample_scene(seed, 0, cast(scenes.Split, split), num_objects)
    scenes.scene_example(scene, image_size)
  scenes.class_prompts(label)
  job = _Scenes(dict(sizes), seed, image_size, num_objects, label)
  return write_dataset(
    directory,
    {split: -(-size // _SCENES_IN_SHARD) for split, size in sizes.items()},
    job,
    {"kind": "scenes", "version": 5, **dataclasses.asdict(job)},
    workers=workers,
    progress=progress,
    overwrite=overwrite,
  )
