"""What can be converted: four kinds of image collections, each read into a list of `Item`.

Nothing is opened here but lists: an item says where its image and text lie (a file, or a stretch of
a tar file). Mistakes in a list are errors with file and line; an item that cannot be used is a
`Skip` with a reason.
"""

from collections.abc import Iterator
import dataclasses
import glob
import json
import os
from pathlib import Path, PurePosixPath
import re
import tarfile
from typing import Any, Literal

from ov_data.writer import Skip

Format = Literal["jsonl", "classes", "coco", "webdataset"]
FORMATS = ("jsonl", "classes", "coco", "webdataset")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_LISTS = ("captions.jsonl", "labels.jsonl")


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
  """Bytes on disk: a file, or `size` bytes of it from `offset`."""

  path: str
  offset: int = 0
  size: int | None = None  # None: to the end


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """One picture and what is said of it."""

  key: str  # unique and independent of where the data lie
  image: Blob
  captions: tuple[str, ...] = ()
  label: str | None = None
  text: Blob | None = None  # a caption still to be read
  meta: Blob | None = None  # JSON with a caption still to be read


@dataclasses.dataclass(frozen=True)
class Inputs:
  """All items in the order found, and what the lists hold that is no item."""

  format: Format
  items: list[Item]
  skips: list[Skip]


def read(path: str, format: str = "auto", images: str = "") -> Inputs:
  """Lists the items of a collection.

  Args:
    path: a folder, a .jsonl or .json file, a tar file or a glob or {000..099} range of them.
    format: one of FORMATS, or "auto".
    images: folder of the pictures that lists name; "" is the folder of the list.

  Raises:
    ValueError: the format cannot be told, a list is malformed (names file and line), or nothing
      was found.
    OSError: a list cannot be read.
  """
  if format == "auto":
    format = _detect(path)
  if format not in FORMATS:
    raise ValueError(f"format={format!r}: expected auto or one of {', '.join(FORMATS)}.")
  if images and not os.path.isdir(images):
    raise ValueError(f"--images={images}: no such folder.")
  if format == "jsonl":
    result = _jsonl(_list_file(path), images)
  elif format == "classes":
    result = _classes(path)
  elif format == "coco":
    result = _coco(path, images)
  else:
    result = _webdataset(_tars(path))
  if not result.items and not result.skips:
    raise ValueError(f"{path}: no images found (read as {format}).")
  return result


def _detect(path: str) -> Format:
  if path.endswith(".jsonl"):
    return "jsonl"
  if path.endswith(".json"):
    return "coco"
  if path.endswith(".tar") or any(c in path for c in "*?{"):
    return "webdataset"
  if not os.path.isdir(path):
    raise ValueError(f"{path}: no such file or folder.")
  names = sorted(os.listdir(path))
  if any(name in names for name in _LISTS):
    return "jsonl"
  if any(name.endswith(".tar") for name in names):
    return "webdataset"
  if any(_images_below(Path(path) / name) for name in names if (Path(path) / name).is_dir()):
    return "classes"
  raise ValueError(
    f"{path}: found none of captions.jsonl, labels.jsonl, *.tar, or folders of images; "
    f"say what it is with --format={'|'.join(FORMATS)}."
  )


# Lists in JSON lines: {"file": ..., "captions": [...]} and/or {"label": ...}


def _list_file(path: str) -> Path:
  if not os.path.isdir(path):
    return Path(path)
  found = [Path(path) / name for name in _LISTS if (Path(path) / name).exists()]
  if not found:
    raise ValueError(f"{path}: holds neither of {', '.join(_LISTS)}.")
  return found[0]


def _jsonl(path: Path, images: str) -> Inputs:
  root = Path(images) if images else path.parent
  captions: dict[str, list[str]] = {}
  labels: dict[str, str] = {}
  skips: list[Skip] = []
  for where, row in _json_lines(path):
    file = row.get("file")
    if not isinstance(file, str) or not file:
      raise ValueError(f'{where}: expected "file": "name of an image", found {file!r:.60}.')
    said = row.get("captions", row.get("caption", []))
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
      raise ValueError(f'{where}: expected "captions": ["text", ...], found {said!r:.60}.')
    label = row.get("label")
    if not isinstance(label, str | int | None):
      raise ValueError(f'{where}: expected "label": "name", found {label!r:.60}.')
    if "captions" not in row and "caption" not in row and label is None:
      raise ValueError(
        f'{where}: expected "captions" or "label", found {", ".join(sorted(row))[:80]}.'
      )
    captions.setdefault(file, []).extend(said)
    if label is not None:
      if labels.setdefault(file, str(label)) != str(label):
        raise ValueError(f"{where}: {file} was labelled {labels[file]!r} before, now {label!r}.")
  items = []
  for file, texts in captions.items():
    if not _is_inside(file):
      skips.append(Skip(file, "path outside the folder"))
      continue
    items.append(Item(file, Blob(str(root / file)), _clean(texts), labels.get(file)))
  return Inputs("jsonl", items, skips)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  with open(path, "rb") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      where = f"{path}, line {number}"
      try:
        row = json.loads(line)
      except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from None
      if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {str(row)[:60]}.")
      yield where, row


# Folders of images; the name of the folder is the label.


def _classes(path: str) -> Inputs:
  if not os.path.isdir(path):
    raise ValueError(f"{path}: expected a folder with one folder of images for each class.")
  root = Path(path)
  items = [
    Item(image.relative_to(root).as_posix(), Blob(str(image)), label=folder.name)
    for folder in sorted(p for p in root.iterdir() if p.is_dir())
    for image in _images_below(folder)
  ]
  return Inputs("classes", items, [])


