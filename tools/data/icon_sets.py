"""Reading of `@iconify/json`, the collection of open source icon sets on npm.

The package is a folder or its `.tgz` archive with one JSON file per set in `json/`. Nothing is
extracted. Sizes are limited, so that a damaged or hostile archive fails instead of filling memory.
"""

from collections import Counter
from collections.abc import Iterator
import gzip
import hashlib
from pathlib import Path
import re
import tarfile
from typing import Annotated, Any, BinaryIO, NamedTuple, cast
import zlib

import msgspec

from ov_data import fs
from ov_data.record_source import Skip
from tools.data.icon_names import SetNames

# SPDX identifiers of licences that allow any use with at most a notice.
PERMISSIVE = frozenset(
  ("MIT", "MIT-0", "Apache-2.0", "CC0-1.0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "Unlicense")
)
# Sets whose names are codes of countries or currencies instead of words.
CODE_SETS = frozenset(
  [
    "circle-flags",
    "flag",
    "flagpack",
    "cif",
    "cryptocurrency",
    "cryptocurrency-color",
    "token",
    "token-branded",
  ]
)
_MAX_FILE_BYTES = 128 << 20
MAX_TOTAL_BYTES = 2 << 30
_MAX_FILES = 5_000
_MAX_TEXTS = 8  # names of one icon
_SET_FILE = re.compile(r"(?:[^/]+/)?json/([a-z0-9]+(?:-[a-z0-9]+)*)\.json")
_VERSION_FILE = re.compile(r"(?:[^/]+/)?package\.json")

_Text = Annotated[str, msgspec.Meta(max_length=1000)]


class _Link(msgspec.Struct):
  name: _Text = ""
  url: _Text = ""


class _License(msgspec.Struct):
  title: _Text = ""
  spdx: _Text = ""
  url: _Text = ""


class _Info(msgspec.Struct):
  name: _Text = ""
  author: _Link = msgspec.field(default_factory=_Link)
  license: _License = msgspec.field(default_factory=_License)
  category: _Text = ""
  palette: bool = False


class _Icon(msgspec.Struct):
  body: str
  left: float | None = None
  top: float | None = None
  width: float | None = None
  height: float | None = None
  hidden: bool = False


class _Alias(msgspec.Struct):
  parent: str
  rotate: int = 0
  h_flip: bool = msgspec.field(default=False, name="hFlip")
  v_flip: bool = msgspec.field(default=False, name="vFlip")
  hidden: bool = False


class _Set(msgspec.Struct):
  prefix: str
  icons: dict[str, _Icon]
  info: _Info = msgspec.field(default_factory=_Info)
  aliases: dict[str, _Alias] = msgspec.field(default_factory=dict)
  prefixes: dict[str, Any] = msgspec.field(default_factory=dict)
  suffixes: dict[str, Any] = msgspec.field(default_factory=dict)
  left: float = 0
  top: float = 0
  width: float = 16
  height: float = 16


class Icon(msgspec.Struct):
  """An icon before it is rendered.

  Attributes:
    key: "set:name", the name in iconify.
    body: content of its `<svg>` element, not checked.
    box: view box: left, top, width, height.
    texts: clean names, the first from `key`, the others from aliases.
    style: style words of the name, and "color" for sets with colours.
    set: name of the set.
    license: SPDX identifier.
  """

  key: str
  body: str
  box: tuple[float, float, float, float]
  texts: tuple[str, ...]
  style: str
  set: str
  license: str


class IconSet(NamedTuple):
  """A set with a permissive licence.

  Attributes:
    prefix: name of the set.
    title, author, license, url, category: facts about the set; `license` is an SPDX identifier.
    icons: its icons, one for each name and style.
    skips: icons that are left out, with reasons.
  """

  prefix: str
  title: str
  author: str
  license: str
  url: str
  category: str
  icons: list[Icon]
  skips: list[Skip]


class Package:
  """The sets of a package.

  Args:
    path: folder or `.tgz` archive.

  Attributes:
    version: version of the package; known after `sets`.
    digest: 16 hex digits of the content that was used; known after `sets`.
    other_licenses: sets and icons by licence that is not permissive; known after `sets`.

  Raises:
    ValueError: if the path is neither.
  """

  def __init__(self, path: Path):
    self._path = path
    self.version = "unknown"
    self.digest = ""
    self.other_licenses: dict[str, Counter[str]] = {}
    if not path.is_dir() and not path.is_file():
      raise ValueError(
        f"{fs.printable(str(path))}: expected the folder or .tgz archive of @iconify/json; "
        "`npm pack @iconify/json` downloads it"
      )

  def sets(self, excluded: frozenset[str] = CODE_SETS) -> Iterator[IconSet]:
    """Yield the sets with permissive licences, in the order of the archive.

    Args:
      excluded: sets to leave out.

    Raises:
      ValueError: if the package is damaged, too large, or contains no set.
    """
    digests: list[str] = []
    empty = True
    for name, data in self._files():
      empty = False
      found = _decode(f"{fs.printable(str(self._path))}: json/{name}.json", data, _Set)
      license = found.info.license.spdx or found.info.license.title or "unknown"
      if license not in PERMISSIVE:
        self.other_licenses.setdefault(license, Counter()).update(sets=1, icons=len(found.icons))
      elif name not in excluded:
        digests.append(f"{name} {hashlib.sha256(data).hexdigest()}")
        yield _icon_set(name, license, found)
    if empty:
      raise ValueError(
        f"{fs.printable(str(self._path))} contains no json/SET.json; expected the folder or .tgz "
        "archive of @iconify/json"
      )
    self.digest = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]

  def _files(self) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every set."""
    total = count = 0
    for path, data in _folder(self._path) if self._path.is_dir() else _archive(self._path):
      total, count = total + len(data), count + 1
      if total > MAX_TOTAL_BYTES or count > _MAX_FILES:
        raise ValueError(
          f"{fs.printable(str(self._path))} holds more than {MAX_TOTAL_BYTES >> 20} MiB or "
          f"{_MAX_FILES} files; is it @iconify/json?"
        )
      if match := _SET_FILE.fullmatch(path):
        yield match[1], data
      else:
        content = _decode(f"{fs.printable(str(self._path))}: package.json", data, dict[str, Any])
        self.version = str(content.get("version", "unknown"))[:100]


def _folder(folder: Path) -> Iterator[tuple[str, bytes]]:
  for path in [folder / "package.json", *sorted((folder / "json").glob("*.json"))]:
    name = path.relative_to(folder).as_posix()
    if path.is_file() and _is_used(name):
      yield name, fs.read_regular(str(path), _MAX_FILE_BYTES)


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
  try:
    with gzip.open(path) as unzipped:
      limited = cast(BinaryIO, _Limited(unzipped, str(path)))
      with tarfile.open(fileobj=limited, mode="r|") as tar:
        for member in tar:
          if member.isreg() and _is_used(member.name):
            if member.size > _MAX_FILE_BYTES:
              raise ValueError(
                f"{path}: {fs.printable(member.name)} has {member.size} bytes; expected at most "
                f"{_MAX_FILE_BYTES}"
              )
            file = tar.extractfile(member)
            assert file
            data = file.read()
            if len(data) != member.size:
              raise tarfile.ReadError(f"{fs.printable(member.name)} is truncated")
            yield member.name, data
  except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{fs.printable(str(path))} is not an intact .tgz archive ({error}); download it again with "
      "`npm pack @iconify/json`"
    ) from None


class _Limited:
  """A file of which at most `MAX_TOTAL_BYTES` can be read."""

  def __init__(self, file: Any, path: str):
    self._file, self._path, self._left = file, path, MAX_TOTAL_BYTES

  def read(self, size: int) -> bytes:
    data: bytes = self._file.read(size)
    self._left -= len(data)
    if self._left < 0:
      raise ValueError(
        f"{fs.printable(self._path)} holds more than {MAX_TOTAL_BYTES >> 20} MiB; is it "
        "@iconify/json?"
      )
    return data


def _is_used(name: str) -> bool:
  return bool(_SET_FILE.fullmatch(name) or _VERSION_FILE.fullmatch(name))


def _decode(what: str, data: bytes, kind: Any) -> Any:
  try:
    return msgspec.json.decode(data, type=kind)
  except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{what} is damaged ({error}); download the package again") from None


def _icon_set(prefix: str, license: str, found: _Set) -> IconSet:
  visible = {name: icon for name, icon in sorted(found.icons.items()) if not icon.hidden}
  names = SetNames(visible, found.prefixes, found.suffixes)
  skips = [
    Skip(f"{prefix}:{name}", "removed from its set") for name in found.icons.keys() - visible
  ]
  skips.sort(key=lambda skip: skip.key)
  more = _aliases(found)
  icons: dict[tuple[str, str], Icon] = {}
  for name, icon in visible.items():
    key, clean = f"{prefix}:{name}", names.clean(name)
    if not clean.text:
      skips.append(Skip(key, "name without a word"))
    elif clean in icons:
      skips.append(Skip(key, "other size or variant", icons[clean].key))
    else:
      others = (names.clean(alias).text for alias in more.get(name, ()))
      texts = dict.fromkeys([clean.text, *filter(None, others)])
      icons[clean] = Icon(
        key,
        icon.body,
        (
          found.left if icon.left is None else icon.left,
          found.top if icon.top is None else icon.top,
          found.width if icon.width is None else icon.width,
          found.height if icon.height is None else icon.height,
        ),
        tuple(texts)[:_MAX_TEXTS],
        " ".join(filter(None, [clean.style, "color" if found.info.palette else ""])),
        prefix,
        license,
      )
  info = found.info
  return IconSet(
    prefix,
    info.name,
    info.author.name,
    license,
    info.license.url or info.author.url,
    info.category,
    list(icons.values()),
    skips,
  )


def _aliases(found: _Set) -> dict[str, list[str]]:
  """Return the other names of each icon; those of mirrored or rotated icons are left out."""
  more: dict[str, list[str]] = {}
  for name, alias in sorted(found.aliases.items()):
    if not (alias.rotate or alias.h_flip or alias.v_flip or alias.hidden):
      more.setdefault(alias.parent, []).append(name)
  return more
