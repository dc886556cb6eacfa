"""The layout `webdataset`: tars whose members are grouped by the name up to the first dot.

000001.jpg    000001.txt    000001.json    000001.cls
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import glob
import os

from ov_data.layouts import sidecars, text_rules
from ov_data.layouts.classes import UNSUPPORTED
from ov_data.layouts.img2dataset import count_failures
from ov_data.layouts.items import Blob, Collection, Item, Listing, Notes, name_problem
from ov_data.layouts.tar_members import COMPRESSED_TARS, DAMAGE, Member, SkippedMember, read_members
from ov_data.layouts.tree import (
  IMAGE_SUFFIXES,
  is_hidden,
  is_image,
  is_unsupported_image,
  join_names,
)
from ov_data.record_source import Skip
from ov_data.shard_names import expand_ranges

_LABEL = "cls"
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)  # in order of preference


def read(collection: Collection) -> Listing:
  """List the images of all tars and read their captions and labels.

  Raises:
    ValueError: if there is no tar, a tar is missing or compressed, or no tar is readable.
    OSError: if a tar cannot be read.
  """
  notes = Notes()
  items: list[Item] = []
  skips: list[Skip] = []
  paths = _tars(collection, skips, notes)
  unreadable: list[ValueError] = []
  for path, name in zip(paths, _unique_names(paths)):
    if os.path.exists(stats := os.path.splitext(path)[0] + "_stats.json"):  # written by img2dataset
      count_failures(os.path.dirname(stats) or ".", [os.path.basename(stats)], notes)
    try:
      _Tar(path, name, items, skips, notes).read()
    except ValueError as error:
      unreadable.append(error)
      skips.append(Skip(name, DAMAGE, str(error)))
  if len(unreadable) == len(paths):
    raise unreadable[0]
  return Listing("webdataset", items, skips, notes)


def _tars(collection: Collection, skips: list[Skip], notes: Notes) -> list[str]:
  path = collection.path
  if os.path.isdir(path):
    paths = []
    for folder, name in collection.tree.files():
      if name.lower().endswith(".tar"):
        paths.append(os.path.join(path, join_names(folder, name)))
      elif name.lower().endswith(COMPRESSED_TARS):
        skips.append(Skip(join_names(folder, name), "compressed tar", "decompress it"))
      elif not name.endswith(("_stats.json", ".parquet")):
        notes.add("files next to the tars not used", join_names(folder, name))
  elif os.path.lexists(path):
    paths = [path]
  else:
    paths = [p for part in expand_ranges(path) for p in (sorted(glob.glob(part)) or [part])]
    paths = list(dict.fromkeys(paths))
  missing = [p for p in paths if not os.path.exists(p)]
  if not paths or missing == [path]:
    raise ValueError(
      f"{path}: no tar file matches; expected a folder of tars, a tar, a pattern such as "
      "'name-*.tar', or a range 'name-{000..099}.tar'."
    )
  if missing:
    raise ValueError(
      f"{path}: {len(missing)} of {len(paths)} files are missing, {missing[0]} first."
    )
  return paths


def _unique_names(paths: Sequence[str]) -> list[str]:
  """Return the name of each file with the fewest parent folders that make it unique."""
  parts = [os.path.normpath(path).split(os.sep) for path in paths]
  lengths = [1] * len(paths)
  while True:
    names = ["/".join(p[-n:]) for p, n in zip(parts, lengths)]
    counts = Counter(names)
    longer = [
      n + 1 if counts[name] > 1 and n < len(p) else n for name, p, n in zip(names, parts, lengths)
    ]
    if longer == lengths:
      return names
    lengths = longer


@dataclasses.dataclass
class _Tar:
  """Reader of the items of one tar.

  Attributes:
    path: path of the tar.
    name: prefix of the keys.
    items, skips, notes: outputs to which the reader appends.
  """

  path: str
  name: str
  items: list[Item]
  skips: list[Skip]
  notes: Notes

  def __post_init__(self) -> None:
    self._file = -1  # descriptor while samples are read

  def read(self) -> None:
    """Add all samples.

    Raises:
      ValueError: if the file is not a readable tar.
      OSError: if the file cannot be read.
    """
    samples: dict[tuple[int, str], dict[str, Member]] = {}
    for found in read_members(self.path):
      if isinstance(found, SkippedMember):
        key = f"{self.name}/{found.name}" if found.name else self.name
        self.skips.append(Skip(key, found.reason, found.detail))
        continue
      folder, _, base = found.name.rpartition("/")
      stem, _, suffix = base.partition(".")
      if problem := name_problem(found.name):
        self._skip(found, problem)
      elif not stem or is_hidden(base) or "__MACOSX" in folder.split("/"):
        self.notes.add("hidden files and folders", f"{self.name}/{found.name}")
      else:
        sample = samples.setdefault((found.archive, join_names(folder, stem)), {})
        if (earlier := sample.get(suffix.lower())) is not None:
          self._skip(earlier, "repeated name in the tar", "a later one of this name is used; ")
        sample[suffix.lower()] = found
    keys: set[str] = set()
    self._file = os.open(self.path, os.O_RDONLY)
    try:
      for (archive, stem), members in samples.items():
        key = f"{self.name}/{stem}"
        if archive:
          self.notes.add("samples of another archive in the same file", key)
        while key in keys:
          key += f" (archive {archive + 1})"
        keys.add(key)
        self._add(key, members)
    finally:
      os.close(self._file)

  def _skip(self, member: Member, reason: str, detail: str = "") -> None:
    where = f"{detail}at byte {member.header:,}"
    self.skips.append(Skip(f"{self.name}/{member.name}", reason, where))

  def _add(self, key: str, members: dict[str, Member]) -> None:
    images = [suffix for suffix in _IMAGES if suffix in members]
    if not images:
      self.skips.append(_no_image(key, members))
      return
    for other in images[1:]:
      self._skip(members[other], "another image under the same key", f".{images[0]} is used; ")
    used = {*images, *sidecars.TEXTS, "json", _LABEL}
    for suffix in sorted(members.keys() - used):
      self.notes.add("members of other types not used", f"{self.name}/{members[suffix].name}")
    texts = {
      suffix: self._bytes(members[suffix], text_rules.MAX_CAPTION_BYTES)
      for suffix in sidecars.TEXTS
      if suffix in members
    }
    meta = self._bytes(members["json"], text_rules.MAX_JSON_BYTES) if "json" in members else None
    label = None
    try:
      captions = sidecars.captions(key, texts, meta, self.notes)
      if _LABEL in members:
        content = self._bytes(members[_LABEL], text_rules.MAX_CAPTION_BYTES)
        label = text_rules.checked_label(text_rules.decode(content))
    except text_rules.TextError as error:
      if error.reason != "empty label" or not captions:
        self.skips.append(Skip(key, error.reason, error.detail))
        return
      self.notes.add("empty labels next to captions", key)
    image = members[images[0]]
    blob = Blob("", self.path, image.offset, image.size, image.checksum)
    self.items.append(Item(key, blob, captions, label))

  def _bytes(self, member: Member, limit: int) -> bytes:
    """Return at most `limit` + 1 bytes of a member."""
    return os.pread(self._file, min(member.size, limit + 1), member.offset)


def _no_image(key: str, members: dict[str, Member]) -> Skip:
  has = f"has {', '.join(sorted(members))}"
  if unsupported := [suffix for suffix in members if is_unsupported_image(f".{suffix}")]:
    return Skip(key, UNSUPPORTED, f".{unsupported[0]}; convert it to JPEG, PNG or WebP")
  if any(is_image(f".{suffix}") for suffix in members):
    detail = f"{has}; a key ends at the first dot, so rename the members (s0.jpg, s0.txt)"
    return Skip(key, "dotted member name", detail)
  return Skip(key, "no image", has)
