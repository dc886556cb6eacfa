"""Descriptions and remedies for files in other formats than TFRecord."""

from collections.abc import Sequence
import re

from ov_data import fs

_CONVERT = "convert {it} to shards: bazel run //tools/data:convert -- --input=... --output=FOLDER"
_LIST = f"list the images in a captions.jsonl and {_CONVERT.replace('{it}', 'that')}"

_SEPARATE = "use a separate Source for each format"

_KINDS = {  # suffixes -> (singular, plural, remedy)
  r"tar": ("a tar file", "tar files", _SEPARATE),
  r"(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)": (
    "a compressed tar file", "compressed tar files",
    "decompress {it} (gunzip, unxz, zstd -d); uncompressed tars are read directly"
  ),
  r"(zip|7z|rar)": (
    "an archive", "archives", f"extract {{it}}, then {_CONVERT.replace('{it}', 'the folder')}"
  ),
  r"(jsonl|ndjson)": ("a list of JSON lines", "lists of JSON lines", _CONVERT),
  r"(csv|tsv|xlsx?)": ("a table", "tables", _LIST),
  r"parquet": ("a Parquet file", "Parquet files", _SEPARATE),
  r"(arrow|feather)": ("an Arrow file", "Arrow files", _LIST),
  r"(array_?record|riegeli)": (
    "an ArrayRecord file", "ArrayRecord files", _SEPARATE
  ),
  r"(h5|hdf5|npz|npy|mdb|lmdb|beton|pkl|pickle)": (
    "a file of another format", "files of another format", _LIST
  ),
}  # fmt: skip


def describe(names: Sequence[str], *, with_name: bool = True) -> str:
  """Return the file format and how to convert it; "" if no suffix is known.

  Args:
    names: file names; the first known format is described.
    with_name: whether to include the name of a file of that format.
  """
  for ending, (one, several, remedy) in _KINDS.items():
    pattern = re.compile(rf".*\.{ending}(-\d+-of-\d+)?", re.S | re.I)
    found = [fs.printable(fs.basename(name)) for name in names if pattern.fullmatch(name)]
    if len(found) == 1:
      name = f" ({found[0]})" if with_name else ""
      return f"{one}{name}, not a TFRecord shard; {remedy.format(it='it')}"
    if found:
      return f"{len(found)} {several} ({found[0]} ...), not TFRecord shards; " + remedy.format(
        it="them"
      )
  return ""
