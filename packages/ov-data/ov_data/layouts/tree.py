"""Recursive listing of a folder, without hidden files and system folders."""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import functools
import os
import re

from ov_data import fs
from ov_data.links import target_outside

IMAGE_SUFFIXES = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp",
)  # fmt: skip
OTHER_IMAGE_SUFFIXES = (
  ".apng", ".arw", ".avif", ".cr2", ".dng", ".exr", ".heic", ".heif", ".ico", ".j2k", ".jp2",
  ".jxl", ".nef", ".pbm", ".pgm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff",
)  # fmt: skip
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test)[-_]?\d*")  # train2014
_NO_FOLDERS = frozenset(
  {
    "", "__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN", "RECYCLER", "#recycle", "@Recycle",
    "System Volume Information", "@eaDir", "#snapshot", "@Recently-Snapshot",
  }
)  # created by archivers, programs, file systems and network storage  # fmt: skip
_FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".tar")
_WORKERS = 16  # threads that list folders


@dataclasses.dataclass(frozen=True)
class Tree:
  """The files below a folder.

  Attributes:
    root: path of the folder.
    folders: sorted file names by folder; "" is the root.
    top: sorted names of the folders in the root.
    hidden: ignored hidden files and folders, relative to the root.
    links: links to folders that were not followed because they may form cycles.
    outside: links to folders outside the root that were not followed, with their targets.
    follow_links: whether to follow links that point outside the root.
  """

  root: str
  folders: dict[str, list[str]]
  top: list[str]
  hidden: list[str]
  links: list[str]
  outside: dict[str, str] = dataclasses.field(default_factory=dict)
  follow_links: bool = False

  @functools.cached_property
  def images_by_top(self) -> dict[str, list[str]]:
    """The images below each folder of the root, relative to that folder, if there are any."""
    filled: dict[str, list[str]] = {}
    for folder in sorted(self.folders):
      images = [name for name in self.folders[folder] if is_image(name)]
      if folder and images:
        top, _, below = folder.partition("/")
        filled.setdefault(top, []).extend(join_names(below, name) for name in images)
    return filled

  def files(self) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of every file, folders in sorted order."""
    for folder in sorted(self.folders):
      for name in self.folders[folder]:
        yield folder, name


def walk(root: str, follow_links: bool = False) -> Tree:
  """List a folder recursively.

  Links to folders are followed only in the root, and not to parents of the root, to avoid cycles.
  Names with an image suffix are treated as files.

  Args:
    root: path of the folder.
    follow_links: whether to follow links to folders outside the root.

  Raises:
    OSError: if a folder cannot be listed.
  """
  folders: dict[str, list[str]] = {}
  hidden: list[str] = []
  links: list[str] = []
  outside: dict[str, str] = {}
  top: list[str] = []
  level = [""]
  with futures.ThreadPoolExecutor(_WORKERS, "ov-list") as pool:
    while level:
      below: list[str] = []
      listed = pool.map(lambda folder: _list(root, folder), level)
      for folder, (files, subfolders, linked, passed) in zip(level, listed):
        folders[folder] = sorted(files)
        hidden += [join_names(folder, name) for name in passed]
        links += [join_names(folder, name) for name in linked]
        for name in sorted(subfolders):
          target = None if folder or follow_links else target_outside(root, name)
          if target is None:
            below.append(join_names(folder, name))
          else:
            outside[name] = target
      if level == [""]:
        top = list(below)
      level = below
  return Tree(root, folders, top, sorted(hidden), sorted(links), outside, follow_links)


def join_names(folder: str, name: str) -> str:
  """Return the name of a file relative to the root."""
  return f"{folder}/{name}" if folder else name


def is_image(name: str) -> bool:
  """Return whether the name has the suffix of a supported image format."""
  return name.lower().endswith(IMAGE_SUFFIXES)


def is_unsupported_image(name: str) -> bool:
  """Return whether the name has the suffix of an unsupported image format."""
  return name.lower().endswith(OTHER_IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
  """Return whether a file or folder is hidden or a system folder."""
  return name.startswith(".") or name in _NO_FOLDERS


def _list(root: str, folder: str) -> tuple[list[str], list[str], list[str], list[str]]:
  """Return the names of files, folders, links that are not followed, and hidden entries."""
  files: list[str] = []
  folders: list[str] = []
  links: list[str] = []
  hidden: list[str] = []
  path = fs.join(root, folder) if folder else root
  if fs.is_remote(root):
    for name in fs.listdir(path):
      if is_hidden(name):
        hidden.append(name)
      elif name.lower().endswith((*IMAGE_SUFFIXES, *_FILE_SUFFIXES)):
        files.append(name)
      else:
        (folders if fs.is_dir(fs.join(path, name)) else files).append(name)
    return files, folders, links, hidden
  with os.scandir(path) as entries:
    for entry in entries:
      if is_hidden(entry.name):
        hidden.append(entry.name)
      elif is_image(entry.name) or not _is_folder(entry):
        files.append(entry.name)
      elif entry.is_symlink() and (folder or _points_to_parent(entry.path, root)):
        links.append(entry.name)
      else:
        folders.append(entry.name)
  return files, folders, links, hidden


def _is_folder(entry: os.DirEntry[str]) -> bool:
  if entry.is_symlink():
    return os.path.isdir(entry.path)  # False for broken and cyclic links
  return entry.is_dir()


def _points_to_parent(link: str, root: str) -> bool:
  """Return whether a link points to the root or to a parent of the root."""
  target, real_root = os.path.realpath(link), os.path.realpath(root)
  return os.path.commonpath([target, real_root]) == target
