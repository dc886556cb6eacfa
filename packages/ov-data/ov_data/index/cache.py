"""Local files with the indexes of data in remote or read-only folders."""

import hashlib
import os

from ov_data import fs
from ov_data.index.sidecar import SUFFIX


def cache_path(path: str) -> str:
  """Return the local path of the sidecar of a shard, in $OV_DATA_CACHE."""
  whole = path if fs.is_remote(path) else os.path.abspath(path)
  return os.path.join(folder(), hash_of(whole) + SUFFIX)


def folder() -> str:
  """Return the folder of the local files, $OV_DATA_CACHE or ~/.cache/ov_data."""
  return os.environ.get("OV_DATA_CACHE") or os.path.expanduser("~/.cache/ov_data")


def hash_of(text: str) -> str:
  """Return 32 hex digits for a file name."""
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
