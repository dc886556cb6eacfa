"""Workdirs of models with random weights in published sizes, for tests of exports."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from apps.exporter.importer import write_workdir
from ov_convert.release import Fit, Imported, Preprocess, TokenizerSpec
import ov_data
import ov_models

SIZES = {  # name: (image tower, text tower and decoder, pixels)
  "Ti/16@160": ("Ti/16", "Ti", 160),
  "B/16@224": ("B/16", "B", 224),
  "So400m/14@224": ("So400m/14", "So400m", 224),
}
_BLOCK = {"width": 64, "depth": 2, "mlp_dim": 96, "num_heads": 2}
TINY_CLIP = ov_models.VisionLanguageConfig.from_names(
  "Ti/8", "Ti", None, image_size=32, vocab_size=512, text_len=16, preset="openvision_released",
  embed_dim=64, encoder_options=_BLOCK, text_options=_BLOCK,
)  # fmt: skip
KINDS = ("clip", "captioner", "image")
_SENTENCES = (
  "a photo of a dog on a beach",
  "the café in the old town, at night",
  "two red squares above a small blue circle",
  "people in a street with cars and trees",
)


def config_of(kind: str, size: str) -> Any:
  """Return the configuration of a published model.

  Args:
    kind: one of KINDS: "clip" is OpenVision, "captioner" OpenVision 2, "image" an image tower.
    size: one of SIZES.
  """
  image, other, pixels = SIZES[size]
  if kind == "image":
    return ov_models.ViTConfig.from_name(image, image_size=pixels)
  if kind == "clip":
    return ov_models.VisionLanguageConfig.from_names(
      image, other, other, image_size=pixels, preset="openvision_released"
    )
  return ov_models.VisionLanguageConfig.openvision2(image, other, image_size=pixels, max_len=40)


def random_params(config: Any, seed: int = 0) -> Any:
  """Return random parameters with nontrivial norms, biases, cls token and position embeddings."""
  params = jax.tree.map(np.asarray, ov_models.init(config, jax.random.key(seed)))
  rng = np.random.default_rng(seed)

  def shaken(path: Any, leaf: np.ndarray) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("scale", "bias", "cls", "position_embedding")) and leaf.ndim:
      return leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32)
    return leaf

  return jax.tree_util.tree_map_with_path(shaken, params)


def _scaled(params: Any, factor: float) -> Any:
  """Return params with scaled kernels."""

  def scale(path: Any, leaf: np.ndarray) -> np.ndarray:
    return leaf * np.float32(factor) if path[-1].key == "kernel" else leaf

  return jax.tree_util.tree_map_with_path(scale, params)


def make_workdir(
  workdir: Path, config: Any, *, fit: Fit = "center", kernel_scale: float = 1.0
) -> None:
  """Create a workdir like an import does, with a small tokenizer.

  Args:
    workdir: folder to create.
    config: configuration of the model.
    fit: how images are fitted.
    kernel_scale: factor of the kernels. Random models give similar embeddings to all inputs; larger
      kernels spread them.
  """
  preprocess = Preprocess(getattr(config, "encoder", config).image_size, fit)
  params = _scaled(random_params(config), kernel_scale)
  if isinstance(config, ov_models.ViTConfig):
    found = Imported(config, params, preprocess, None)
    write_workdir(workdir, found, "random weights", workdir.parent)
    return
  tokenizer = ov_data.Tokenizer.train(_SENTENCES, 400)
  text = getattr(config, "text", None)
  length = text.max_len if text else config.decoder.max_len
  spec = TokenizerSpec(
    tokenizer.to_json(), length, bool(text and text.pool == "last"),
    tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.cls_id,
  )  # fmt: skip
  found = Imported(config, params, preprocess, spec)
  write_workdir(workdir, found, "random weights", workdir.parent)
