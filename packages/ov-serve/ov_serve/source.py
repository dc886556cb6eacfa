"""Open the images of a path in any layout that ov_data reads, with or without captions."""

import dataclasses
import logging
from typing import Any

import ov_data
from ov_data.layouts.images import UndefinedLayout

log = logging.getLogger("ov_serve")

_CAPTIONS = ("txt",)


def open_images(
  path: str, *, caption_keys: tuple[str, ...] | None = None, **fields: Any
) -> ov_data.Dataset:
  """Open the images of a path.

  A folder of images without captions and classes is read in the layout `images`.

  Args:
    path: path of the data, see `ov_data.Source`.
    caption_keys: features with captions; by default "txt" if the records have it.
    **fields: other fields of the source.

  Raises:
    ValueError: if the path does not exist or its layout is ambiguous.
  """
  keys = _CAPTIONS if caption_keys is None else caption_keys
  source = ov_data.Source(path, caption_keys=keys, **fields)
  try:
    dataset = ov_data.Dataset(source)
  except UndefinedLayout:
    log.info("%s has neither captions nor classes; reading every image below it", path)
    return ov_data.Dataset(dataclasses.replace(source, format="images", caption_keys=()))
  if caption_keys is None and not set(keys) & dataset.present_keys:
    return ov_data.Dataset(dataclasses.replace(source, caption_keys=()))
  return dataset
