"""Detection of the layout of a path."""

from collections.abc import Iterable, Mapping, Sequence
import os
import re
import stat

from ov_data import fs, links
from ov_data.layouts import classes, imagefolder, img2dataset, json_lists, jsonl, tar_members
from ov_data.layouts.images import UndefinedLayout
from ov_data.layouts.items import Collection
from ov_data.layouts.tree import Tree, is_image, is_unsupported_image, join_names

_TO_LISTS = (
  'write captions.jsonl next to the images, one {"file": "a.jpg", "captions": ["..."]} a line'
)
_LIST = re.compile(r"captions_.*\.json|dataset_(coco|flickr8k|flickr30k)\.json")
_NO_CAPTIONS = re.compile(r"(classes|readme|license).*\.txt|skipped\.jsonl|dataset\.json")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
_REMEDIES = {
  **dict.fromkeys(
    tar_members.COMPRESSED_TARS,
    "is a compressed tar; decompress it (gunzip, unxz, zstd -d) and pass the .tar",
  ),
  **dict.fromkeys((".zip", ".7z", ".rar"), "is an archive; extract it and pass the folder"),
  **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), "is compressed; decompress it first"),
  ".csv": f"is a table; name it metadata.csv with a column file_name, or {_TO_LISTS}",
  ".tsv": f"is a table; {_TO_LISTS}",
  ".xlsx": f"is a table; {_TO_LISTS}",
  ".txt": f"is a text file; {_TO_LISTS}",
  ".parquet": f"is a Parquet table, which is not supported; {_TO_LISTS}",
  ".arrow": f"is an Arrow table, which is not supported; {_TO_LISTS}",
  ".tfrecord": "already holds record shards; use it directly for training",
}


def guess_format(collection: Collection, formats: str, *, strict: bool = True) -> str:
  """Return the name of the layout.

  Args:
    collection: collection to inspect.
    formats: option that selects a format, for messages: "--format=jsonl|classes".
    strict: whether images next to class folders, and class folders of several splits, are
      ambiguous. Otherwise they are class folders.

  Raises:
    ValueError: if the layout is unknown or ambiguous; the message explains how to select one.
    OSError: if the path cannot be read.
  """
  path = collection.path
  lower = path.lower()
  if fs.is_dir(path):
    return _folder(collection, formats, strict)
  if not os.path.lexists(path) and not fs.is_remote(path):
    if any(c in path for c in "*?[{"):
      return "webdataset"
    raise ValueError(f"{path}: no such file or folder.")
  if not fs.is_remote(path):
    _check_regular(path)
  name = fs.basename(lower)
  if name in imagefolder.METADATA:
    return "imagefolder"
  if lower.endswith(".jsonl"):
    return "jsonl"
  if lower.endswith(".json"):
    return "coco" if json_lists.is_coco(collection.content) else "karpathy"
  if lower.endswith(".tar"):
    return "webdataset"
  raise ValueError(f"{path} {_remedy(path)}.")


def _check_regular(path: str) -> None:
  try:
    mode = os.stat(path).st_mode
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}; is it a broken link?") from None
  if not stat.S_ISREG(mode):
    raise ValueError(f"{path}: neither a folder nor a regular file; pass one of these.")


def _remedy(path: str) -> str:
  """Return a description of the file type and the remedy."""
  lower = path.lower()
  for suffix, remedy in _REMEDIES.items():
    if lower.endswith(suffix):
      return remedy
  if is_image(lower):
    return "is a single image; pass its folder"
  kind = None if fs.is_remote(path) else tar_members.compression(path)
  if kind is not None:
    return f"is compressed with {kind}; decompress or extract it first"
  return "is a file of an unknown type; expected a folder, .jsonl, .json or .tar"


def _folder(collection: Collection, formats: str, strict: bool) -> str:
  tree, path = collection.tree, collection.path
  top = tree.folders[""]
  has_list = any(name in top for name in jsonl.LISTS)
  metadata = [
    name for name in imagefolder.METADATA if any(name in n for n in tree.folders.values())
  ]
  if has_list and metadata:
    raise _ambiguous(
      path, f"holds {jsonl.LISTS[0]} or {jsonl.LISTS[1]}, and {metadata[0]}",
      ("jsonl", "imagefolder"),
    )  # fmt: skip
  if has_list:
    return "jsonl"
  if metadata:
    return "imagefolder"
  for folder, name in tree.files():
    if name in jsonl.LISTS or _LIST.fullmatch(name):
      raise ValueError(
        f"{path}: {join_names(folder, name)} could be the list of its images; pass that file or "
        f"its folder, or choose the format of this folder with {formats}."
      )
  images = sum(map(is_image, top)) + sum(map(len, tree.images_by_top.values()))
  tars = sum(name.lower().endswith(".tar") for _, name in tree.files())
  if tars and images:
    raise _ambiguous(
      path, f"holds {tars:,} tar files and {images:,} images", ("webdataset", "classes")
    )
  if tars:
    return "webdataset"
  if not images:
    raise ValueError(f"{path}: {_found(tree)}; choose the format with {formats}.")
  return _images(path, tree, formats, strict)


