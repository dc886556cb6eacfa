"""Items of an image collection: where an image is stored, and its captions and label."""

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
  """A file, or a part of one.

  Attributes:
    folder: the folder of the collection; "" where `name` is a path by itself.
    name: of the file in it.
    offset: first byte.
    size: bytes; None for all to the end.
    checksum: of the header in front of the part; 0 for a file.
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
    key: unique in the collection and independent of where that is stored. Invalid UTF-8 as
      surrogates.
    image: where its encoded bytes are.
    captions: without empty and repeated ones; valid text.
    label: the name of its class, one line; None without.
    split: the part of the data set that it belongs to; "" where the layout has none.
  """

  key: str
  image: Blob
  captions: tuple[str, ...] = ()
  label: str | None = None
  split: str = ""


class Notes:
  """Counts of what a reader passed over or changed without losing an image, with one example."""

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}
    self.examples: dict[str, str] = {}

  def add(self, what: str, example: str, count: int = 1) -> None:
    """Count one more `what`, for instance "hidden files"."""
    self.counts[what] = self.counts.get(what, 0) + count
    self.examples.setdefault(what, example)

  def merge(self, other: "Notes") -> None:
    """Add the counts of others."""
    for what, count in other.counts.items():
      self.add(what, other.examples[what], count)

  def __str__(self) -> str:
    return "; ".join(
      f"{count:,} {what} (the first: {text_rules.printable(self.examples[what])})"
      for what, count in self.counts.items()
    )


@dataclasses.dataclass(frozen=True)
class Listing:
  """All items of a collection in the order found.

  Attributes:
    format: the name of the layout.
    items: what can be read.
    skips: what was found and gives no item.
    notes: see there.
    class_names: the classes in the order of their numbers, those without images included, where
      the layout has such a list; None otherwise.
  """

  format: str
  items: list[Item]
  skips: list[Skip]
  notes: Notes = dataclasses.field(default_factory=Notes)
  class_names: tuple[str, ...] | None = None


class Place:
  """A path to read. Its files, or its content as JSON, are read once and only if needed.

  path: as given.
  images: folder of the images that a list names; "" is the folder of the list.
  follow_links: whether links are followed that lead out of the folder, see `ov_data.links`.
  """

  def __init__(self, path: str, images: str = "", follow_links: bool = False):
    self.path = path
    self.images = images
    self.follow_links = follow_links

  @functools.cached_property
  def tree(self) -> Tree:
    """The files below the path; raises OSError."""
    return walk(self.path, self.follow_links)

  @functools.cached_property
  def content(self) -> dict[str, Any]:
    """The content of the file; see `json_lists.load`."""
    return json_lists.load(self.path)


def read_blob(blob: Blob, limit: int, follow_links: bool = False) -> bytes:
  """Return at most `limit` bytes of it. No pipe blocks, no device has no end.

  Raises:
    FileNotFoundError: there is no such file.
    links.LinkError: it is not in its folder, and `follow_links` is not set.
    OSError: it cannot be read, or is no regular file (errno EINVAL).
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
  """Return the captions repaired, stripped, without empty, repeated and unusable ones.

  Args:
    captions: as read.
    key: of the item, for the notes.
    notes: counts what is changed and left out.

  Raises:
    TextError: none can be used, and one is too long, or holds nothing but invalid bytes.
  """
  kept: dict[str, None] = {}
  unusable: list[text_rules.TextError] = []
  for caption in captions:
    text = text_rules.repaired(caption).strip()
    if text != caption.strip():
      detail = "holds nothing but invalid characters"
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
    notes.add(f"captions left out next to others of their image ({error.reason})", key)
  return tuple(kept)


def name_problem(name: str) -> str | None:
  """Return why a list may not name this file below its folder, fit for counting; None if it may."""
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
    TextError: it is missing, no regular file, or over the limit.
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
    ValueError: it is no regular file, or encoded as UTF-16.
    OSError: it cannot be read.
  """
  if not fs.exists(path):
    raise ValueError(f"{path}: no such file; a link that leads nowhere?")
  if not fs.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError(f"{path}: not a regular file; give a file that holds the list.")
  with fs.open_read(path) as file:
    line = file.readline(text_rules.MAX_JSON_BYTES + 1)
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
      raise ValueError(f"{path}: encoded as UTF-16; save it as UTF-8.")
    while line:
      yield line
      line = file.readline(text_rules.MAX_JSON_BYTES + 1)
