"""ONNX format: graphs of the image and the text tower.

Graphs are traced from the PyTorch module, so exporting requires the environment of the clients.
Caption decoders are loops and are not exported; use our own format.
"""

import json
import os
import pathlib
import tempfile
from typing import Any

from ov_convert import client_env, torch_module
from ov_convert.release import Release
import ov_models

PREPROCESSOR_FILE = "preprocessor.json"
# PyTorch supports all of our graphs from opset 18 on. onnxruntime 1.19, the oldest tested version,
# reads up to 21, and 1.32 up to 25.
OPSETS = (18, 23)
DEFAULT_OPSET = 18


def check_opset(opset: int) -> None:
  """Raise ValueError for an unsupported opset."""
  if not OPSETS[0] <= opset <= OPSETS[1]:
    raise ValueError(
      f"onnx_opset={opset}; expected {OPSETS[0]} to {OPSETS[1]} (onnxruntime 1.19 reads up to 21)."
    )


def check(release: Release) -> None:
  """Raise ValueError listing all properties of a model that the format does not support.

  Graphs are written in float32; `onnx_weights.convert` makes them smaller.
  """
  problems = []
  if release.dtype != "float32":
    problems.append(
      f"dtype={release.dtype!r}, but graphs are written in float32; set dtype='float32', and "
      "onnx_weights='float16' for smaller files"
    )
  problems += torch_module.problems(release)
  if problems:
    raise ValueError(f"ONNX does not support this model: {'; '.join(problems)}.")


def write(
  folder: str | os.PathLike[str],
  release: Release,
  python: str | os.PathLike[str] | None = None,
  *,
  opset: int = DEFAULT_OPSET,
) -> None:
  """Write image.onnx, text.onnx, preprocessor.json and tokenizer.json for the existing towers.

  Args:
    folder: output directory; created if missing.
    release: float32 model.
    python: interpreter with PyTorch; that of the clients' environment by default.
    opset: version of the ONNX operators, see `OPSETS`.

  Raises:
    ValueError: see `check` and `check_opset`.
    client_env.ClientError: if PyTorch cannot trace the model.
  """
  check(release)
  check_opset(opset)
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as scratch:
    torch_module.write(scratch, release)
    client_env.run_client("write_onnx.py", [scratch, path.absolute(), str(opset)], python=python)
  content = json.dumps(_preprocessor(release) | {"opset": opset}, indent=2)
  (path / PREPROCESSOR_FILE).write_text(content + "\n", "utf-8")
  if release.words is not None and "text" in _towers(release):
    (path / torch_module.TOKENIZER_FILE).write_text(release.words.tokenizer_json, "utf-8")


def _towers(release: Release) -> tuple[str, ...]:
  config = release.config
  if isinstance(config, ov_models.TextConfig):
    return ("text",)
  return ("image",) if release.text is None else ("image", "text")


def _preprocessor(release: Release) -> dict[str, Any]:
  """Return preprocessing, tokenizer settings, and scale and bias of the similarity."""
  content: dict[str, Any] = {}
  if "image" in _towers(release):
    pre = release.preprocess
    content |= {"image_size": pre.image_size, "fit": pre.fit, "resample": pre.interpolation}
    content |= {"mean": pre.mean, "std": pre.std}
  if "text" in _towers(release) and (words := release.words) is not None:
    names = ("length", "append_cls", "pad_id", "bos_id", "eos_id", "unk_id", "cls_id")
    content["words"] = {name: getattr(words, name) for name in names}
  return content | torch_module.similarity(release)
