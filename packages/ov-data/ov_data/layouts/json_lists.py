"""JSON files that list a whole data set: COCO's captions and Karpathy's splits."""

import errno
import json
from typing import Any

from ov_data import fs
from ov_data.layouts import text_rules

_MAX_BYTES = 1 << 30  # COCO's split file has 0.14 GB


def load(path: str) -> dict[str, Any]:
  """Return the content of the file, an object with a list under "images".

  Raises:
    ValueError: the file is missing, no regular file, too large, or holds something else.
    OSError: it cannot be read.
  """
  try:
    text = text_rules.decode(fs.read_regular(path, _MAX_BYTES))
    content = json.loads(text, object_hook=_without_tokens)
  except FileNotFoundError:
    what = "not a regular file" if fs.exists(path) else "no such file"
    raise ValueError(f"no split file at {path}: {what}") from None
  except OSError as error:
    if error.errno != errno.EFBIG:
      raise
    raise ValueError(f"{path}: over 1 GiB, which no split file has") from None
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}); is the file "
      "complete?"
    ) from None
  except ValueError as error:  # a number of thousands of digits
    raise ValueError(f"{path}: not a split file ({error})") from None
  except RecursionError:
    raise ValueError(f"{path}: not a split file, its JSON is nested too deeply") from None
  if not isinstance(content, dict) or not isinstance(content.get("images"), list):
    raise ValueError(
      f'{path}: expected {{"images": [...]}} with at least one, as in dataset_coco.json or COCO\'s '
      "captions_*.json"
    )
  return content


def is_coco(content: dict[str, Any]) -> bool:
  """Return whether the file has COCO's own form, "file_name" and "annotations"."""
  first = next(iter(content["images"]), None)
  if isinstance(first, dict) and "filename" in first:
    return False
  return "annotations" in content or (isinstance(first, dict) and "file_name" in first)


def _without_tokens(value: dict[str, Any]) -> dict[str, Any]:
  """Drop the words of each sentence while the file is read: most of its memory, and unused."""
  value.pop("tokens", None)
  return value
