"""Compare imports of published sizes with their library, on random weights.

  bazel run //tests/clients:published_families -- --only=clip,siglip

For each size, the library creates and runs a model; ours imports it, runs it and writes it back.
Prints parameters, the largest difference of each kind of array relative to its largest entry, and
whether all tensors of the written file equal those of the library.
"""

from collections.abc import Mapping
import json
from pathlib import Path
import tempfile
from typing import Any

from absl import app, flags
import numpy as np
import safetensors

from ov_convert import open_clip, timm_vit, transformers_families, transformers_vit
from ov_convert.release import Imported, Preprocess, Release
from ov_convert.testing import foreign

_ONLY = flags.DEFINE_list("only", [], "Beginnings of the names to compare; all by default.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images and texts.")

MODULES: Mapping[str, Any] = {
  "transformers": transformers_vit, "timm": timm_vit, "open_clip": open_clip
}  # fmt: skip


def _sizes(width: int, depth: int, heads: int, mlp_dim: int = 0) -> dict[str, int]:
  return {
    "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
    "intermediate_size": mlp_dim or 4 * width,
  }  # fmt: skip


def _square(size: int, patch: int) -> dict[str, int]:
  return {"image_size": size, "patch_size": patch}


_V2 = _square(518, 14) | {"mlp_ratio": 4}
_REGISTERS = {"num_register_tokens": 4}
_CLIP_B = {
  "vision_config": _sizes(768, 12, 12) | _square(224, 16), "projection_dim": 512,
  "text_config": _sizes(512, 12, 8),
}  # fmt: skip
_SIGLIP_B = {"vision_config": _square(224, 16), "text_config": {"projection_size": 768}}
# name: library, class or architecture, fields, side in pixels, depth, depth of the text tower.
SIZES: Mapping[str, tuple[str, str, Mapping[str, Any], int, int, int]] = {
  "clip B/16": ("transformers", "CLIPModel", _CLIP_B, 224, 12, 12),
  "clip L/14 vision": (
    "transformers", "CLIPVisionModel", _sizes(1024, 24, 16) | _square(224, 14), 224, 24, 0
  ),
  "clip open_clip B/32": (
    "open_clip", "CLIP",
    {
      "embed_dim": 512, "quick_gelu": True, "text_cfg": {},
      "vision_cfg": {"layers": 12, "width": 768, "patch_size": 32},
    },
    224, 12, 12,
  ),
  "siglip B/16": ("transformers", "SiglipModel", _SIGLIP_B, 224, 12, 12),
  "siglip So400m/14 vision": (
    "transformers", "SiglipVisionModel", _sizes(1152, 27, 16, 4304) | _square(224, 14), 224, 27, 0
  ),
  "dinov2 S/14": ("transformers", "Dinov2Model", _sizes(384, 12, 6) | _V2, 518, 12, 0),
  "dinov2 registers B/14": (
    "transformers", "Dinov2WithRegistersModel", _sizes(768, 12, 12) | _V2 | _REGISTERS, 518, 12, 0
  ),
  "dinov2 L/14": ("transformers", "Dinov2Model", _sizes(1024, 24, 16) | _V2, 518, 24, 0),
  "dinov3 S/16": (
    "transformers", "DINOv3ViTModel", _sizes(384, 12, 6) | _square(224, 16) | _REGISTERS, 224, 12, 0
  ),
  "dinov3 L/16": (
    "transformers", "DINOv3ViTModel", _sizes(1024, 24, 16) | _square(224, 16) | _REGISTERS,
    224, 24, 0,
  ),
  "pe-core T/16 open_clip": (
    "open_clip", "CustomTextCLIP",
    {
      "embed_dim": 512, "text_cfg": {"context_length": 32},
      "vision_cfg": {
        "image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map",
        "timm_proj": None,
      },
    },
    384, 12, 12,
  ),
  "pe-core L/14 timm": ("timm", "vit_pe_core_large_patch14_336", {}, 336, 24, 0),
  "aimv2 L/14": ("transformers", "Aimv2VisionModel", {"use_head": False}, 224, 24, 0),
  "aimv2 L/14 timm": ("timm", "aimv2_large_patch14_224", {}, 224, 24, 0),
}  # fmt: skip


def _inputs(found: tuple[Any, ...]) -> dict[str, np.ndarray]:
  library, _, fields, side, _, text_depth = found
  rng = np.random.default_rng(0)
  arrays = {"pixels": rng.normal(size=(_BATCH.value, side, side, 3)).astype(np.float32)}
  if text_depth:
    siglip = "projection_size" in fields.get("text_config", {})
    length = 64 if siglip else fields.get("text_cfg", {}).get("context_length", 77)
    ids = rng.integers(2, 30000, (_BATCH.value, length))
    ids[:, length // 2 :] = 1 if siglip else 49407
    arrays["ids"] = ids
  return arrays


def compare(name: str) -> str:
  """Return the row of one size."""
  library, kind, fields, _, depth, text_depth = SIZES[name]
  spec = {
    "name": "model", "library": library, "kind": kind, "fields": fields, "depth": depth,
    "text_depth": text_depth, "std": 0.02,
  }  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    inputs = _inputs(SIZES[name])
    theirs = foreign.make(root, [spec], {"model": inputs})["model"]
    found: Imported = MODULES[library].read(root / "model")
    differences = foreign.largest_differences(
      foreign.outputs(found.config, found.params, inputs), theirs
    )
    side = SIZES[name][3]
    MODULES[library].write(root / "out", Release(found.config, found.params, Preprocess(side)))
    equal = _equal(root / "model", root / "out")
    kinds: dict[str, float] = {}
    for array, difference in differences.items():
      key = array.partition("/block_")[0] + (" blocks" if "/block_" in array else "")
      kinds[key] = max(kinds.get(key, 0.0), difference)
  shown = ", ".join(f"{key} {value:.1e}" for key, value in kinds.items())
  return f"{name} | {int(theirs['parameters']):,} | {shown} | {equal}"


def _equal(before: Path, after: Path) -> str:
  """Return how the tensors of two folders differ."""
  (weights,) = before.glob("*.safetensors")
  file = before / "config.json"
  content = json.loads(file.read_text("utf-8")) if file.exists() else {}
  family = transformers_families.of_content(content)
  count = 0
  with (
    safetensors.safe_open(weights, "np") as a,
    safetensors.safe_open(after / weights.name, "np") as b,
  ):
    names = {n: n for n in b.keys()}  # noqa: SIM118
    for name in a.keys():  # noqa: SIM118
      other = name if name in names or family is None else family.rename(name)
      if other not in names:
        return f"{name} is missing"
      if name.endswith("mask_token"):
        continue
      if not np.array_equal(a.get_tensor(name), b.get_tensor(other)):
        return f"{name} differs"
      count += 1
  return f"{count} tensors equal"


def main(_: list[str]) -> None:
  """Print the row of every chosen size."""
  for name in SIZES:
    if not _ONLY.value or name.startswith(tuple(_ONLY.value)):
      print(compare(name), flush=True)


if __name__ == "__main__":
  app.run(main)
