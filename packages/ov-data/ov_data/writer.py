"""Writes data sets: sharded TFRecords with their indexes, and a manifest when all is complete.

    train-00000-of-00002.tfrecord    train-00000-of-00002.tfrecord.ovidx
    train-00001-of-00002.tfrecord    train-00001-of-00002.tfrecord.ovidx
    skipped.jsonl                    one line for each input that was left out, if any, and why
    dataset.json                     written last: a directory without it is incomplete

The content of a shard depends on its number and the recipe alone, so that shards are made in any
order by any number of processes, and an interrupted run goes on with those that are missing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from types import TracebackType
from typing import Any, BinaryIO, cast

from ov_data import example, fs, index, processes, records, scenes, sources
from ov_data.record_source import Skip

FORMAT = "ov_data dataset 1"
MANIFEST = "dataset.json"
SKIPPED = "skipped.jsonl"
_PROGRESS_DIR = "dataset.progress"  # one JSON file for each finished shard, until the manifest
_SCENES_IN_SHARD = 2500  # about 6 MB at 64 px
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

  def __str__(self) -> str:
    parts = [f"{n:,} {split}" for split, n in self.examples.items()]
    text = f"{self.directory}: {', '.join(parts)} examples"
    if self.skipped:
      reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.skipped.items()))
      text += f"; skipped {sum(self.skipped.values()):,} ({reasons}; listed in {SKIPPED})"
    return text


class ShardWriter:
  """One shard: appears whole, with its index, when the `with` block ends without an error."""

  def __init__(self, path: str | os.PathLike[str]):
    self.path = os.fspath(path)
    self.examples = 0
    self.kinds: dict[str, str] = {}  # feature -> "bytes", "int64" or "float"
    self._part = f"{self.path}.{os.getpid()}.part"

  def __enter__(self) -> "ShardWriter":
    self._file: BinaryIO = open(self._part, "wb")
    return self

  def write(self, features: Features) -> None:
    """Appends one example; strings are stored as UTF-8, lists as several values."""
    self._file.write(records.frame(example.serialise(features)))
    self.examples += 1
    for key, value in features.items():
      self.kinds.setdefault(key, _kind(value))

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._file.close()
    if kind is not None:
      os.remove(self._part)
      return
    os.replace(self._part, self.path)
    index.load_index(self.path)  # reads the shard back, verifies it and stores the index


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
  """Makes all shards that are not there yet, then the manifest.

  Args:
    directory: local; made if need be.
    shards: number of shards of each split. It should not depend on the machine.
    make_shard: yields the examples of a shard; a pure function of its arguments, picklable by
      reference (an object of a module-level class, for instance).
    recipe: JSON values that determine the data: what else `make_shard` depends on.
    workers: processes; None takes one for each core, 0 stays in this process.
    progress: gets the number of examples done since it was called last, skipped ones included.
    overwrite: replaces a data set of another recipe instead of refusing.

  Raises:
    ValueError: the directory holds the data of another recipe, or shards of unknown origin.
  """
  path = pathlib.Path(directory)
  # A data set is what the recipe says; whoever reads JSON back gets lists for tuples.
  recipe = json.loads(json.dumps({**recipe, "shards": shards}))
  _claim(path, recipe, overwrite)
  if (path / MANIFEST).exists():
    return _read_summary(path)
  names = {(s, i): shard_name(s, i, n) for s, n in shards.items() for i in range(n)}
  for partial in path.glob("*.part"):  # of an earlier run that was killed
    partial.unlink()
  done = {name: log for name in names.values() if (log := _read_log(path, name)) is not None}
  progress(sum(log["examples"] + len(log["skipped"]) for log in done.values()))
  resumed = len(done)
  job = _Job(str(path), make_shard, names)
  missing = [shard for shard, name in names.items() if name not in done]
  workers = min(os.cpu_count() or 1, 16) if workers is None else workers
  if len(missing) == 1:
    workers = 0
  for shard, log in processes.map_in_processes(job, missing, workers, progress):
    done[names[shard]] = log
  return _finish(path, recipe, names, done, resumed)


def shard_name(split: str, number: int, count: int) -> str:
  return f"{split}-{number:05d}-of-{count:05d}.tfrecord"


def shard_count(examples: int, bytes_each: int, shard_bytes: int = 64 << 20) -> int:
  """Shards of about `shard_bytes`, at least one."""
  return max(1, round(examples * bytes_each / shard_bytes))


@dataclasses.dataclass(frozen=True)
class _Job:
  """Makes one shard and logs it, in whatever process."""

  directory: str
  make_shard: MakeShard
  names: dict[tuple[str, int], str]

  def __call__(self, shard: tuple[str, int], report: processes.Report) -> dict[str, Any]:
    path = pathlib.Path(self.directory)
    name = self.names[shard]
    skipped: list[dict[str, str]] = []
    with ShardWriter(path / name) as writer:
      for features in _reported(self.make_shard(*shard), report):
        if isinstance(features, Skip):
          skipped.append(dataclasses.asdict(features))
        else:
          writer.write(features)
    log = {"examples": writer.examples, "features": writer.kinds, "skipped": skipped}
    fs.write_atomic(str(path / _PROGRESS_DIR / f"{name}.json"), json.dumps(log).encode())
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


def _claim(path: pathlib.Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
  """Makes sure that what lies in the directory belongs to this recipe; clears it if told to."""
  progress = path / _PROGRESS_DIR
  for place in (path / MANIFEST, progress / "recipe.json"):
    if place.exists():
      found = _read_json(place).get("recipe", {})
      if found == recipe:
        progress.mkdir(exist_ok=True) if place != path / MANIFEST else None
        return
      if not overwrite:
        raise ValueError(
          f"{path} holds another data set: {_difference(found, recipe)}. Choose another directory, "
          "or replace it with overwrite."
        )
      break
  else:
    if any(path.glob("*.tfrecord*")) and not overwrite:
      raise ValueError(
        f"{path} holds record files but neither {MANIFEST} nor unfinished work of this writer. "
        "Choose another directory, or replace them with overwrite."
      )
  for old in [*path.glob("*.tfrecord*"), path / MANIFEST, path / SKIPPED]:
    old.unlink(missing_ok=True)
  shutil.rmtree(progress, ignore_errors=True)
  progress.mkdir(parents=True)
  fs.write_atomic(str(progress / "recipe.json"), json.dumps({"recipe": recipe}).encode())


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
  shown = [f"{k} was {str(found.get(k))[:60]}, now {str(wanted.get(k))[:60]}" for k in keys]
  return "; ".join(shown)


def _read_log(path: pathlib.Path, name: str) -> dict[str, Any] | None:
  """What is known of a finished shard; None if it has to be made (again)."""
  log = path / _PROGRESS_DIR / f"{name}.json"
  return _read_json(log) if log.exists() and (path / name).exists() else None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return cast(dict[str, Any], json.loads(path.read_bytes()))
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); remove it to start again.") from None


def _finish(
  path: pathlib.Path,
  recipe: Mapping[str, Any],
  names: Mapping[tuple[str, int], str],
  logs: Mapping[str, dict[str, Any]],
  resumed: int,
) -> Summary:
  ordered = [(split, logs[name]) for (split, _), name in names.items()]
  examples = dict.fromkeys(recipe["shards"], 0)
  features: dict[str, str] = {}
  skipped = [skip for _, log in ordered for skip in log["skipped"]]
  for split, log in ordered:
    examples[split] += log["examples"]
    features |= log["features"]
  fingerprints = {split: _fingerprint(path, split) if n else "" for split, n in examples.items()}
  if skipped:
    lines = [json.dumps(skip, ensure_ascii=False) + "\n" for skip in skipped]
    fs.write_atomic(str(path / SKIPPED), "".join(lines).encode())
  manifest = {
    "format": FORMAT,
    "recipe": recipe,
    "features": dict(sorted(features.items())),
    "splits": {
      split: {
        "examples": examples[split],
        "shards": recipe["shards"][split],
        "fingerprint": fingerprints[split],
      }
      for split in examples
    },
    "skipped": dict(Counter(skip["reason"] for skip in skipped)),
  }
  text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
  fs.write_atomic(str(path / MANIFEST), text.encode())
  shutil.rmtree(path / _PROGRESS_DIR, ignore_errors=True)
  return dataclasses.replace(_read_summary(path), resumed=resumed)


def _read_summary(path: pathlib.Path) -> Summary:
  manifest = _read_json(path / MANIFEST)
  splits = manifest["splits"]
  return Summary(
    str(path),
    {name: split["examples"] for name, split in splits.items()},
    manifest["skipped"],
    {name: split["fingerprint"] for name, split in splits.items()},
    resumed=sum(split["shards"] for split in splits.values()),
  )


def _fingerprint(path: pathlib.Path, split: str) -> str:
  return sources.Dataset(sources.Source(str(path), split)).fingerprint


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
  """The demo data set: scenes of `ov_data.scenes` as records with jpg, txt,
  description, alt and truth.

  Args:
    directory: see `write_dataset`, also for workers, progress, overwrite.
    sizes: number of scenes of each split, for instance {"train": 60_000, "heldout": 1_000}.
    seed: of all scenes.
    image_size: 32 to 256 px.
    num_objects: 1 or 2 for all scenes; None mixes them.
    label: the kind of class under `label`, in scenes that have it; see `scenes.class_prompts`.

  Raises:
    ValueError: an unknown split, class or size, no scenes, or a directory with other data.
  """
  if not sizes or min(sizes.values()) < 1 or not set(sizes) <= set(scenes.SPLITS):
    raise ValueError(f"sizes={dict(sizes)}: expected 1 or more of {', '.join(scenes.SPLITS)}.")
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
