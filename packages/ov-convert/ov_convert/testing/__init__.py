"""Test support for formats: small models, inputs, and outputs of ov_models and of clients."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ov_convert import client_env, parity
from ov_convert.release import Preprocess, Release, TokenizerSpec, encoder_of, round_params
import ov_models
from ov_models.testing import random_params

LENGTH = 9  # of a text in ids
_PIECES = ("red", "circle", "##s", "a", "of", "cafe", "it", "'", "[", "]", "eos")
# Texts and their pieces under WORDS, written by hand.
TEXTS = {
  "A RED circle": "a red circle",
  "": "",
  "red " * 30: "red " * 30,
  "a red circle of a cafe's": "a red circle of a cafe ' [UNK]",
  "Café": "cafe",
  "[eos] a": "[ eos ] a",
  "circles": "circle ##s",
  "  of\n red ": "of red",
  "a red circle of it red": "a red circle of it red",
}


def words(*, append_cls: bool = True) -> TokenizerSpec:
  """Return a small tokenizer; [eos] has the largest id if no [CLS] ends a text."""
  first, last = ["[PAD]", "[bos]", "[UNK]"], ["[eos]"]
  tokens = [*first, "[CLS]", *last, *_PIECES] if append_cls else [*first, *_PIECES, *last]
  ids = {token: i for i, token in enumerate(tokens)}
  content: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    "normalizer": {
      "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
      "strip_accents": True, "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
      "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 100, "vocab": ids,
    },
  }  # fmt: skip
  return TokenizerSpec(
    json.dumps(content), LENGTH, append_cls, 0, 1, ids["[eos]"], 2, ids.get("[CLS]")
  )


def expected_ids(source: TokenizerSpec) -> np.ndarray:
  """Return the ids of TEXTS in training, int64 [N, T]."""
  room = LENGTH - source.append_cls - 2
  ids = np.full((len(TEXTS), LENGTH), source.pad_id)
  for row, pieces in zip(ids, TEXTS.values()):
    middle = [source.vocabulary[piece] for piece in pieces.split()][:room]
    row[: len(middle) + 2] = [source.bos_id, *middle, source.eos_id]
  if source.append_cls:
    ids[:, -1] = source.cls_id
  return ids


def release(config: Any, **fields: Any) -> Release:
  """Return a model with random parameters; `fields` override those of Release."""
  defaults = {"preprocess": Preprocess(encoder_of(config).image_size), "words": words()}
  given: dict[str, Any] = defaults | {"params": random_params(config)} | fields
  params = round_params(given.pop("params"), given.get("dtype", "float32"))
  return Release(config, params, **given)


def write_probe(folder: pathlib.Path, source: Release) -> None:
  """Write inputs for the scripts of clients/: three images and TEXTS."""
  rng = np.random.default_rng(1)
  size = source.encoder.image_size
  (folder / "images").mkdir(parents=True)
  for i, (height, width) in enumerate([(30, 41), (25, 20), (size, size)]):
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8).tobytes()
    header = f"P6 {width} {height} 255\n".encode()
    (folder / "images" / f"{i}.ppm").write_bytes(header + pixels)
  (folder / "texts.json").write_text(json.dumps(list(TEXTS)), "utf-8")
  arrays = {"pixels": rng.normal(size=(3, size, size, 3)).astype(np.float32)}
  if source.text is not None and source.words is not None:
    arrays["ids"] = expected_ids(source.words)
  np.savez(folder / "probe.npz", allow_pickle=False, **arrays)


def ours(source: Release, probe: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the outputs of ov_models for a probe, by the names of client_io.py, without pixels."""
  inputs = np.load(probe / "probe.npz")
  pixels = jnp.asarray(inputs["pixels"])
  encoder = ov_models.bind(source.encoder, source.image_params)
  arrays = _blocks("image", encoder.hidden_states(pixels))
  out = encoder(pixels)
  arrays |= {"image/tokens": out.tokens, "image/pooled": out.pooled}
  if source.text is not None and source.words is not None:
    model: Any = ov_models.bind(source.config, source.params)
    arrays["image/embedding"] = image = model.encode_image(pixels).unit
    arrays["text/ids"] = expected_ids(source.words)
    ids = jnp.asarray(inputs["ids"])
    arrays |= _blocks("text", model.text.hidden_states(ids))
    arrays["text/embedding"] = text = model.encode_text(ids).unit
    bias = 0.0 if model.bias is None else model.bias[...]
    arrays["logits"] = jnp.exp(model.log_scale[...]) * image @ text.T + bias
  return {name: np.asarray(array) for name, array in arrays.items()}


def run(script: str, folder: os.PathLike[str], probe: pathlib.Path) -> parity.Output:
  """Return the output of a script of clients/ for a folder."""
  output = probe / f"{pathlib.Path(script).stem}_{len(list(probe.iterdir()))}.npz"
  client_env.run_client(script, [folder, probe, output])
  return parity.Output.load(output)


def _blocks(tower: str, states: jax.Array) -> dict[str, Any]:
  return {f"{tower}/block_{i:02d}": state for i, state in enumerate(states)}
