"""JSON files that list a data set: COCO captions and Karpathy splits."""

import errno
import json
from typing import Any

from ov_data import fs
from ov_data.layouts import text_rules

_MAX_BYTES = 1 << 30  # dataset_coco.json has 0.14 GB


def load(path: str) -> dict[str, Any]:
  """Return the content of the file, an object with a list under "images".

  Raises:
    ValueError: if the file is missing, not a regular file, too large, or has other content.
    OSError: if the file cannot be read.
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
    raise ValueError(f"{path}: over 1 GiB, too large for a split file") from None
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}); is the file "
      "complete?"
    ) from None
  except ValueError as error:  # an integer with thousands of digits
    raise ValueError(f"{path}: not a split file ({error})") from None
  except RecursionError:
    raise ValueError(f"{path}: not a split file: its JSON is nested too deeply") from None
  if not isinstance(content, dict) or not isinstance(content.get("images"), list):
    raise ValueError(
      f'{path}: expected {{"images": [...]}} with at least one, as in dataset_coco.json or COCO\'s '
      "captions_*.json"
    )
  return content


def is_coco(content: dict[str, Any]) -> bool:
  """Return whether the file has the COCO format with "file_name" and "annotations"."""
  first = next(iter(content["images"]), None)
  if isinstance(first, dict) and "filename" in first:
    return False
  return "annotations" in content or (isinstance(first, dict) and "file_name" in first)


def _without_tokens(value: dict[str, Any]) -> dict[str, Any]:
  """Drop the unused tokens of each sentence during parsing, which need most of the memory."""
  value.pop("tokens", None)
  return value
