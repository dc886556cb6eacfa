"""Smaller weights of ONNX graphs, measured against the float32 graphs."""

import os
import pathlib
import shutil
import tempfile

from ov_convert import accuracy, client_env
from ov_convert.parity import Output

WEIGHTS = ("float32", "float16", "int8", "int4")
DEFAULT_MIN_COSINE = 0.98


def check_weights(weights: str) -> None:
  """Raise ValueError for an unknown type of weights."""
  if weights not in WEIGHTS:
    raise ValueError(f"weights={weights!r}; expected one of {', '.join(WEIGHTS)}.")


def check_min_cosine(value: float) -> None:
  """Raise ValueError for a bound that is no cosine."""
  if not -1 <= value <= 1:
    raise ValueError(
      f"min_cosine={value}; expected a cosine from -1 to 1, such as {DEFAULT_MIN_COSINE}."
    )


def check_min_agreement(value: float) -> None:
  """Raise ValueError for a bound that is no fraction."""
  if not 0 <= value <= 1:
    raise ValueError(f"min_agreement={value}; expected a fraction from 0 to 1, such as 0.9.")


def convert(
  folder: str | os.PathLike[str],
  weights: str,
  probe: str | os.PathLike[str],
  *,
  min_cosine: float = DEFAULT_MIN_COSINE,
  min_agreement: float = 0.0,
  python: str | os.PathLike[str] | None = None,
) -> accuracy.Accuracy:
  """Replace the float32 graphs of a folder by graphs with smaller weights, and compare both.

  Args:
    folder: folder written by `onnx_export.write`.
    weights: "float16", "int8" or "int4"; see `clients/convert_onnx.py`.
    probe: folder with the inputs of the comparison; see `clients/client_io.py`.
    min_cosine: smallest accepted cosine of the embeddings. It is reported, and not enforced.
    min_agreement: smallest accepted agreement of zero-shot classes, in the same way.
    python: interpreter with onnxruntime; that of the clients' environment by default.

  Returns:
    The accuracy of the new graphs.

  Raises:
    ValueError: see `check_weights`, `check_min_cosine` and `check_min_agreement`; if `weights` is
      "float32"; or if `min_agreement` is set for a single tower.
    client_env.ClientError: if onnxruntime cannot convert or run the graphs.
  """
  check_weights(weights)
  check_min_cosine(min_cosine)
  check_min_agreement(min_agreement)
  if weights == WEIGHTS[0]:
    raise ValueError(f"weights={weights!r}; the graphs are float32, so nothing is to be converted.")
  path = pathlib.Path(folder)
  if min_agreement and not all((path / f"{tower}.onnx").exists() for tower in ("image", "text")):
    raise ValueError(
      f"min_agreement={min_agreement}; expected a model with an image and a text tower, because "
      "the agreement compares zero-shot classes; leave it out, and set min_cosine."
    )
  with tempfile.TemporaryDirectory() as scratch:
    converted, output = pathlib.Path(scratch) / "converted", pathlib.Path(scratch) / "output.npz"
    converted.mkdir()
    client_env.run_client("convert_onnx.py", [path, converted, weights], python=python)
    client_env.run_client("compare_onnx.py", [path, converted, probe, output], python=python)
    found = Output.load(output)
    measured = accuracy.measure(
      found.arrays,
      weights=weights,
      bar=min_cosine,
      sizes=(_size(path), _size(converted)),
      speed=found.facts["speed"],
      agreement_bar=min_agreement,
    )
    for file in _graphs(path):
      file.unlink()
    for file in _graphs(converted):
      shutil.move(file, path / file.name)
  return measured


def _graphs(folder: pathlib.Path) -> list[pathlib.Path]:
  return [*folder.glob("*.onnx"), *folder.glob("*.onnx.data")]


def _size(folder: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in _graphs(folder))
