"""Test support for formats of complete models: inputs, and outputs of our model."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ov_convert import client_env, parity, testing
from ov_convert.release import Config, Preprocess, Release, round_params
import ov_models

LENGTH = testing.LENGTH  # of a text in ids


def small_release(config: Config, dtype: str = "float32", eos_id: int | None = None) -> Release:
  """Return a release with random parameters rounded to `dtype`, and a tokenizer if it has texts.

  `eos_id` overrides the end token, with one that occurs in captions.
  """
  image, text = towers(config)
  words = None
  if text is not None or getattr(config, "decoder", None) is not None:
    words = testing.words(append_cls=text is not None and text.pool == "last")
    words = words if eos_id is None else dataclasses.replace(words, eos_id=eos_id)
  params = testing.random_params(config)
  if "embed" in params.get("decoder", {}):
    params["decoder"]["embed"]["embedding"] *= 8  # makes the next token depend on the last one
  params = round_params(params, dtype)
  return Release(config, params, Preprocess(image.image_size if image else 1), words, dtype)


def towers(config: Config) -> tuple[ov_models.ViTConfig | None, ov_models.TextConfig | None]:
  """Return the configs of the image and the text tower."""
  if isinstance(config, ov_models.ViTConfig):
    return config, None
  if isinstance(config, ov_models.TextConfig):
    return None, config
  return config.encoder, getattr(config, "text", None)


def random_inputs(release: Release, batch: int) -> dict[str, np.ndarray]:
  """Return `pixels` [B, S, S, 3] and, for models with texts, `ids` [B, T] of different lengths."""
  rng = np.random.default_rng(batch)
  inputs: dict[str, np.ndarray] = {}
  image, text = towers(release.config)
  if image is not None:
    shape = (batch, image.image_size, image.image_size, 3)
    inputs["pixels"] = rng.normal(size=shape).astype(np.float32)
  if text is not None and (words := release.words) is not None:
    ids = rng.integers(1, text.vocab_size, (batch, text.max_len)).astype(np.int32)
    for row in range(batch):
      ids[row, 2 + (3 * row) % (text.max_len - 2) :] = text.pad_id
    if words.append_cls:
      ids[:, -1] = words.cls_id or 0
    inputs["ids"] = ids
  return inputs


def run(
  script: str,
  folder: pathlib.Path,
  inputs: dict[str, np.ndarray],
  scratch: pathlib.Path,
  python: str | os.PathLike[str] | None = None,
) -> parity.Output:
  """Return the output of a script of `clients/`; probe and output are written to `scratch`."""
  probe, output = scratch / "probe", scratch / "output.npz"
  (probe / "images").mkdir(parents=True, exist_ok=True)
  (probe / "texts.json").write_text("[]", "utf-8")
  unseen: dict[str, np.ndarray] = {
    "pixels": np.zeros((1, 1, 1, 3), np.float32)
  }  # where there is no image tower
  np.savez(probe / "probe.npz", allow_pickle=False, **(unseen | inputs))
  client_env.run_client(script, [folder, probe, output], python=python)
  return parity.Output.load(output)


def our_arrays(release: Release, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return all arrays of `clients/client_io.py` for the model, except pixels and ids."""
  config, words = release.config, release.words
  with jax.default_matmul_precision("highest"):
    found = jax.jit(_compute, static_argnums=0)(config, release.params, inputs)
    decoder = getattr(config, "decoder", None)
    if isinstance(decoder, ov_models.DecoderConfig) and words is not None:
      model: Any = ov_models.bind(config, release.params)
      captions = ov_models.generate(
        model, jnp.asarray(inputs["pixels"]), max_len=decoder.max_len,
        bos_id=words.bos_id or 0, eos_id=words.eos_id, pad_id=words.pad_id,
      )  # fmt: skip
      found["caption/ids"] = captions.ids
  return {name: np.asarray(array) for name, array in found.items()}


def _compute(
  config: Config, params: dict[str, Any], inputs: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  model: Any = ov_models.bind(config, params)
  pixels, ids = inputs.get("pixels"), inputs.get("ids")
  image = model if isinstance(config, ov_models.ViTConfig) else getattr(model, "encoder", None)
  text = model if isinstance(config, ov_models.TextConfig) else getattr(model, "text", None)
  found: dict[str, jax.Array] = {}
  for name, tower, given in (("image", image, pixels), ("text", text, ids)):
    if tower is not None:
      out = tower(given)
      found |= {f"{name}/pooled": out.pooled, f"{name}/tokens": out.tokens}
      for layer, state in enumerate(tower.hidden_states(given)):
        found[f"{name}/block_{layer:02d}"] = state
  if isinstance(config, ov_models.VisionLanguageConfig):
    seen, words = model.encode_image(pixels), None
    if text is not None:
      read = model.encode_text(ids)
      found |= {"image/embedding": seen.unit, "text/embedding": read.unit}
      words = read.tokens[:1]
      bias = 0.0 if config.bias_init is None else params["bias"]
      found["logits"] = jnp.exp(params["log_scale"]) * seen.unit @ read.unit.T + bias
    if isinstance(config.decoder, ov_models.QueryDecoderConfig):
      hidden = model.caption_hidden(seen.tokens[:1], text_tokens=words)
      found["caption/logits"] = hidden @ model.head_kernel
  return found


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Return the difference relative to the largest entry of ours; Inf if shapes differ."""
  if ours.shape != theirs.shape:
    return float("inf")
  return float(np.abs(ours - theirs).max() / np.abs(ours).max())
