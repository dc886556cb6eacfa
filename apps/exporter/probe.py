"""Probe inputs for the comparison of exported models, and outputs of our model for them."""

from collections.abc import Sequence
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from apps.exporter.source import Source
from ov_convert.release import Preprocess, Release
from ov_data import decode
import ov_models

# Upper case, accents, empty text, punctuation, special tokens as words, and too long a text.
TEXTS = (
  "A photo of a Dog",
  "Ein Café in ZÜRICH: naïve résumé, 3.5 €",
  "",
  "don't!? (hyphen-ated) [x]",
  "東京タワー at night",
  "a large red striped circle above a small blue solid square",
  "word " * 300,
)
# Objects and templates of `many_texts`.
_OBJECTS = (
  "dog", "cat", "red car", "mountain", "bridge at night", "bowl of soup", "bicycle", "lighthouse",
  "crowd", "old map", "blue square", "striped circle", "forest", "keyboard", "white bird", "city",
)  # fmt: skip
_TEMPLATES = ("a photo of a {}", "{}", "a small drawing of a {} on paper", "There is no {} here.")
_SIZES = ((320, 213), (150, 401), (97, 64), (640, 480))  # width, height: none is square
_NUM_PICTURES = 4
MANY = 64  # images and texts of the comparison of weights
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def pictures(folder: Path | None, count: int = _NUM_PICTURES) -> list[bytes]:
  """Return encoded images: the first ones of `folder`, or generated ones.

  Raises:
    ValueError: if the folder contains no images, or one that cannot be decoded.
  """
  if folder is None:
    return [_drawn(number) for number in range(count)]
  files = image_files(folder)[:count]
  if not files:
    raise ValueError(f"--pictures={folder}: no file with the suffix {', '.join(_SUFFIXES)}")
  encoded = [file.read_bytes() for file in files]
  for file, data in zip(files, encoded, strict=True):
    try:
      decode.full(data)
    except (ValueError, OSError) as error:
      raise ValueError(f"{file} cannot be decoded: {error}; remove it from --pictures") from error
  return encoded


def image_files(folder: Path) -> list[Path]:
  """Return the image files in a folder and its sub-folders, sorted."""
  return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES)


def many_texts() -> list[str]:
  """Return `MANY` different texts."""
  texts = [template.format(name) for template in _TEMPLATES for name in _OBJECTS]
  return [*TEXTS, *texts][:MANY]


def write_probe(
  folder: Path, source: Source, encoded: Sequence[bytes], texts: Sequence[str] = TEXTS
) -> dict[str, np.ndarray]:
  """Write the inputs of `clients/client_io.py`: images, texts, and our pixels and ids.

  With center crops, images are written twice: first in a shape whose crop needs no rounding, see
  `parity.compare`, then unchanged.

  Returns:
    `image/pixels` of all images, `pixels` of the images on which models run, `ids` of the texts
    with a text tower, and `text/ids`, the same, with its tokenizer.
  """
  (folder / "images").mkdir(parents=True)
  preprocess = source.release.preprocess
  images = [decode.full(data) for data in encoded]
  if preprocess.fit == "center":
    images = [_exact(image, preprocess.image_size) for image in images] + images
  rows = []
  for number, image in enumerate(images):
    picture = io.BytesIO()
    image.save(picture, "PNG")  # lossless, so that all decoders agree
    (folder / "images" / f"{number}.png").write_bytes(picture.getvalue())
    rows.append(
      decode.whole(
        picture.getvalue(), preprocess.image_size, preprocess.fit,
        interpolation=preprocess.interpolation,
      )
    )  # fmt: skip
  pixels = normalise(np.stack(rows), preprocess)
  arrays: dict[str, Any] = {"pixels": pixels[: len(encoded)]}
  (folder / "texts.json").write_text(json.dumps(texts), "utf-8")
  ids: dict[str, np.ndarray] = {}
  if source.processor is not None:
    arrays["ids"] = ids["text/ids"] = source.processor.encode(texts)
  elif (text := source.release.text) is not None:
    arrays["ids"] = _random_ids(text, len(texts))
  np.savez(folder / "probe.npz", **arrays)
  return {"image/pixels": pixels, **arrays, **ids}


