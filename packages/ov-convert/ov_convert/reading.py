"""Reads folders that others wrote: JSON and tensors by name, and nothing that could be executed.

Whoever made the folder is not trusted. Sizes are checked before anything is parsed, files are
opened only where they lie in the folder, and pickles (*.bin, *.pt, *.pth) are read by the
restricted unpickler of PyTorch, in the process of a client. Every refusal is one line.
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
MAX_HEADER_BYTES = 32 << 20  # of a safetensors file: 200,000 tensors and more
MAX_TENSOR_BYTES = 64 << 30  # of all files of a model together

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


def read_json(path: Folder) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is too large, leads elsewhere, is no JSON object, or holds NaN or infinity.
  """
  text = _read_json_bytes(path)
  try:
    content = json.loads(text, parse_constant=_number, parse_float=_number)
  except RecursionError:
    raise ValueError(f"{path} is nested too deeply to be a configuration.") from None
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}; fetch the file again.") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, expected an object {{...}}.")
  return content


def read_json_text(path: Folder) -> str:
  """The text of a JSON file that `read_json` accepts; raises as it does."""
  read_json(path)
  return _read_json_bytes(path).decode("utf-8")


def _read_json_bytes(path: Folder) -> bytes:
  path = pathlib.Path(path)
  file = inside(path.parent, path.name)
  if (size := file.stat().st_size) > MAX_JSON_BYTES:
    raise ValueError(f"{path} has {size} bytes; JSON is read up to {MAX_JSON_BYTES}.")
  return file.read_bytes()


def read_tensors(
  folder: Folder, names: Sequence[str], python: Folder | None = None
) -> dict[str, np.ndarray]:
  """The tensors of a model by name.

  Args:
    folder: holds the files.
    names: file names, of which the first that is there is read: *.safetensors, or *.bin, *.pt and
      *.pth of PyTorch, which may be split into files that `<name>.index.json` lists. A state dict
      is unwrapped from {"state_dict": ...}, and "module." in front of all names is taken off.
    python: interpreter with PyTorch for the latter; `client_env.find_python()` by default.

  Returns:
    Floating-point tensors as float32, others as they are.

  Raises:
    FileNotFoundError: none of the files is there, or one that an index lists is not.
    ValueError: a file that is damaged, too large, or not plain tensors, an index that leads out of
      the folder, or values that are not finite.
  """
  root = pathlib.Path(folder)
  name, index = _first(root, names)
  if index is None:
    _check_total(root, [name])
    flat = _read_file(root, name, python)
  else:
    flat = _read_sharded(root, index, python)
  if not flat:
    raise ValueError(f"{root / name} holds no tensors; fetch the file again.")
  if all(key.startswith("module.") for key in flat):
    flat = {key.removeprefix("module."): value for key, value in flat.items()}
  return flat


def inside(root: pathlib.Path, name: str) -> pathlib.Path:
  """The regular file `name` of `root`, links followed.

  Links may lead anywhere within the folder, and out of a snapshot of the hub's cache to the blobs
  beside it.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is a link that leads elsewhere, or no regular file.
  """
  path = root / name
  if not path.exists():
    raise FileNotFoundError(f"{path}: there is no such file; {root} holds {_listing(root)}.")
  file, home = path.resolve(), root.resolve()
  homes = [home] + [home.parents[1] / "blobs"] * (home.parent.name == "snapshots")
  if not any(file.is_relative_to(place) for place in homes):
    raise ValueError(
      f"{path} is a link that leads out of its folder; put a copy of the file there."
    )
  if not file.is_file():
    raise ValueError(f"{path} is no regular file.")
  return file


def _first(root: pathlib.Path, names: Sequence[str]) -> tuple[str, str | None]:
  """The name that is there, and its index where it is split."""
  if not root.is_dir():
    raise FileNotFoundError(f"{root}: there is no such folder.")
  for name in names:
    if (root / name).exists():
      return name, None
    if (root / (index := f"{name}.index.json")).exists():
      return name, index
  raise FileNotFoundError(
    f"no weights in {root}: expected {' or '.join(names)}; the folder holds {_listing(root)}."
  )


def _read_sharded(root: pathlib.Path, index: str, python: Folder | None) -> dict[str, np.ndarray]:
  content = read_json(root / index)
  weight_map = content.get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{root / index} has no weight_map of tensor names to file names.")
  for tensor, file in weight_map.items():
    if not isinstance(file, str) or not _is_plain(file):
      raise ValueError(
        f"{root / index} puts {tensor!r} into {file!r}; expected the name of a file beside it."
      )
  files = sorted(set(weight_map.values()))
  _check_total(root, files)
  flat: dict[str, np.ndarray] = {}
  for file in files:
    listed = {tensor for tensor, name in weight_map.items() if name == file}
    found = _read_file(root, file, python)
    if differing := sorted(listed ^ found.keys()):
      raise ValueError(
        f"{root / index} and {file} disagree about {_some(differing)}; they are of two models."
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
      f"{root / name} ends in {suffix!r}; read are .safetensors, {', '.join(_PICKLES)}."
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
  """Tensors of `file`, called `shown` in messages."""
  _check_header(file, shown)
  flat: dict[str, np.ndarray] = {}
  broken = []
  try:
    with safetensors.safe_open(file, "np") as opened:
      for name in opened.keys():  # noqa: SIM118
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
          raise ValueError(
            f"{shown}: {_some([name])} is of type {dtype}; read are {', '.join(_DTYPES)}."
          )
        tensor = opened.get_tensor(name)
        if "F" in dtype:
          with np.errstate(over="ignore"):  # an infinity is told below, by name
            tensor = np.asarray(tensor, np.float32)
          if not np.isfinite(tensor).all():
            broken.append(name)
        flat[name] = tensor
  except safetensors.SafetensorError as error:
    raise ValueError(f"{shown} is damaged: {_line(error)}; fetch the file again.") from None
  if broken:
    raise ValueError(f"{shown}: {_some(broken)} holds NaN or infinity in float32; it is no model.")
  return flat


def _check_header(file: pathlib.Path, shown: pathlib.Path) -> None:
  """The length in front of a safetensors file, before anything of that length is read."""
  size = file.stat().st_size
  with file.open("rb") as opened:
    length = int.from_bytes(opened.read(8), "little")
  if size < 8 or length > size - 8:
    raise ValueError(
      f"{shown} is damaged: a header of {length} bytes in a file of {size}; fetch the file again."
    )
  if length > MAX_HEADER_BYTES:
    raise ValueError(f"{shown} has a header of {length} bytes; read are up to {MAX_HEADER_BYTES}.")


def _check_total(root: pathlib.Path, names: Iterable[str]) -> None:
  total = sum(inside(root, name).stat().st_size for name in names)
  if total > MAX_TENSOR_BYTES:
    raise ValueError(
      f"the weights in {root} have {total} bytes; read are up to {MAX_TENSOR_BYTES}."
    )


def _is_plain(name: str) -> bool:
  """Whether `name` can only be a file of the folder it is looked for in."""
  return name.isprintable() and name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def _listing(root: pathlib.Path) -> str:
  if not root.is_dir():
    return "nothing: it is no folder"
  return _some(sorted(path.name for path in root.iterdir())) or "nothing"


def _some(names: Sequence[str]) -> str:
  """The first names, in one line, and how many more."""
  shown = ["".join(c if c.isprintable() else "?" for c in name) for name in names[:8]]
  return ", ".join(shown) + f" and {len(names) - 8} more" * (len(names) > 8)


def _line(error: Exception) -> str:
  return " ".join(str(error).split())


def _number(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"{text[:40]} is no finite number")
  return number
