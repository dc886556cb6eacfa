"""Folders with small random models and images, for tests."""

import base64
from collections.abc import Sequence
import io
import json
import pathlib
import struct
from typing import Any
import zlib

import jax
import numpy as np
from PIL import Image

import ov_data
import ov_models

SIZE = 32
_TINY = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}
_WORDS = ("a red square", "a green circle", "a blue star", "two yellow lines at night")


def write_model(folder: pathlib.Path, *, text: bool = True, caption: bool = True) -> pathlib.Path:
  """Write a folder like that of `//apps:export -- --format=safetensors`."""
  tokenizer = ov_data.Tokenizer.train([f"{words}, {number}" for number, words in
                                       enumerate(8 * _WORDS)], 200)  # fmt: skip
  config = ov_models.VisionLanguageConfig.from_names(
    "mu/16", "Ti" if text else None, "Ti" if caption else None,
    image_size=SIZE, vocab_size=tokenizer.vocab_size, text_len=16, caption_len=8, embed_dim=24,
    decoder_kind="teacher_forced", text_options=_TINY, decoder_options=_TINY,
  )  # fmt: skip
  params: Any = ov_models.init(config, jax.random.key(0))
  preprocess = {"image_size": SIZE, "fit": "center", "mean": [0.5] * 3, "std": [0.25] * 3}
  ov_models.save(folder, config, params, extra={"preprocess": preprocess})
  if text:
    ov_data.TextProcessor(tokenizer, length=16).save(folder / "tokenizer")
  else:
    tokenizer.save(folder / "tokenizer")
  return folder


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
  """Return a JPEG of coloured noise blocks."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
  file = io.BytesIO()
  small.resize(size, Image.Resampling.BILINEAR).save(file, "JPEG")
  return file.getvalue()


def encoded(data: bytes) -> str:
  """Return base64 text."""
  return base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
  """Return a PNG of zeros, which compresses a thousandfold."""
  chunk = lambda kind, data: (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
  )


def write_images(
  folder: pathlib.Path, seeds: Sequence[int], captions: bool = False
) -> pathlib.Path:
  """Write one JPEG per seed, named after it, and optionally captions.jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  for seed in seeds:
    (folder / f"{seed:03}.jpg").write_bytes(jpeg(seed))
  if captions:
    lines = [
      {"file": f"{seed:03}.jpg", "captions": [f"{_WORDS[seed % len(_WORDS)]}, {seed}"]}
      for seed in seeds
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(text, "utf-8")
  return folder