def _random_ids(text: ov_models.TextConfig, count: int) -> np.ndarray:
  """Return texts of random ids of a tower without tokenizer, padded with the largest id."""
  shape = (count, text.max_len)
  ids = np.random.default_rng(0).integers(0, max(text.vocab_size - 1, 1), shape, np.int32)
  ends = np.linspace(1, text.max_len - 1, count).astype(int)
  return np.where(np.arange(text.max_len) < ends[:, None], ids, text.vocab_size - 1)


def _exact(image: Image.Image, size: int) -> Image.Image:
  """Resize to an aspect of 1:2, or 1:3 for odd sizes, so that crop margins are whole pixels."""
  sides = (2 * size, (4 if size % 2 == 0 else 6) * size)
  shape = sides if image.height > image.width else sides[::-1]
  return ImageOps.fit(image, shape, Image.Resampling.BICUBIC)


def normalise(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
  """Normalise uint8 [B, S, S, 3] to float32 (x / 255 - mean) / std."""
  mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
  return (images.astype(np.float32) / 255 - mean) / std


def our_outputs(
  release: Release, inputs: dict[str, np.ndarray], specials: tuple[int, int, int] | None
) -> dict[str, np.ndarray]:
  """Return the float32 outputs of our model, in the order of computation.

  Args:
    release: model, with parameters as in the files.
    inputs: inputs returned by `write_probe`.
    specials: (bos, eos, pad) for captions; None for no captions.
  """
  config = release.config
  out = {name: array for name, array in inputs.items() if name not in ("pixels", "ids")}
  with jax.default_matmul_precision("highest"):
    computed = jax.jit(_compute, static_argnums=0)(config, release.params, inputs)
    decoder = getattr(config, "decoder", None)
    if specials is not None and isinstance(decoder, ov_models.DecoderConfig):
      bos, eos, pad = specials
      model: Any = ov_models.bind(config, release.params)
      captions = ov_models.generate(
        model, jax.numpy.asarray(inputs["pixels"]),
        max_len=decoder.max_len, bos_id=bos, eos_id=eos, pad_id=pad,
      )  # fmt: skip
      computed["caption/ids"] = captions.ids
  order = sorted(computed, key=_rank)
  return out | {name: np.asarray(computed[name]) for name in order}


def _rank(name: str) -> tuple[int, str]:
  tower, _, array = name.partition("/")
  last = {"tokens": "x0", "pooled": "x1", "embedding": "x2"}.get(array, array)
  return (("image", "text", "logits", "caption").index(tower), last)


def _compute(
  config: Any, params: dict[str, Any], inputs: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Return all arrays of `client_io.py` except captions."""
  pixels, ids = inputs["pixels"], inputs.get("ids")
  model: Any = ov_models.bind(config, params)
  encoder = model if isinstance(config, ov_models.ViTConfig) else model.encoder
  vit = encoder(pixels)
  out = _blocks("image", encoder.hidden_states(pixels))
  out |= {"image/tokens": vit.tokens, "image/pooled": vit.pooled}
  if ids is None:
    return out
  image, text = model.encode_image(pixels), model.encode_text(ids)
  out |= _blocks("text", model.text.hidden_states(ids))
  logits = jax.numpy.exp(params["log_scale"]) * image.unit @ text.unit.T
  if config.bias_init is not None:
    logits = logits + params["bias"]
  return out | {"image/embedding": image.unit, "text/embedding": text.unit, "logits": logits}


def _blocks(tower: str, states: jax.Array) -> dict[str, jax.Array]:
  return {f"{tower}/block_{layer:02}": state for layer, state in enumerate(states)}


def _drawn(number: int) -> bytes:
  """Return a deterministic JPEG with edges, gradients and fine structure."""
  width, height = _SIZES[number % len(_SIZES)]
  y, x = np.mgrid[0:height, 0:width].astype(np.float64)
  rng = np.random.default_rng(number)
  picture = np.zeros((height, width, 3))
  for channel in range(3):
    fx, fy, fine = rng.uniform(0.5, 3), rng.uniform(0.5, 3), rng.uniform(8, 40)
    wave = np.sin(2 * math.pi * (fx * x / width + fy * y / height))
    grating = np.sin(2 * math.pi * fine * x * y / (width * height))
    picture[..., channel] = 0.5 + 0.3 * wave + 0.1 * grating
  for _ in range(6):
    cx, cy, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.25) * height
    picture[(x - cx) ** 2 + (y - cy) ** 2 < r**2] = rng.uniform(0, 1, 3)
  image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
  file = io.BytesIO()
  image.save(file, "JPEG", quality=92)
  return file.getvalue()