def _images_below(folder: Path) -> list[Path]:
  return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


# COCO captions.


def _coco(path: str, images: str) -> Inputs:
  if not images:
    raise ValueError(f"{path}: COCO lists need the folder of their pictures: --images=FOLDER.")
  try:
    content = json.loads(Path(path).read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error}).") from None
  if not isinstance(content, dict) or not isinstance(content.get("images"), list):
    raise ValueError(f'{path}: expected COCO\'s {{"images": [...], "annotations": [...]}}.')
  captions: dict[Any, list[str]] = {}
  for i, annotation in enumerate(content.get("annotations") or []):
    if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
      raise ValueError(
        f"{path}: annotations[{i}] has no caption (a list of instances?); "
        "use the captions_*.json of COCO."
      )
    captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
  items, skips = [], []
  for i, image in enumerate(content["images"]):
    name = image.get("file_name") if isinstance(image, dict) else None
    if not isinstance(name, str) or "id" not in image:
      raise ValueError(f"{path}: images[{i}] has no id or file_name.")
    if not _is_inside(name):
      skips.append(Skip(name, "path outside the folder"))
      continue
    said = captions.pop(image["id"], [])
    items.append(Item(name, Blob(os.path.join(images, name)), _clean(said)))
  skips += [Skip(f"image_id {i}", "caption without image") for i in captions]
  return Inputs("coco", items, skips)


# WebDataset: members of one name up to its first dot belong together; `cls` is a label.

_WDS_IMAGES = ("jpg", "jpeg", "png", "webp")
_WDS_TEXTS = ("txt", "text", "caption")


def _tars(path: str) -> list[str]:
  if os.path.isdir(path):
    paths = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
  else:
    paths = [p for part in _expand_ranges(path) for p in (sorted(glob.glob(part)) or [part])]
  missing = [p for p in paths if not os.path.isfile(p)]
  if not paths or missing:
    what = f"{len(missing)} of {len(paths)} files are missing, {missing[0]} first" if paths else ""
    raise ValueError(f"{path}: {what or 'no tar file matches'}.")
  return paths


def _expand_ranges(path: str) -> list[str]:
  """data-{008..010}.tar -> data-008.tar, data-009.tar, data-010.tar"""
  match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
  if not match:
    return [path]
  low, high = match.groups()
  return [
    expanded
    for i in range(int(low), int(high) + 1)
    for expanded in _expand_ranges(
      path[: match.start()] + str(i).zfill(len(low)) + path[match.end() :]
    )
  ]


def _webdataset(paths: list[str]) -> Inputs:
  items: list[Item] = []
  skips: list[Skip] = []
  for path in paths:
    parts: dict[str, dict[str, Blob]] = {}
    name = os.path.basename(path)
    try:
      for member, blob in _members(path):
        key, _, suffix = member.rpartition("/")[2].partition(".")
        folder = member.rpartition("/")[0]
        if not _is_inside(member):
          skips.append(Skip(f"{name}/{member}", "path outside the folder"))
        elif key:
          parts.setdefault(f"{folder}/{key}" if folder else key, {})[suffix.lower()] = blob
    except (tarfile.TarError, OSError, EOFError) as error:
      if not parts:
        raise ValueError(f"{path}: no tar file that can be read ({error}).") from None
      skips.append(Skip(name, "broken tar file", f"{error}; what lies before it is used"))
    for key, blobs in parts.items():
      image = next((blobs[s] for s in _WDS_IMAGES if s in blobs), None)
      if image is None:
        skips.append(Skip(f"{name}/{key}", "no image", f"has {', '.join(sorted(blobs))}"))
        continue
      text = next((blobs[s] for s in _WDS_TEXTS if s in blobs), None)
      label = blobs.get("cls")
      items.append(
        Item(
          f"{name}/{key}",
          image,
          label=read_blob(label, 1000).decode("utf-8", "replace").strip() if label else None,
          text=text,
          meta=blobs.get("json"),
        )
      )
  return Inputs("webdataset", items, skips)


def _members(path: str) -> Iterator[tuple[str, Blob]]:
  """Regular files of an uncompressed tar, with where their bytes lie. Links are passed over."""
  size = os.path.getsize(path)
  with tarfile.open(path, "r:") as tar:
    for member in tar:
      tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
      if member.isreg() and not member.issparse():
        if member.offset_data + member.size > size:
          raise tarfile.ReadError(f"{member.name} is cut off")
        yield member.name, Blob(path, member.offset_data, member.size)
  if read_blob(Blob(path, size - 512), 512).strip(b"\0"):
    raise tarfile.ReadError("no end mark; probably cut off")


def read_blob(blob: Blob, limit: int) -> bytes:
  """At most `limit` bytes of it."""
  with open(blob.path, "rb") as file:
    file.seek(blob.offset)
    return file.read(limit if blob.size is None else min(limit, blob.size))


def _is_inside(name: str) -> bool:
  """Whether a relative name stays in its folder."""
  path = PurePosixPath(name.replace("\\", "/"))
  drive = re.match(r"[A-Za-z]:", name)
  return not path.is_absolute() and ".." not in path.parts and not drive and "\0" not in name


def _clean(captions: list[str]) -> tuple[str, ...]:
  """Without empty and repeated ones."""
  return tuple(dict.fromkeys(text.strip() for text in captions if text.strip()))
