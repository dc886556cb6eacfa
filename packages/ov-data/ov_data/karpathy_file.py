"""Record source over Karpathy split files, see layouts/karpathy.py."""

from ov_data import fs
from ov_data.image_files import ImageFiles, check_some_exist, select_split
from ov_data.layouts import json_lists, jsonl, karpathy
from ov_data.record_source import RecordSource
from ov_data.request import Request


def open_karpathy(request: Request) -> RecordSource | None:
  """Open a split file; return None if the path is not a JSON file of that format.

  Raises:
    ValueError: if the file is malformed or has no images of the split.
    OSError: if the file cannot be read.
  """
  path, source = request.path, request.source
  if path is None or fs.is_dir(path) or not (source.format == "karpathy" or _is_guessed(request)):
    return None
  return KarpathyFile(request)


class KarpathyFile(ImageFiles):
  """The images of a split, each with all its sentences unmodified."""

  def __init__(self, request: Request):
    source, (path, *_) = request.source, request.source.paths
    entries = karpathy.entries(request.collection)
    kept = [entries[i] for i in select_split(path, request.split, [entry[1] for entry in entries])]
    names = [name for name, _, _ in kept]
    root = source.image_root or jsonl.parent(path)
    check_some_exist(path, root, names, source.follow_links)
    super().__init__(source, root, names, [sentences for _, _, sentences in kept])


def _is_guessed(request: Request) -> bool:
  collection = request.collection
  if request.source.format != "auto" or not collection.path.endswith(".json"):
    return False
  return not (collection.images and json_lists.is_coco(collection.content))
