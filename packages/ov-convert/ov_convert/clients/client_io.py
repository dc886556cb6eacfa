"""Input and output of the client scripts, which run in an environment without jax and ov_*.

  python run_NAME.py FOLDER PROBE OUTPUT.npz

FOLDER is an exported model. PROBE contains images/*.png, texts.json and probe.npz (`pixels`
float32 [B, S, S, 3] normalised; `ids` int32 [N, T] if there is a text tower). OUTPUT contains those
of the following arrays that the library provides:

  image/pixels       [B, S, S, 3]   images/ preprocessed by the library
  image/block_00 ..  [B, 1 + T, D]  input of the first block, then outputs of all blocks
  image/tokens       [B, T, D]      patches after the last block, before any norm
  image/pooled       [B, D]         pooled features of the tower
  image/embedding    [B, E]         unit vectors in the shared space
  text/ids           [N, T]         texts.json tokenized by the library
  text/block_00 ..   [N, T, D]      as for images
  text/embedding     [N, E]         unit vectors in the shared space
  logits             [B, N]         scaled (and biased) similarities of images and texts
  caption/ids        [B, T]         greedy captions

All but pixels and ids are computed from `pixels` and `ids` of the probe, in float32.
"""

import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import numpy as np


class Probe:
  """Inputs of all libraries."""

  def __init__(self, folder: str) -> None:
    self.folder = pathlib.Path(folder)
    self.texts: list[str] = json.loads((self.folder / "texts.json").read_text("utf-8"))
    arrays = np.load(self.folder / "probe.npz", allow_pickle=False)
    self.pixels: np.ndarray = arrays["pixels"]
    self.ids: np.ndarray | None = arrays["ids"].astype(np.int64) if "ids" in arrays else None

  def images(self) -> list[Any]:
    """Return the images as RGB PIL images."""
    from PIL import Image

    files = sorted((self.folder / "images").iterdir(), key=lambda p: int(p.stem))
    return [Image.open(file).convert("RGB") for file in files]

  def torch_pixels(self) -> Any:
    """Return the pixels as a tensor [B, 3, S, S]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(self.pixels.transpose(0, 3, 1, 2)))


def channels_last(pixels: Any) -> np.ndarray:
  """Convert a tensor [B, 3, S, S] to an array [B, S, S, 3]."""
  return np.ascontiguousarray(np.asarray(pixels).transpose(0, 2, 3, 1))


def unit(x: Any) -> Any:
  """Normalise rows as ov_models does: x / (|x| + 1e-8)."""
  return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def module_facts(module: Any, tower: str) -> dict[str, Any]:
  """Return settings of all layers of a torch module whose effect may be below tolerances.

  Args:
    module: module to inspect.
    tower: "image", "text" or "decoder"; prefix of the names, determines the expected activation.
  """
  facts: dict[str, Any] = {}
  for name, child in module.named_modules():
    kind = type(child).__name__
    epsilon = getattr(child, "eps", getattr(child, "variance_epsilon", None))
    if epsilon is not None and ("LayerNorm" in kind or "RMSNorm" in kind):
      facts[f"{tower}/{name}: layer norm eps"] = epsilon
    elif "GELU" in kind:
      tanh = getattr(child, "approximate", "none") == "tanh" or "Tanh" in kind
      gelu = "quick gelu" if "Quick" in kind else "gelu tanh" if tanh else "gelu"
      facts[f"{tower}/{name}: activation"] = gelu
  return facts


def write(path: str, arrays: dict[str, Any], facts: dict[str, Any], libraries: list[str]) -> None:
  """Write tensors and arrays to OUTPUT, floats as float32."""
  flat: dict[str, Any] = {}
  for name, value in arrays.items():
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    flat[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
  versions = {name: importlib.metadata.version(name) for name in libraries}
  about = json.dumps({"facts": facts, "versions": versions})
  np.savez(path, about=np.array(about), **flat)


def arguments() -> list[str]:
  """Return the three paths of the command line."""
  if len(sys.argv) != 4:
    sys.exit(f"usage: {pathlib.Path(sys.argv[0]).name} FOLDER PROBE OUTPUT.npz")
  return sys.argv[1:]
