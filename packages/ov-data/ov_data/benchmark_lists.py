"""Record source over the lists of compositional benchmarks.

    sugar_crepe   add_att.json: {"0": {"filename", "caption", "negative_caption"}}, val2017/NAME
    winoground    examples.jsonl: {"image_0", "image_1", "caption_0", "caption_1"}, images/NAME.png
    winogavil     examples.jsonl: {"cue", "candidates", "associations"}, images/NAME.jpg

The lists are read only if the format of the source is one of these names.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from ov_data import fs
from ov_data.image_files import ImageFiles, check_some_exist
from ov_data.layouts.items import name_problem, open_list
from ov_data.layouts.text_rules import MAX_JSON_BYTES, parse_json
from ov_data.record_source import Record, RecordSource
from ov_data.request import Request

EXAMPLES = "examples.jsonl"
_IMAGES = "images"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True, slots=True)
class _Image:
  """An image of an instance: file name, captions of the instance, and whether it is a right one."""

  name: str
  captions: tuple[str, ...]
  instance: int
  right: bool = True


def open_benchmark_list(request: Request) -> RecordSource | None:
  """Open a list; return None unless the format of the source names one.

  Raises:
    ValueError: if the list is missing or malformed, or no image exists.
    OSError: if the list cannot be read.
  """
  path, read = request.path, _READERS.get(request.source.format)
  if path is None or read is None:
    return None
  root, images = read(path)
  check_some_exist(path, root, [image.name for image in images], request.source.follow_links)
  return BenchmarkList(request, root, images)


class BenchmarkList(ImageFiles):
  """The images of all instances, in the order of the list.

  Features in addition to those of `ImageFiles`: "instance", the number of the instance, and
  "right", 1 if the image is associated with the caption.
  """

  def __init__(self, request: Request, root: str, images: Sequence[_Image]):
    self._images = [images[i] for i in request.split.range(len(images))]
    super().__init__(
      request.source,
      root,
      [image.name for image in self._images],
      [image.captions for image in self._images],
    )

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record; see `RecordSource.read`."""
    found, image = super().read(record, keys), self._images[record]
    numbers = {"instance": image.instance, "right": int(image.right)}
    labels = {
      name: np.array([number], np.int64)
      for name, number in numbers.items()
      if keys is None or name in keys
    }
    return dataclasses.replace(found, labels={**found.labels, **labels})


def _sugar_crepe(path: str) -> tuple[str, list[_Image]]:
  if not fs.exists(path):
    raise ValueError(f"{path}: no such file; expected a JSON file of SugarCrepe")
  content = parse_json(fs.read_regular(path, MAX_JSON_BYTES), path)
  if not isinstance(content, dict):
    raise ValueError(f"{path}: expected a JSON object of entries, as in SugarCrepe")
  images = []
  for number, (key, entry) in enumerate(content.items()):
    where = f"{path}, entry {key!r}"
    name, *captions = _texts(where, entry, ("filename", "caption", "negative_caption"))
    images.append(_Image(_checked(where, name), tuple(captions), number))
  folder = path.removesuffix(fs.basename(path)) or "."
  return fs.join(folder, "val2017"), images


def _winoground(path: str) -> tuple[str, list[_Image]]:
  images = []
  for number, (where, entry) in enumerate(_lines(path)):
    texts = _texts(where, entry, ("image_0", "image_1", "caption_0", "caption_1"))
    names = _files(path, where, texts[:2])
    images += [_Image(name, tuple(texts[2:]), number) for name in names]
  return fs.join(path, _IMAGES), images


def _winogavil(path: str) -> tuple[str, list[_Image]]:
  images = []
  for number, (where, entry) in enumerate(_lines(path)):
    (cue,) = _texts(where, entry, ("cue",))
    candidates, right = (_names(where, entry, key) for key in ("candidates", "associations"))
    if unknown := sorted(set(right) - set(candidates)):
      raise ValueError(f"{where}: the association {unknown[0]!r} is not among the candidates")
    # The prompt of DataComp.
    prompt = f"{'An' if cue.lower()[0] in 'aeiou' else 'A'} {cue.lower()}"
    files = _files(path, where, candidates)
    images += [
      _Image(file, (prompt,), number, name in right)
      for file, name in zip(files, candidates, strict=True)
    ]
  return fs.join(path, _IMAGES), images


_READERS: Mapping[str, Callable[[str], tuple[str, list[_Image]]]] = {
  "sugar_crepe": _sugar_crepe,
  "winoground": _winoground,
  "winogavil": _winogavil,
}


def _lines(path: str) -> list[tuple[str, Any]]:
  """Return position and content of each line of the list in a folder."""
  file = fs.join(path, EXAMPLES)
  found = []
  for number, line in enumerate(open_list(file), 1):
    where = f"{file}, line {number}"
    if len(line) > MAX_JSON_BYTES:
      raise ValueError(f"{where}: over {MAX_JSON_BYTES:,} bytes; expected a JSON object")
    if line.strip():
      found.append((where, parse_json(line, where)))
  return found


def _texts(where: str, entry: Any, keys: Sequence[str]) -> list[str]:
  """Return the texts under the keys of an entry; raise ValueError if one is missing or empty."""
  for key in keys:
    if not isinstance(entry, Mapping) or not isinstance(entry.get(key), str) or not entry[key]:
      raise ValueError(f"{where}: expected an object with texts under {', '.join(keys)}")
  return [entry[key] for key in keys]


def _names(where: str, entry: Mapping[str, Any], key: str) -> list[str]:
  value = entry.get(key)
  if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
    raise ValueError(f"{where}: expected a list of image names under {key!r}")
  return value


def _files(path: str, where: str, names: Sequence[str]) -> list[str]:
  """Return the file of each image, with the suffix that it has in the folder."""
  files = []
  for name in names:
    _checked(where, name)
    folder = fs.join(path, _IMAGES)
    there = (name + s for s in ("", *_SUFFIXES) if fs.exists(fs.join(folder, name + s)))
    files.append(next(there, name))
  return files


def _checked(where: str, name: str) -> str:
  if problem := name_problem(name):
    raise ValueError(f"{where}: the image {name[:80]!r} is a {problem}")
  return name