def _images(path: str, tree: Tree, formats: str, strict: bool) -> str:
  """Return the layout of a folder of images without lists."""
  filled = tree.images_by_top
  strays = [name for name in tree.folders[""] if is_image(name)]
  if img2dataset.has_numbered_folders(tree):
    return "img2dataset"
  if img2dataset.has_sidecars(tree):
    if not filled:
      return "img2dataset"
    raise _ambiguous(
      path,
      f"has captions in files next to images, and folders that could be classes ({_some(filled)})",
      ("img2dataset", "classes"),
    )
  if not filled:
    raise UndefinedLayout(
      f"the images are in {path} itself, which defines neither classes nor captions; expected a "
      "folder for each class, captions.jsonl, metadata.jsonl, or captions in files with the "
      f"names of the images; choose with {formats}."
    )
  if not strict:
    return "classes"
  if text := _captions_elsewhere(tree, filled):
    raise _ambiguous(
      path,
      f"holds {text}, which could hold the captions of its images",
      ("classes",),
      f"does not read it; or {_TO_LISTS}",
    )
  splits, nested = classes.split_names(filled)
  if nested or splits == [*filled]:
    raise _ambiguous(
      path,
      f"holds folders named like splits ({_some(splits)})",
      ("classes",),
      "makes them splits of the output if they contain class folders",
    )
  if strays:
    raise _ambiguous(
      path,
      f"holds {len(strays):,} images, {strays[0]} the first, next to folders of images "
      f"({_some(filled)})",
      ("classes",),
      "skips and counts them",
    )
  return "classes"


def _captions_elsewhere(tree: Tree, filled: Mapping[str, Sequence[str]]) -> str | None:
  """Return a file that could contain captions of images in class folders, or None."""
  top = tree.folders[""]
  suffixes = (*_TABLES, ".txt", ".json") if len(filled) == 1 else _TABLES
  for name in top:
    if name.lower().endswith(suffixes) and not _NO_CAPTIONS.fullmatch(name.lower()):
      return name
  stems = {name.rpartition(".")[0] for _, name in tree.files() if is_image(name)}
  for folder, name in tree.files():
    stem, _, suffix = name.rpartition(".")
    if folder and stem in stems and suffix.lower() in img2dataset.SIDECARS:
      return join_names(folder, name)  # not in the folder of the image
  return None


def _ambiguous(path: str, found: str, choices: tuple[str, ...], effect: str = "") -> ValueError:
  options = " or ".join(f"--format={choice}" for choice in choices)
  effect = f", which {effect}" if effect else ""
  return ValueError(
    f"{path} is ambiguous: it {found}; choose {options} (format of a Source){effect}."
  )


def _found(tree: Tree) -> str:
  """Return a description of a folder without images, lists and tars."""
  names = [join_names(folder, name) for folder, name in tree.files()]
  if tree.outside:
    name, target = next(iter(tree.outside.items()))
    return f"found links that point outside, for example {links.describe(name, target)}"
  if found := [name for name in names if is_unsupported_image(name)]:
    return (
      f"found {len(found):,} images of unsupported types such as {found[0]}; convert them to JPEG, "
      "PNG or WebP"
    )
  for suffix, remedy in _REMEDIES.items():
    if found := [name for name in names if name.lower().endswith(suffix)]:
      return f"found no images, but {len(found):,} files such as {found[0]}, which {remedy}"
  return (
    f"found none of {', '.join((*jsonl.LISTS, *imagefolder.METADATA[:2]))}, *.tar, or images "
    f"({len(names):,} files in {len(tree.folders):,} folders)"
  )


def _some(names: Iterable[str]) -> str:
  listed = [*names]
  return ", ".join(listed[:4]) + (" ..." if len(listed) > 4 else "")
