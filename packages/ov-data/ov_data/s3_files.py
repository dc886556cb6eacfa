"""Files on S3 and on stores with its protocol, through pyarrow.

Credentials come from the environment, the AWS configuration or the instance, as in the AWS tools.
$AWS_ENDPOINT_URL_S3 or $AWS_ENDPOINT_URL selects another store.
"""

from collections.abc import Sequence
import fnmatch
import functools
import glob as local_glob
import os
from typing import Any
from urllib import parse

PREFIX = "s3://"

Status = tuple[int, int, int, int]


def exists(path: str) -> bool:
  """Return whether the object or folder exists."""
  return _type(path) != "NotFound"


def isdir(path: str) -> bool:
  """Return whether there are objects below the path."""
  return _type(path) == "Directory"


def makedirs(path: str) -> None:
  """Do nothing: S3 has no folders."""


def status(path: str) -> Status | None:
  """Return the size and time of an object; None if it does not exist."""
  system, name = _open(path)
  return _status(system.get_file_info(name))


def statuses(paths: Sequence[str]) -> list[Status | None]:
  """Return the status of many objects; folders are listed, with 1000 objects per request."""
  found: dict[str, Status | None] = {}
  for folder in {path.rpartition("/")[0] for path in paths}:
    found |= {f"{folder}/{info.base_name}": _status(info) for info in _list(folder)}
  return [found.get(path) for path in paths]


def listdir(path: str) -> list[str]:
  """Return the names in a folder."""
  return [info.base_name for info in _list(path)]


def glob(pattern: str) -> list[str]:
  """Return the paths that match; `*` does not match a slash."""
  bucket, *parts = pattern.removeprefix(PREFIX).split("/")
  found = [PREFIX + bucket]
  for number, part in enumerate(parts, 1):
    if local_glob.has_magic(part):
      found = [
        f"{folder}/{name}"
        for folder in found
        if isdir(folder)
        for name in listdir(folder)
        if fnmatch.fnmatchcase(name, part)
      ]
    else:
      found = [f"{folder}/{part}" for folder in found]
      if number == len(parts):
        found = [path for path in found if exists(path)]
  return found


def open_read(path: str) -> Any:
  """Open an object for sequential reading."""
  system, name = _open(path)
  return system.open_input_stream(name, buffer_size=8 << 20)


def open_random(path: str) -> Any:
  """Open an object for `read_at(length, offset)`, which any thread may call."""
  system, name = _open(path)
  return system.open_input_file(name)


def write(path: str, data: bytes) -> None:
  """Write an object, which appears when it is complete."""
  system, name = _open(path)
  with system.open_output_stream(name) as stream:
    stream.write(data)


def _type(path: str) -> str:
  system, name = _open(path)
  return system.get_file_info(name).type.name


def _status(info: Any) -> Status | None:
  return (info.size, info.mtime_ns, 0, 0) if info.type.name == "File" else None


def _list(folder: str) -> list[Any]:
  from pyarrow import fs

  system, name = _open(folder)
  return system.get_file_info(fs.FileSelector(name, allow_not_found=True))


def _open(path: str) -> tuple[Any, str]:
  """Return the file system of a path, and the path in it."""
  name = path.removeprefix(PREFIX).rstrip("/")
  bucket = name.partition("/")[0]
  addresses = (os.environ.get(key) for key in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
  return _system(bucket, next(filter(None, addresses), "")), name


@functools.cache
def _system(bucket: str, endpoint: str) -> Any:
  try:
    from pyarrow import fs
  except ImportError as error:
    raise ImportError(
      f"reading {PREFIX}{bucket} requires pyarrow, which is not installed ({error}); "
      "pip install 'ov-data[parquet]', or copy the data to a local directory"
    ) from None
  region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
  if endpoint:
    address = parse.urlsplit(endpoint)
    return fs.S3FileSystem(
      endpoint_override=address.netloc, scheme=address.scheme, region=region or "us-east-1"
    )
  return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket))
