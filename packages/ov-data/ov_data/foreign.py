"""Files that are no TFRecord shards: what they are, by their names, and how to use them."""

from collections.abc import Sequence
import re

from ov_data import fs

_CONVERT = "convert them to shards: bazel run //tools/data:convert -- --input=... --output=FOLDER"
_LIST = f"list the images in a captions.jsonl, then {_CONVERT}"

_KINDS = {  # endings -> (one file, several files, remedy)
  r"tar": ("a tar file", "tar files", _CONVERT),
  r"(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)": (
    "a compressed tar file", "compressed tar files", f"uncompress them, then {_CONVERT}"
  ),
  r"(zip|7z|rar)": (
    "an archive", "archives", f"unpack them; then read a folder of class folders, or {_CONVERT}"
  ),
  r"(jsonl|ndjson)": ("a list of JSON lines", "lists of JSON lines", _CONVERT),
  r"(csv|tsv)": ("a table of text", "tables of text", _LIST),
  r"parquet": ("a Parquet file", "Parquet files", _LIST),
  r"(arrow|feather)": ("an Arrow file", "Arrow files", _LIST),
  r"(array_?record|riegeli)": (
    "an ArrayRecord file", "ArrayRecord files", "write the data set as TFRecord"
  ),
  r"(h5|hdf5|npz|npy|mdb|lmdb|beton|pkl|pickle)": (
    "a file of another format", "files of another format", _LIST
  ),
}  # fmt: skip


def describe(names: Sequence[str]) -> str:
  """Return what files are and how to use them; "" if none has a known ending of other formats.

  Args:
    names: of one file, or of those in a folder; the first kind that is found is described.
  """
  for ending, (one, several, remedy) in _KINDS.items():
    pattern = re.compile(rf".*\.{ending}(-\d+-of-\d+)?", re.S | re.I)
    found = [fs.basename(name) for name in names if pattern.fullmatch(name)]
    if len(found) == 1:
      return f"{one} ({fs.printable(found[0])}), no TFRecord shard; {remedy}"
    if found:
      return f"{len(found)} {several} ({fs.printable(found[0])} ...), no TFRecord shards; {remedy}"
  return ""
