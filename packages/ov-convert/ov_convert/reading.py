"""Reading of untrusted model folders: JSON and tensors, without executing code.

Sizes are checked before files are parsed, only files inside the folder are opened, and pickles
(*.bin, *.pt, *.pth) are read by the restricted unpickler of PyTorch in a separate client process.
Every error message is one line.
"""

from collections.abc import Iterable, Sequence
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors

from ov_convert.client_env import ClientError, run_client

MAX_JSON_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 64 << 20  # tokenizer.json of Gemma, with 256,000 tokens, has about 34 MB
MAX_HEADER_BYTES = 32 << 20  # header of a safetensors file, enough for 200,000 tensors
MAX_TENSOR_BYTES = 64 << 30  # all files of a model together

_PICKLES = (".bin", ".pt", ".pth")
_DTYPES = (
  "F64",
  "F32",
  "F16",
  "BF16",
  "I64",
  "I32",
  "I16",
  "I8",
  "U64",
  "U32",
  "U16",
  "U8",
  "BOOL",
)

Folder = str | os.PathLike[str]


def read_json(path: Folder, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
  """Read a JSON file that contains an object.

  Args:
    path: file.
    max_bytes: largest size of the file.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if the file is too large, a link out of the folder, not a JSON object, or contains
      NaN or Inf.
  """
  text = _read_json_bytes(path, max_bytes)
  try:
    content = json.loads(text, parse_constant=_number, parse_float=_number)
  except RecursionError:
    raise ValueError(f"{path} is nested too deeply for a configuration.") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}; download the file again.") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} contains a {type(content).__name__}, expected an object {{...}}.")
  return content


def read_json_text(path: Folder, max_bytes: int = MAX_JSON_BYTES) -> str:
  """Return the text of a JSON file after checking it with `read_json`."""
  read_json(path, max_bytes)
  return _read_json_bytes(path, max_bytes).decode("utf-8")


def _read_json_bytes(path: Folder, max_bytes: int) -> bytes:
  path = pathlib.Path(path)
  file = inside(path.parent, path.name)
  if (size := file.stat().st_size) > max_bytes:
    raise ValueError(f"{path} has {size} bytes; expected at most {max_bytes} for JSON.")
  return file.read_bytes()


def read_tensors(
  folder: Folder, names: Sequence[str], python: Folder | None = None
) -> dict[str, np.ndarray]:
  """Read the tensors of a model by name.

  Args:
    folder: directory of the files.
    names: candidate file names, of which the first existing one is read: *.safetensors, or the
      PyTorch files *.bin, *.pt and *.pth. Files may be sharded, as listed in `<name>.index.json`.
      {"state_dict": ...} is unwrapped, and a common prefix "module." is removed.
    python: interpreter with PyTorch for PyTorch files; `client_env.find_python()` by default.

  Returns:
    Floating-point tensors as float32, others unchanged.

  Raises:
    FileNotFoundError: if none of the files exists, or a shard is missing.
    ValueError: if a file is damaged, too large or not a dict of plain tensors, a shard is outside
      the folder, or a value is NaN or Inf.
  """
  root = pathlib.Path(folder)
  name, index = _first(root, names)
  if index is None:
    _check_total(root, [name])
    flat = _read_file(root, name, python)
  else:
    flat = _read_sharded(root, index, python)
  if not flat:
    raise ValueError(f"{root / name} contains no tensors; download the file again.")
  if all(key.startswith("module.") for key in flat):
    flat = {key.removeprefix("module."): value for key, value in flat.items()}
  return flat


def inside(root: pathlib.Path, name: str) -> pathlib.Path:
  """Return the regular file `name` in `root`, resolving links.

  Links may point into the folder, or from a snapshot in the cache of the hub to its blobs.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if the file is a link that points elsewhere, or not a regular file.
  """
  path = root / name
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file; {root} contains {_listing(root)}.")
  file, home = path.resolve(), root.resolve()
  homes = [home] + [home.parents[1] / "blobs"] * (home.parent.name == "snapshots")
  if not any(file.is_relative_to(place) for place in homes):
    raise ValueError(
      f"{path} is a link that points outside its folder; replace it with a copy of the file."
    )
  if not file.is_file():
    raise ValueError(f"{path} is not a regular file.")
  return file


def _first(root: pathlib.Path, names: Sequence[str]) -> tuple[str, str | None]:
  """Return the first existing name, and the name of its index if it is sharded."""
  if not root.is_dir():
    raise FileNotFoundError(f"{root}: no such folder.")
  for name in names:
    if (root / name).exists():
      return name, None
    if (root / (index := f"{name}.index.json")).exists():
      return name, index
  raise FileNotFoundError(
    f"no weights in {root}: expected {' or '.join(names)}; the folder contains {_listing(root)}."
  )


