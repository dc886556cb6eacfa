"""Files that are not TFRecord shards: what they are, by their names, and how to use them."""

from collections.abc import Sequence
import re

from ov_data import fs

_CONVERT = "convert {it} to shards: bazel run //tools/data:convert -- --input=... --output=FOLDER"
_LIST = f"list the images in a captions.jsonl and {_CONVERT.replace('{it}', 'that')}"

_KINDS = {  # endings -> (one file, several files, remedy)
  r"tar": ("a tar file", "tar files", _CONVERT),
  r"(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)": (
    "a compressed tar file", "compressed tar files", f"uncompress {{it}}, then {_CONVERT}"
  ),
  r"(zip|7z|rar)": (
    "an archive", "archives", f"unpack {{it}}, then {_CONVERT.replace('{it}', 'the folder')}"
  ),
  r"(jsonl|ndjson)": ("a list of JSON lines", "lists of JSON lines", _CONVERT),
  r"(csv|tsv|xlsx?)": ("a table", "tables", _LIST),
  r"parquet": ("a Parquet file", "Parquet files", _LIST),
  r"(arrow|feather)": ("an Arrow file", "Arrow files", _LIST),
  r"(array_?record|riegeli)": (
    "an ArrayRecord file", "ArrayRecord files", "write the data set as TFRecord"
  ),
  r"(h5|hdf5|npz|npy|mdb|lmdb|beton|pkl|pickle)": (
    "a file of another format", "files of another format", _LIST
  ),
}  # fmt: skip


def describe(names: Sequence[str], *, with_name: bool = True) -> str:
  """Return what files are and how to use them; "" if none has a known ending of other formats.

  Args:
    names: of one file, or of those in a folder; the first kind that is found is described.
    with_name: whether to name a file of that kind.
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
