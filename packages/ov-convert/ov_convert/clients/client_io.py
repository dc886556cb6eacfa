"""What the scripts of this folder share. They run in an environment of their own: no jax, no ov_*.

  python run_NAME.py FOLDER PROBE OUTPUT.npz

FOLDER is an exported model, PROBE holds images/*.png, texts.json and probe.npz (`pixels` float32
[B, S, S, 3] normalised; `ids` int32 [N, T] where there is a text tower). OUTPUT gets arrays under
these names, as many as the library offers:

  image/pixels       [B, S, S, 3]   the library's own preprocessing of images/
  image/block_00 ..  [B, 1 + T, D]  what enters the first block, then what leaves each
  image/tokens       [B, T, D]      patches after the last block, before any norm
  image/pooled       [B, D]         features of the tower on its own
  image/embedding    [B, E]         in the shared space, of length 1
  text/ids           [N, T]         the library's own tokenizer on texts.json
  text/block_00 ..   [N, T, D]
  text/embedding     [N, E]         of length 1
  logits             [B, N]         scaled (and biased) similarities of pictures and texts
  caption/ids        [B, T]         greedy captions

All but pixels and ids are computed from the `pixels` and `ids` of the probe, in float32.
"""

import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import numpy as np


class Probe:
  """The inputs that every library is given."""

  def __init__(self, folder: str) -> None:
    self.folder = pathlib.Path(folder)
    self.texts: list[str] = json.loads((self.folder / "texts.json").read_text("utf-8"))
    arrays = np.load(self.folder / "probe.npz", allow_pickle=False)
    self.pixels: np.ndarray = arrays["pixels"]
    self.ids: np.ndarray | None = arrays["ids"].astype(np.int64) if "ids" in arrays else None

  def images(self) -> list[Any]:
    """PIL images, RGB."""
    from PIL import Image

    files = sorted((self.folder / "images").iterdir(), key=lambda p: int(p.stem))
    return [Image.open(file).convert("RGB") for file in files]

  def torch_pixels(self) -> Any:
    """[B, 3, S, S]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(self.pixels.transpose(0, 3, 1, 2)))


def channels_last(pixels: Any) -> np.ndarray:
  """[B, 3, S, S] tensor -> [B, S, S, 3] array."""
  return np.ascontiguousarray(np.asarray(pixels).transpose(0, 2, 3, 1))


def unit(x: Any) -> Any:
  """Rows of length 1, as ours: x / (|x| + 1e-8)."""
  return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def module_facts(module: Any, tower: str) -> dict[str, Any]:
  """Settings of a torch module that small differences hide in, of every layer: name -> value.

  `tower`, one of "image", "text" and "decoder", leads the names: which activation is right depends
  on it.
  """
  facts: dict[str, Any] = {}
  for name, child in module.named_modules():
    kind = type(child).__name__
    if "LayerNorm" in kind and hasattr(child, "eps"):
      facts[f"{tower}/{name}: layer norm eps"] = child.eps
    elif "GELU" in kind:
      tanh = getattr(child, "approximate", "none") == "tanh" or "Tanh" in kind
      gelu = "quick gelu" if "Quick" in kind else "gelu tanh" if tanh else "gelu"
      facts[f"{tower}/{name}: activation"] = gelu
  return facts


def write(path: str, arrays: dict[str, Any], facts: dict[str, Any], libraries: list[str]) -> None:
  """Writes OUTPUT; tensors and arrays alike, floats as float32."""
  flat: dict[str, Any] = {}
  for name, value in arrays.items():
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    flat[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
  versions = {name: importlib.metadata.version(name) for name in libraries}
  about = json.dumps({"facts": facts, "versions": versions})
  np.savez(path, about=np.array(about), **flat)


def arguments() -> list[str]:
  """The three paths of the command line."""
  if len(sys.argv) != 4:
    sys.exit(f"usage: {pathlib.Path(sys.argv[0]).name} FOLDER PROBE OUTPUT.npz")
  return sys.argv[1:]