def _read_sharded(root: pathlib.Path, index: str, python: Folder | None) -> dict[str, np.ndarray]:
  content = read_json(root / index)
  weight_map = content.get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{root / index} has no weight_map of tensor names to file names.")
  for tensor, file in weight_map.items():
    if not isinstance(file, str) or not _is_plain(file):
      raise ValueError(
        f"{root / index} maps {tensor!r} to {file!r}; expected a file name in the same folder."
      )
  files = sorted(set(weight_map.values()))
  _check_total(root, files)
  flat: dict[str, np.ndarray] = {}
  for file in files:
    listed = {tensor for tensor, name in weight_map.items() if name == file}
    found = _read_file(root, file, python)
    if differing := sorted(listed ^ found.keys()):
      raise ValueError(
        f"{root / index} and {file} disagree about {_some(differing)}; they belong to different "
        "models."
      )
    flat |= found
  return flat


def _read_file(root: pathlib.Path, name: str, python: Folder | None) -> dict[str, np.ndarray]:
  file = inside(root, name)
  suffix = pathlib.PurePath(name).suffix
  if suffix == ".safetensors":
    return _read_safetensors(file, root / name)
  if suffix not in _PICKLES:
    raise ValueError(
      f"{root / name} ends in {suffix!r}; expected .safetensors, {', '.join(_PICKLES)}."
    )
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "model.safetensors"
    try:
      limit = str(MAX_TENSOR_BYTES)
      run_client("bin_to_safetensors.py", [file.absolute(), output, limit], python=python)
    except ClientError as error:
      reason = str(error).splitlines()[-1].removeprefix("bin_to_safetensors.py failed: ")
      raise ValueError(f"{root / name} {reason}") from None
    return _read_safetensors(output, root / name)


def _read_safetensors(file: pathlib.Path, shown: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the tensors of `file`, which is called `shown` in messages."""
  _check_header(file, shown)
  flat: dict[str, np.ndarray] = {}
  broken = []
  try:
    with safetensors.safe_open(file, "np") as opened:
      for name in opened.keys():  # noqa: SIM118
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
          raise ValueError(
            f"{shown}: {_some([name])} has dtype {dtype}; expected {', '.join(_DTYPES)}."
          )
        tensor = opened.get_tensor(name)
        if "F" in dtype:
          with np.errstate(over="ignore"):  # Inf is reported below, by name
            tensor = np.asarray(tensor, np.float32)
          if not np.isfinite(tensor).all():
            broken.append(name)
        flat[name] = tensor
  except safetensors.SafetensorError as error:
    raise ValueError(f"{shown} is damaged: {_line(error)}; download the file again.") from None
  if broken:
    raise ValueError(
      f"{shown}: {_some(broken)} contains NaN or Inf in float32; use an intact checkpoint."
    )
  return flat


def _check_header(file: pathlib.Path, shown: pathlib.Path) -> None:
  """Check the header length of a safetensors file before it is read."""
  size = file.stat().st_size
  with file.open("rb") as opened:
    length = int.from_bytes(opened.read(8), "little")
  if size < 8 or length > size - 8:
    raise ValueError(
      f"{shown} is damaged: a header of {length} bytes in a file of {size}; download the file "
      "again."
    )
  if length > MAX_HEADER_BYTES:
    raise ValueError(
      f"{shown} has a header of {length} bytes; expected at most {MAX_HEADER_BYTES}."
    )


def _check_total(root: pathlib.Path, names: Iterable[str]) -> None:
  total = sum(inside(root, name).stat().st_size for name in names)
  if total > MAX_TENSOR_BYTES:
    raise ValueError(
      f"the weights in {root} have {total} bytes; expected at most {MAX_TENSOR_BYTES}."
    )


def _is_plain(name: str) -> bool:
  """Return whether `name` is a file name without directories."""
  return name.isprintable() and name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def _listing(root: pathlib.Path) -> str:
  if not root.is_dir():
    return "nothing: it is not a folder"
  return _some(sorted(path.name for path in root.iterdir())) or "nothing"


def _some(names: Sequence[str]) -> str:
  """Return the first names in one line, and the number of further ones."""
  shown = ["".join(c if c.isprintable() else "?" for c in name) for name in names[:8]]
  return ", ".join(shown) + f" and {len(names) - 8} more" * (len(names) > 8)


def _line(error: Exception) -> str:
  return " ".join(str(error).split())


def _number(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"{text[:40]} is not a finite number")
  return number
