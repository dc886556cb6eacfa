"""Flags of the commands that run a model over a source."""

import os
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
  from ov_data import Dataset

INPUT = flags.DEFINE_string("input", None, "Source: shards, a list, or a folder of images.")
_SPLIT = flags.DEFINE_string("split", None, "Split or slice of the input, such as 'train[:1000]'.")
_FORMAT = flags.DEFINE_string("format", "auto", "Layout of image files, see ov_data.layouts.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the images of a list.")
_IMAGE_KEY = flags.DEFINE_string("image_key", "jpg", "Feature with the image, for shards.")
_CAPTION_KEYS = flags.DEFINE_list("caption_keys", None, "Features with captions; default: txt.")
_FOLLOW_LINKS = flags.DEFINE_bool("follow_links", False, "Follow links that leave the folder.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per batch of the model.")
MAX_BAD = flags.DEFINE_float("max_bad_fraction", 0.1, "Fraction of unusable images that stops.")


def open_input() -> "Dataset":
  """Open the source that the flags describe; the command has marked `--input` as required.

  Raises:
    ValueError, OSError: if it does not exist or is invalid; the messages address the user.
  """
  assert INPUT.value is not None
  import ov_serve  # imports JAX; missing flags are reported before

  return ov_serve.open_images(
    os.path.expanduser(INPUT.value),
    split=_SPLIT.value,
    format=_FORMAT.value,
    image_root=None if _IMAGES.value is None else os.path.expanduser(_IMAGES.value),
    image_key=_IMAGE_KEY.value,
    caption_keys=None if _CAPTION_KEYS.value is None else tuple(_CAPTION_KEYS.value),
    follow_links=_FOLLOW_LINKS.value,
  )
