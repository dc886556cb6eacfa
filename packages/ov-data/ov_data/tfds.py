"""Record source over directories written by TensorFlow Datasets."""

from typing import Any

from ov_data import fs, image_folder, manifest
from ov_data.array_records import ArrayRecords
from ov_data.manifest import TFDS_INFO
from ov_data.record_source import RecordSource
from ov_data.request import Request
from ov_data.shard_files import ShardFiles
from ov_data.shards import Shards

_FORMATS: dict[str, type[ShardFiles]] = {"tfrecord": Shards, "array_record": ArrayRecords}


def open_tfds(request: Request) -> RecordSource | None:
  """Open a folder with dataset_info.json; return None for any other path.

  Hugging Face also writes a file of that name; such a folder is left to the other formats.

  Raises:
    ValueError: see `ShardFiles`; also if the directory is damaged or has another file format.
    ImportError: if TensorFlow Datasets is not installed.
  """
  path = request.path
  if path is None or not fs.is_dir(path) or not fs.exists(fs.join(path, TFDS_INFO)):
    return None
  image_folder.check_image_root(request.source)
  if not manifest.is_tfds(path):
    return None  # the shards are opened by the names of the files
  files, file_format = _files(path, request.split.name)
  if file_format not in _FORMATS:
    raise ValueError(
      f"{path} holds {file_format} files; expected {' or '.join(_FORMATS)}. Write the data set "
      "with file_format='array_record'"
    )
  return _FORMATS[file_format](request, files)


def _files(path: str, split: str | None) -> tuple[list[str], str]:
  """Return the files of a split of a directory, and their format."""
  info = _info(path)
  splits, file_format = info.splits, getattr(info.file_format, "value", "tfrecord")
  if split is None and len(splits) == 1:
    split = next(iter(splits))
  if split not in splits:
    raise ValueError(
      f"{path} has the splits {', '.join(splits)}; split={split!r} is not one of them"
    )
  return [str(part.filename) for part in splits[split].file_instructions], file_format


def label_names(path: str, key: str) -> tuple[str, ...]:
  """Return the class names of a label of a directory of TensorFlow Datasets.

  Args:
    path: directory with dataset_info.json.
    key: feature of the label.

  Raises:
    ValueError: if the directory is damaged, or the feature is not a label with classes.
    ImportError: if TensorFlow Datasets is not installed.
  """
  names = getattr(dict(_info(path).features).get(key), "names", None)
  if not names:
    raise ValueError(f"{path} has no class names for feature {key!r}; expected a class label")
  return tuple(names)


def _info(path: str) -> Any:
  """Return the dataset info of a directory, with all properties loaded."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
      f"{path} is a TensorFlow Datasets directory, and that library is not installed ({error}); "
      "pip install 'ov-data[tensorflow]', or name its shards with a glob"
    ) from None
  try:
    info = tfds.builder_from_directory(path).info
    _ = info.splits, info.file_format, info.features
  except Exception as error:  # errors of protobuf, etils and TensorFlow
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{path} cannot be opened as a TensorFlow Datasets directory ({type(error).__name__}: "
      f"{reason}); copy {TFDS_INFO} and features.json again, or name its shards with a glob"
    ) from error
  return info
