"""Conversion of icon sets to record shards: training, held-out sets, and naming.

train/    all sets except the held-out ones
heldout/  one split per held-out set, without copies of training icons
naming/   held-out icons with one of the most common names, as classes
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from ov_data import sources
from ov_data.writer import Features, Skip
from tools.data import icon_copies, icon_render, icon_svg
from tools.data.icon_sets import Icon, IconSet

TRAIN, NAMING = "train", "naming"
COPY = "copy of a training icon"
_VECTORS, _KEYS = "train-vectors.npy", "train-keys"
_COMPARED = 256  # held-out icons compared at a time
_FACTS = ("description", "key", "set", "style", "license")
_T = TypeVar("_T")


class Plan:
  """Icons of each shard, in files of a folder that the workers read.

  Args:
    folder: an empty folder.
    train_shards: number of shards of the training data.
    held_out: sets that are not used for training.

  Attributes:
    icons: number of planned icons by set.
    sets_of_text: training sets of each name.
  """

  def __init__(self, folder: Path, train_shards: int, held_out: Collection[str]):
    self._folder, self._train_shards = folder, train_shards
    self._held_out = frozenset(held_out)
    self.icons: Counter[str] = Counter()
    self._inputs: Counter[str] = Counter()
    self.sets_of_text: dict[str, set[str]] = {}

  def add(self, found: IconSet) -> None:
    """Add the icons of a set."""
    self.icons[found.prefix] = len(found.icons)
    self._inputs[found.prefix] = len(found.icons) + len(found.skips)
    held_out = found.prefix in self._held_out
    lines: dict[str, list[bytes]] = {}
    for icon in found.icons:
      number = 0 if held_out else int(rank(icon.key)[:8], 16) % self._train_shards
      name = f"{found.prefix if held_out else TRAIN}-{number}"
      lines.setdefault(name, []).append(msgspec.json.encode(icon) + b"\n")
      for text in () if held_out else icon.texts:
        self.sets_of_text.setdefault(text, set()).add(found.prefix)
    skips = [msgspec.json.encode(skip) + b"\n" for skip in found.skips]
    lines[f"{found.prefix if held_out else TRAIN}-0.skips"] = skips
    for name, content in lines.items():
      with open(self._folder / name, "ab") as file:
        file.writelines(content)

  def total(self, splits: Collection[str]) -> int:
    """Return the number of icons of some splits, including skipped ones."""
    held_out = sum(self._inputs[name] for name in self._held_out & set(splits))
    everything = self._inputs.total() - sum(self._inputs[name] for name in self._held_out)
    return everything if TRAIN in splits else held_out


def rank(key: str) -> str:
  """Return hex digits that order the icons of a shard, the same on every machine."""
  return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shards:
  """Renders the planned icons of a shard (`make_shard` of `ov_data.writer`).

  Attributes:
    folder: folder of the plan.
    image_size: pixels per side.
    train: folder of the training icons, see `save_vectors`; copies of these icons are skipped. ""
      for the training icons themselves.
  """

  folder: str
  image_size: int
  train: str = ""

  def __call__(self, split: str, number: int) -> Iterator[Features | Skip]:
    """Yield the examples of a shard."""
    yield from _lines(Path(self.folder, f"{split}-{number}.skips"), Skip)
    icons = sorted(_lines(Path(self.folder, f"{split}-{number}"), Icon), key=lambda i: rank(i.key))
    with icon_render.Renderer() as renderer:
      found = (_example(renderer, icon, self.image_size) for icon in icons)
      yield from self._without_copies(found) if self.train else found

  def _without_copies(self, found: Iterable[Features | Skip]) -> Iterator[Features | Skip]:
    train = np.load(Path(self.train, _VECTORS), mmap_mode="r")
    keys = Path(self.train, _KEYS).read_text().splitlines()
    remaining = iter(found)
    while part := list(itertools.islice(remaining, _COMPARED)):
      examples = [example for example in part if not isinstance(example, Skip)]
      vectors = np.array(
        [icon_copies.png_vector(cast(bytes, example["jpg"])) for example in examples]
      )
      nearest = iter(zip(*icon_copies.nearest(vectors, train), strict=True))
      for example in part:
        if isinstance(example, Skip):
          yield example
          continue
        row, score = next(nearest)
        if score >= icon_copies.COPY_CORRELATION:
          yield Skip(str(example["key"]), COPY, f"{keys[row]}, correlation {score:.2f}")
        else:
          yield example


@dataclasses.dataclass(frozen=True)
class NamingShards:
  """Selects held-out icons whose first name is a class (`make_shard` of `ov_data.writer`).

  Attributes:
    heldout: folder of the held-out data.
    names: classes in order.
  """

  heldout: str
  names: tuple[str, ...]

  def __call__(self, split: str, number: int) -> Iterator[Features]:
    """Yield the examples of the only shard."""
    del split, number
    wanted = set(self.names)
    for row in records(self.heldout):
      if (text := row["txt"][0].decode()) in wanted:
        yield {
          "jpg": row["jpg"][0],
          "txt": [value.decode() for value in row["txt"]],
          "label": text,
          **{
            key: row[key][0].decode() for key in ("description", "key", "set", "style", "license")
          },
        }


def save_vectors(train: icon_copies.SmallIcons, folder: Path) -> None:
  """Save the training icons that held-out icons are compared with."""
  np.save(folder / _VECTORS, train.vectors)
  (folder / _KEYS).write_text("".join(f"{key}\n" for key in train.keys))


def records(
  folder: str, split: str | None = None, keys: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
  """Yield the features of all records of a data set."""
  data = sources.Dataset(sources.Source(folder, split))
  for record in range(len(data)):
    yield data.features(record, keys)


def common_names(
  heldout: Iterable[Mapping[str, list[bytes]]],
  sets_of_text: Mapping[str, Collection[str]],
  count: int,
) -> tuple[str, ...]:
  """Return the names of held-out icons that occur in the most training sets, most common first."""
  names = {row["txt"][0].decode() for row in heldout}
  ordered = sorted(names, key=lambda name: (-len(sets_of_text.get(name, ())), name))
  return tuple(name for name in ordered if name in sets_of_text)[:count]


def license_table(sets: Sequence[IconSet], icons: Mapping[str, Mapping[str, int]]) -> str:
  """Return a Markdown table of the sets with their licences.

  Args:
    sets: the used sets.
    icons: number of written icons by split, then by set.
  """
  lines = [
    f"| set | title | author | licence | source | {' | '.join(icons)} |",
    "|---|---|---|---|---|" + "---|" * len(icons),
  ]
  for one in sorted(sets, key=lambda one: one.prefix):
    facts = (_cell(one.title), _cell(one.author), one.license, _cell(one.url))
    counts = " | ".join(str(of_set.get(one.prefix, 0)) for of_set in icons.values())
    lines.append(f"| {one.prefix} | {' | '.join(facts)} | {counts} |")
  return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
  return " ".join(text.replace("|", "/").split())


def _lines(path: Path, kind: type[_T]) -> list[_T]:
  if not path.exists():
    return []
  return [msgspec.json.decode(line, type=kind) for line in path.read_bytes().splitlines()]


def _example(renderer: icon_render.Renderer, icon: Icon, image_size: int) -> Features | Skip:
  try:
    document = icon_svg.document(icon.body, image_size, *icon.box)
    pixels = renderer.render(document, image_size)
  except icon_svg.SvgError as error:
    return Skip(icon.key, error.reason, error.detail)
  return {
    "jpg": icon_render.encode_png(pixels),
    "txt": list(icon.texts),
    "description": f"{icon.style} icon of {icon.texts[0]}".strip(),
    "key": icon.key,
    "set": icon.set,
    "style": icon.style,
    "license": icon.license,
  }
