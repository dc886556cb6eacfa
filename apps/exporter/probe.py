"""The inputs that every exported model is tried on, and what our own model makes of them."""

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

# Upper case, accents, nothing at all, punctuation, special tokens as words, and too long.
TEXTS = (
  "A photo of a Dog",
  "Ein Café in ZÜRICH: naïve résumé, 3.5 €",
  "",
  "don't!? (hyphen-ated) [x]",
  "東京タワー at night",
  "a large red striped circle above a small blue solid square",
  "word " * 300,
)
_SIZES = ((320, 213), (150, 401), (97, 64), (640, 480))  # width, height: none is square
_NUM_PICTURES = 4
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def pictures(folder: Path | None, count: int = _NUM_PICTURES) -> list[bytes]:
  """Encoded pictures: the first of `folder`, else drawn ones.

  Raises:
    ValueError: the folder holds none, or one that cannot be decoded.
  """
  if folder is None:
    return [_drawn(number) for number in range(count)]
  files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES)
  files = files[:count]
  if not files:
    raise ValueError(f"--pictures={folder}: no file that ends in {', '.join(_SUFFIXES)}")
  encoded = [file.read_bytes() for file in files]
  for file, data in zip(files, encoded, strict=True):
    try:
      decode.full(data)
    except (ValueError, OSError) as error:
      raise ValueError(f"{file} cannot be decoded: {error}; remove it from --pictures") from error
  return encoded


def write_probe(folder: Path, source: Source, encoded: Sequence[bytes]) -> dict[str, np.ndarray]:
  """Writes what `clients/client_io.py` reads: pictures, texts, and our pixels and ids.

  Pictures of which the middle is cut out come twice: first in a shape that leaves nothing to round,
  see `parity.compare`, then as they are.

  Returns:
    Of all pictures `image/pixels`; of the first, which models are tried on, `pixels`; with a text
    tower, `text/ids`.
  """
  (folder / "images").mkdir(parents=True)
  preprocess = source.release.preprocess
  images = [decode.full(data) for data in encoded]
  if preprocess.fit == "center":
    images = [_exact(image, preprocess.image_size) for image in images] + images
  rows = []
  for number, image in enumerate(images):
    picture = io.BytesIO()
    image.save(picture, "PNG")  # what a library decodes must be what we decode
    (folder / "images" / f"{number}.png").write_bytes(picture.getvalue())
    rows.append(decode.whole(picture.getvalue(), preprocess.image_size, preprocess.fit))
  pixels = normalise(np.stack(rows), preprocess)
  arrays: dict[str, Any] = {"pixels": pixels[: len(encoded)]}
  (folder / "texts.json").write_text(json.dumps(TEXTS), "utf-8")
  if source.processor is not None:
    arrays["ids"] = source.processor.encode(TEXTS)
  np.savez(folder / "probe.npz", **arrays)
  ids = {"text/ids": arrays["ids"]} if "ids" in arrays else {}
  return {"image/pixels": pixels, "pixels": arrays["pixels"], **ids}


def _exact(image: Image.Image, size: int) -> Image.Image:
  """The picture as 1:2, or 1:3 for odd sizes: the margins of its middle are whole pixels."""
  sides = (2 * size, (4 if size % 2 == 0 else 6) * size)
  shape = sides if image.height > image.width else sides[::-1]
  return ImageOps.fit(image, shape, Image.Resampling.BICUBIC)


def normalise(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
  """uint8 [B, S, S, 3] -> float32, (x / 255 - mean) / std."""
  mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
  return (images.astype(np.float32) / 255 - mean) / std


def our_outputs(
  release: Release, inputs: dict[str, np.ndarray], specials: tuple[int, int, int] | None
) -> dict[str, np.ndarray]:
  """What our model computes in float32, in the order of computation.

  Args:
    release: the model; its params are those of the files.
    inputs: of `write_probe`.
    specials: (bos, eos, pad) for captions; None writes none.
  """
  config = release.config
  out = {name: array for name, array in inputs.items() if name != "pixels"}
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
  """Every array of `client_io.py` but captions."""
  pixels, ids = inputs["pixels"], inputs.get("text/ids")
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
  """A picture with edges, gradients and fine structure, as JPEG; the same on every machine."""
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
