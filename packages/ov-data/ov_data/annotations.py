"""Annotations: one Parquet file per shard with a row of facts about each record of a source.

    00000.parquet, 00001.parquet, ...   one per shard, in the order of the source
    annotations.json                    written last: source, rows of each file, columns, checksums

Pages have the checksums of Parquet; the footers that describe them have theirs in annotations.json.

| Column | Type | Content |
|---|---|---|
| record | int64 | number of the record in the source |
| error, location | string | why the record is unusable, and where it is; null if it is usable |
| width, height | int32 | size of the upright image in pixels |
| content_hash | 16 bytes | BLAKE2b of the encoded image |
| perceptual_hash | uint64 | see `ov_data.perceptual_hash` |
| image_embedding | float16 [E] | unit vector, with a model |
| text_embedding | float16 [E] | unit vector of the first caption, with a text tower |
| similarity | float32 | their dot product before rounding |
| texts | list of string | all captions, if requested |
| caption_log_likelihood | float32 | mean per token of the first caption, with a captioner |
| other names | float32 | linear heads on the image embedding before rounding |

//tools/data:recaption writes the same files with record, error, location and these columns:

| Column | Type | Content |
|---|---|---|
| captions | list of string | generated captions |
| prompt_tokens, completion_tokens | int64 | tokens that were read and generated; null if unknown |

An unusable record has nulls, a record without caption has no text_embedding and similarity.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import json
import logging
import pathlib
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import fs, manifest

FORMAT = "ov_data annotations 1"
MANIFEST = "annotations.json"
_MAX_BYTES = 256 << 20
_RECIPE = b"ov_data recipe"
_ROW_GROUP = 4096
_TAIL_BYTES = 8  # length of the footer, and magic bytes

log = logging.getLogger("ov_data")


@dataclasses.dataclass(frozen=True)
class Info:
  """Content of annotations.json.

  Attributes:
    source: identity of the source, see `ov_data.keep_list.identity`.
    path: path of the source when it was annotated.
    rows: number of records of each shard.
    model: fingerprint of the model; "" without one.
    columns: names of the columns.
    dim: size E of the embeddings; 0 without a model.
    footers: crc32c of the footer of each file.
  """

  source: str
  path: str
  rows: tuple[int, ...]
  model: str
  columns: tuple[str, ...]
  dim: int
  footers: tuple[int, ...] = ()


_FIELDS = {field.name for field in dataclasses.fields(Info)}


@dataclasses.dataclass
class Rows:
  """Rows of one shard. Lists of equal length; None is a null."""

  record: list[int] = dataclasses.field(default_factory=list)
  error: list[str | None] = dataclasses.field(default_factory=list)
  location: list[str | None] = dataclasses.field(default_factory=list)
  width: list[int | None] = dataclasses.field(default_factory=list)
  height: list[int | None] = dataclasses.field(default_factory=list)
  content_hash: list[bytes | None] = dataclasses.field(default_factory=list)
  perceptual_hash: list[int | None] = dataclasses.field(default_factory=list)
  image_embedding: list[NDArray[np.float16] | None] = dataclasses.field(default_factory=list)
  text_embedding: list[NDArray[np.float16] | None] = dataclasses.field(default_factory=list)
  similarity: list[float | None] = dataclasses.field(default_factory=list)
  texts: list[list[str] | None] = dataclasses.field(default_factory=list)
  captions: list[list[str] | None] = dataclasses.field(default_factory=list)
  prompt_tokens: list[int | None] = dataclasses.field(default_factory=list)
  completion_tokens: list[int | None] = dataclasses.field(default_factory=list)
  # Columns that are not named above, such as those of linear heads.
  more: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)

  def column(self, name: str) -> list[Any]:
    """Return the values of a column."""
    return self.more[name] if name in self.more else getattr(self, name)


_COMMON = ("record", "error", "location")
LIKELIHOOD = "caption_log_likelihood"
CAPTION_COLUMNS = (*_COMMON, "captions", "prompt_tokens", "completion_tokens")


def columns_of(has_images: bool, has_texts: bool) -> tuple[str, ...]:
  """Return the names of the columns, with a model or a model with texts."""
  names = (*_COMMON, "width", "height", "content_hash", "perceptual_hash")
  images = ("image_embedding",) if has_images else ()
  return (*names, *images, *(("text_embedding", "similarity") if has_texts else ()))


def number_columns(columns: Sequence[str]) -> frozenset[str]:
  """Return the columns with one number per record, except hashes."""
  fixed = {"record", "width", "height", "similarity", "prompt_tokens", "completion_tokens"}
  named = {field.name for field in dataclasses.fields(Rows)}
  return frozenset(name for name in columns if name in fixed or name not in named)


class Writer:
  """Writes the files of a folder, and recognizes those that are complete.

  Args:
    folder: folder of the annotations.
    info: source, columns and model of the annotations.
    recipe: everything that determines the content, except the bytes of the images.

  Attributes:
    damaged: number of damaged files that were set aside.

  Raises:
    ImportError: if pyarrow is not installed.
  """

  def __init__(self, folder: pathlib.Path, info: Info, recipe: str):
    self._folder, self._info, self._recipe = folder, info, recipe.encode()
    self._schema = _schema(info.columns, info.dim).with_metadata({_RECIPE: self._recipe})
    self.damaged = 0

  def check_recipe(self) -> None:
    """Check that the folder has no annotations of another source, model or version.

    Raises:
      ValueError: if a file belongs to another recipe.
    """
    parquet = _parquet()
    for file in sorted(self._folder.glob("*.parquet")):
      try:
        found = (parquet.read_schema(file).metadata or {}).get(_RECIPE)
      except _errors():
        continue  # damaged; set aside by `is_complete`
      if found != self._recipe:
        raise ValueError(
          f"{file} was written for other data, another model or other settings; choose another "
          "--output, or remove the folder"
        )

  def is_complete(self, shard: int, rows: int) -> bool:
    """Return whether a file exists and is intact; a damaged one is set aside."""
    file = file_of(self._folder, shard)
    if not file.exists():
      return False
    try:
      table = _read(file, None)
      if table.schema.equals(self._schema) and table.num_rows == rows:
        return True
      error = f"{table.num_rows} rows, expected {rows}"
    except _errors() as failure:
      error = str(failure).partition("\n")[0]
    number = 0
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
      number += 1
    log.warning("%s is damaged (%s); moved to %s and computed again", file, error, aside.name)
    file.rename(aside)
    self.damaged += 1
    return False

  def write(self, shard: int, rows: Rows) -> None:
    """Write the file of a shard atomically."""
    import pyarrow as pa

    arrays = [_array(rows.column(field.name), field.type) for field in self._schema]
    table = pa.Table.from_arrays(arrays, schema=self._schema)
    buffer = io.BytesIO()
    _parquet().write_table(
      table, buffer, row_group_size=_ROW_GROUP, compression="zstd", use_dictionary=False,
      write_page_checksum=True,
    )  # fmt: skip
    fs.write_atomic(str(file_of(self._folder, shard)), buffer.getvalue())

  def finish(self) -> "Annotations":
    """Write annotations.json and return the annotations."""
    footers = tuple(_footer(file_of(self._folder, shard)) for shard in range(len(self._info.rows)))
    info = dataclasses.replace(self._info, footers=footers)
    content = manifest.add_checksum({"format": FORMAT, **dataclasses.asdict(info)})
    fs.write_atomic(str(self._folder / MANIFEST), json.dumps(content).encode())
    return Annotations(self._folder, info)


class Annotations:
  """The complete annotations in a folder.

  Attributes:
    info: content of annotations.json.
  """

  def __init__(self, folder: pathlib.Path, info: Info):
    self._folder, self.info = folder, info

  @classmethod
  def open(cls, folder: str) -> Self:
    """Open a folder.

    Raises:
      ValueError: if the folder holds no complete annotations.
    """
    path = pathlib.Path(folder)
    try:
      content = json.loads(fs.read_regular(str(path / MANIFEST), _MAX_BYTES))
      if content["format"] != FORMAT or content != manifest.add_checksum(content):
        raise ValueError("another format, or the checksum does not match")
      fields: dict[str, Any] = {key: value for key, value in content.items() if key in _FIELDS}
      for key in ("rows", "columns", "footers"):
        fields[key] = tuple(fields[key])
      info = Info(**fields)
    except FileNotFoundError:
      raise ValueError(
        f"{path} has no {MANIFEST}: expected a folder that //tools/data:annotate or :recaption has "
        "completed; repeat that command"
      ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise ValueError(
        f"{path / MANIFEST} is not usable ({error}); repeat the command that wrote it"
      ) from None
    return cls(path, info)

  def __len__(self) -> int:
    """Return the number of records."""
    return sum(self.info.rows)

  def read(self, shard: int, names: Sequence[str]) -> Mapping[str, Any]:
    """Return columns of a shard.

    Args:
      shard: number of the shard.
      names: names of the columns.

    Returns:
      Masked arrays of numbers [n], lists for text and bytes, and for embeddings a float16 [n, E]
      array with zeros for nulls.

    Raises:
      ValueError: if the file is missing, damaged, or has no such column.
    """
    file = file_of(self._folder, shard)
    for name in names:
      if name not in self.info.columns:
        raise ValueError(
          f"{self._folder} has no column {name!r}; it has {', '.join(self.info.columns)}"
          + ("" if self.info.model else ". Annotate with --model for embeddings and similarity")
        )
    try:
      if _footer(file) != self.info.footers[shard]:
        raise ValueError("the checksum of its footer does not match")
      table = _read(file, list(names))
      if table.num_rows != self.info.rows[shard]:
        raise ValueError(f"{table.num_rows} rows, expected {self.info.rows[shard]}")
    except _errors() as error:
      reason = str(error).partition("\n")[0]
      raise ValueError(
        f"{file} is not usable ({reason}); repeat the command that wrote it"
      ) from None
    return {name: _values(table.column(name).combine_chunks()) for name in names}


def file_of(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """Return the file of a shard."""
  return folder / f"{shard:05}.parquet"


def _schema(columns: Sequence[str], dim: int) -> Any:
  _parquet()
  import pyarrow as pa

  vector = pa.list_(pa.float16(), dim)
  types = {
    "record": pa.int64(), "error": pa.string(), "location": pa.string(), "width": pa.int32(),
    "height": pa.int32(), "content_hash": pa.binary(16), "perceptual_hash": pa.uint64(),
    "image_embedding": vector, "text_embedding": vector, "similarity": pa.float32(),
    "texts": pa.list_(pa.string()), "captions": pa.list_(pa.string()),
    "prompt_tokens": pa.int64(), "completion_tokens": pa.int64(),
  }  # fmt: skip
  return pa.schema([(name, types.get(name, pa.float32())) for name in columns])


def _array(values: Sequence[Any], kind: Any) -> Any:
  import pyarrow as pa

  if not pa.types.is_fixed_size_list(kind):
    return pa.array(values, kind)
  blank = np.zeros(kind.list_size, np.float16)
  flat = np.concatenate([blank if v is None else v for v in values]) if values else blank[:0]
  is_null = pa.array([v is None for v in values], pa.bool_())
  return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), type=kind, mask=is_null)


def _values(array: Any) -> Any:
  """Return a column as numpy arrays or lists, see `Annotations.read`."""
  import pyarrow as pa

  if not (pa.types.is_fixed_size_list(array.type) or pa.types.is_primitive(array.type)):
    return array.to_pylist()
  is_null = array.is_null().to_numpy(zero_copy_only=False)
  if pa.types.is_primitive(array.type):
    return np.ma.masked_array(array.fill_null(0).to_numpy(zero_copy_only=False), is_null)
  vectors = np.zeros((len(array), array.type.list_size), np.float16)
  vectors[~is_null] = array.flatten().to_numpy().reshape(-1, array.type.list_size)
  return vectors


def _read(file: pathlib.Path, names: list[str] | None) -> Any:
  with _parquet().ParquetFile(file, page_checksum_verification=True) as opened:
    return opened.read(names)


def _footer(path: pathlib.Path) -> int:
  """Return the crc32c of the footer of a file, with its length and the magic bytes at the end."""
  with open(path, "rb") as file:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    length = int.from_bytes(tail[:4], "little")
    file.seek(max(0, size - _TAIL_BYTES - length))
    return google_crc32c.value(file.read())


def _errors() -> tuple[type[Exception], ...]:
  """Return the exceptions that a damaged file can cause."""
  import pyarrow as pa

  return (ValueError, OSError, pa.ArrowException)


def _parquet() -> Any:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(
      f"annotations require pyarrow, which is not installed ({error}); "
      "pip install 'ov-data[parquet]'"
    ) from None
  return parquet
