"""Items of an image collection: location, captions and label of an image."""

from collections.abc import Iterable, Iterator
import dataclasses
import errno
import functools
import os
from pathlib import PurePosixPath
import re
import stat
from typing import Any

from ov_data import fs, links
from ov_data.layouts import json_lists, text_rules
from ov_data.layouts.tree import Tree, walk
from ov_data.record_source import Skip


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
  """A file or a byte range of a file.

  Attributes:
    folder: folder of the collection; "" if `name` is a complete path.
    name: file name relative to the folder.
    offset: first byte.
    size: number of bytes; None for all bytes to the end.
    checksum: checksum of the tar header before the range; 0 for a file.
  """

  folder: str
  name: str
  offset: int = 0
  size: int | None = None
  checksum: int = 0

  @property
  def path(self) -> str:
    return fs.join(self.folder, self.name) if self.folder else self.name


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """An image with its captions and label.

  Attributes:
    key: key that is unique in the collection and independent of its location. Invalid UTF-8 is
      represented by surrogates.
    image: location of the encoded image.
    captions: valid, non-empty, distinct captions.
    label: class name in one line, or None.
    split: split of the item; "" if the layout has no splits.
  """

  key: str
  image: Blob
  captions: tuple[str, ...] = ()
  label: str | None = None
  split: str = ""


class Notes:
  """Counts, with an example, of inputs that a reader ignored or changed without losing an image."""

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}
    self.examples: dict[str, str] = {}

  def add(self, what: str, example: str, count: int = 1) -> None:
    """Add to the count of `what`, for example "hidden files"."""
    self.counts[what] = self.counts.get(what, 0) + count
    self.examples.setdefault(what, example)

  def merge(self, other: "Notes") -> None:
    """Add the counts of other notes."""
    for what, count in other.counts.items():
      self.add(what, other.examples[what], count)

  def __str__(self) -> str:
    return "; ".join(
      f"{count:,} {what} (the first: {text_rules.printable(self.examples[what])})"
      for what, count in self.counts.items()
    )


@dataclasses.dataclass(frozen=True)
class Listing:
  """All items of a collection in stored order.

  Attributes:
    format: name of the layout.
    items: usable items.
    skips: inputs without an item.
    notes: see `Notes`.
    class_names: class names by index, including classes without images; None if the layout has no
      class list.
  """

  format: str
  items: list[Item]
  skips: list[Skip]
  notes: Notes = dataclasses.field(default_factory=Notes)
  class_names: tuple[str, ...] | None = None


class Collection:
  """Path of a collection, whose files or JSON content are read lazily and once.

  Attributes:
    path: path given by the user.
    images: folder of the images of a list; "" is the folder of the list.
    follow_links: whether to follow links that point outside the folder, see `ov_data.links`.
  """

  def __init__(self, path: str, images: str = "", follow_links: bool = False):
    self.path = path
    self.images = images
    self.follow_links = follow_links

  @functools.cached_property
  def tree(self) -> Tree:
    """The files below the path. Raises OSError if a folder cannot be listed."""
    return walk(self.path, self.follow_links)

  @functools.cached_property
  def content(self) -> dict[str, Any]:
    """The JSON content of the file; see `json_lists.load`."""
    return json_lists.load(self.path)


def read_blob(blob: Blob, limit: int, follow_links: bool = False) -> bytes:
  """Return at most `limit` bytes of a blob. Never blocks on pipes or devices.

  Raises:
    FileNotFoundError: if the file does not exist.
    links.LinkError: if the file is outside its folder and `follow_links` is False.
    OSError: if the file cannot be read or is not a regular file (errno EINVAL).
  """
  with open(blob.path, "rb", opener=_open_without_waiting) as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise OSError(errno.EINVAL, "not a regular file", blob.path)
    if blob.folder and not follow_links:
      if target := links.target_outside(blob.folder, blob.name):
        raise links.LinkError(links.describe(blob.name, target))
    file.seek(blob.offset)
    return file.read(limit if blob.size is None else min(limit, blob.size))


def _open_without_waiting(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NONBLOCK)


def clean_captions(captions: Iterable[str], key: str, notes: Notes) -> tuple[str, ...]:
  """Return repaired and stripped captions, without empty, repeated and unusable ones.

  Args:
    captions: captions as read.
    key: key of the item, for the notes.
    notes: notes that count changed and dropped captions.

  Raises:
    TextError: if no caption is usable and one is too long or contains only invalid bytes.
  """
  kept: dict[str, None] = {}
  unusable: list[text_rules.TextError] = []
  for caption in captions:
    text = text_rules.repaired(caption).strip()
    if text != caption.strip():
      detail = "contains only invalid characters"
      if not text.strip("\ufffd"):
        unusable.append(text_rules.TextError("unreadable caption", detail))
        continue
      notes.add("captions repaired (invalid characters became U+FFFD)", key)
    if not text:
      notes.add("empty captions", key)
    elif text in kept:
      notes.add("repeated captions of one image", key)
    elif (size := len(text.encode())) > text_rules.MAX_CAPTION_BYTES:
      detail = f"{size:,} bytes, at most {text_rules.MAX_CAPTION_BYTES:,}"
      unusable.append(text_rules.TextError("caption too long", detail))
    else:
      kept[text] = None
  if unusable and not kept:
    raise unusable[0]
  for error in unusable:
    notes.add(f"captions dropped next to others of their image ({error.reason})", key)
  return tuple(kept)


def name_problem(name: str) -> str | None:
  """Return why a file name in a list is not allowed, as a short phrase; None if it is allowed."""
  path = PurePosixPath(name.replace("\\", "/"))
  if "\0" in name:
    return "name with a NUL character"
  try:
    name.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return "name that no file can have"
  if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name) or "://" in name:
    return "path outside the folder"
  return None


def read_text(path: str, limit: int) -> bytes:
  """Return the bytes of a small file.

  Raises:
    TextError: if the file is missing, not a regular file, or larger than the limit.
  """
  try:
    return fs.read_regular(path, limit)
  except OSError as error:
    if error.errno == errno.EFBIG:
      what = "caption too long" if limit == text_rules.MAX_CAPTION_BYTES else "metadata too long"
      raise text_rules.TextError(what, f"{path}: over {limit:,} bytes") from None
    raise text_rules.TextError("unreadable caption", f"{path}: {error.strerror or error}") from None


def open_list(path: str) -> Iterator[bytes]:
  """Yield the lines of a list, at most `MAX_JSON_BYTES` + 1 bytes of each.

  Raises:
    ValueError: if the file is not a regular file or is encoded as UTF-16.
    OSError: if the file cannot be read.
  """
  if not fs.exists(path):
    raise ValueError(f"{path}: no such file; is it a broken link?")
  if not fs.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError(f"{path}: not a regular file; pass a file that holds the list.")
  # readline() of TensorFlow's remote files has no limit.
  limit = () if fs.is_remote(path) else (text_rules.MAX_JSON_BYTES + 1,)
  with fs.open_read(path) as file:
    line = file.readline(*limit)
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
      raise ValueError(f"{path}: encoded as UTF-16; save it as UTF-8.")
    while line:
      yield line
      line = file.readline(*limit)
