"""Text preprocessing of a trained model: tokenizer, packing, pooling and prompt preparation.

A text tower requires the tokenization and pooling of its training. The trainer therefore saves them
in one folder with the model. The folder contains checksums and texts with their ids, and
`TextProcessor.load` rejects a folder that was modified or no longer reproduces them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
import tokenizers

from ov_data import fs, text_cleaning, text_presets, tokenizer_folder, tokenizer_json
from ov_data.tokenizer import (
  MAX_LENGTH,
  PACKING_FILE,
  PROCESSOR_FILE,
  TOKENIZER_FILE,
  Tokenizer,
  canonicalise_text,
)

Pool = Literal["last", "first", "argmax", "mean", "map"]
Padding = Literal["attend", "mask"]

_SETTINGS = ("length", "append_cls", "pool", "padding", "canonical")
_GOLDEN_TEXTS = (
  "a large red striped circle above a small blue solid square",
  "A Café—naïve résumé, über coöperation! It's 3.5 €, ½ price™…",
  "東京タワー at night\t😀\nline two",
  "",
  "hyphen-ated [bos] don't [CLS] " + "word " * 200,
)
_GOLDEN_PROMPTS = (
  "a bad photo of a great_white Shark.",
  "itap of my Hand-held   computer, iPod!",
  "a photo of the {St. Bernard's} (close-up)",
)


@dataclasses.dataclass(frozen=True)
class TextProcessor:
  """Encoder and decoder of the texts of one text tower. Thread-safe.

  Attributes:
    tokenizer: tokenizer; its `append_cls` is ignored.
    length: number of tokens T of a text, including the special tokens.
    append_cls: whether the last column is [CLS].
    pool, padding: configuration of the text tower: the pooled token, and whether padding is
      attended to.
    canonical: whether to canonicalize prompts, see `encode_prompts`.

  Raises:
    ValueError: if a value is not supported, `length` is too short, the vocabulary has no [CLS], or
      the pooled token does not exist.
  """

  tokenizer: Tokenizer
  length: int = 80
  append_cls: bool = True
  pool: Pool = "last"
  padding: Padding = "mask"
  canonical: bool = True

  def __post_init__(self) -> None:
    for name, kind in (("pool", Pool), ("padding", Padding)):
      if (value := getattr(self, name)) not in get_args(kind):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(get_args(kind))}")
    if self.pool == "last" and not self.append_cls and self.padding != "attend":
      raise ValueError(
        "pool='last' reads the last column, which is usually padding; "
        "set append_cls=True, padding='attend' as in SigLIP, or use another pooling"
      )
    for name in ("append_cls", "canonical"):
      if type(value := getattr(self, name)) is not bool:
        raise ValueError(f"{name}={value!r}: expected True or False")
    if type(self.length) is not int or self.length > MAX_LENGTH:
      raise ValueError(f"length={self.length!r}: expected an integer of at most {MAX_LENGTH:,}")
    end, last = self.tokenizer.eos_id, self.tokenizer.vocab_size - 1
    if self.pool == "argmax" and end != last:
      raise ValueError(
        f"pool='argmax' reads the token of the largest id, which should be [eos]; here that is id "
        f"{end} of 0 to {last}, so it would read a word. Use pool='last' with append_cls=True"
      )
    self.encode([])  # validates length and [CLS]

  @classmethod
  def from_preset(
    cls,
    name: str,
    path: str | os.PathLike[str],
    *,
    length: int | None = None,
    clean: text_cleaning.Clean | None = None,
  ) -> "TextProcessor":
    """Return the text processor of a published family with the vocabulary of a tokenizer.json.

    A folder of `spiece.model` or `tokenizer.model` must first be converted to tokenizer.json.

    Args:
      name: "clip", "siglip" or "siglip2".
      path: tokenizer.json of the model.
      length: number of tokens T of a text; by default that of the published models.
      clean: cleaning of texts, see `text_cleaning`; by default that of transformers. Use
        "canonicalize" for models of open_clip whose `tokenizer_kwargs` say so.

    Raises:
      ValueError: if the preset is unknown, or the file is malformed or lacks a special token.
      FileNotFoundError: if the file does not exist.
    """
    if (preset := text_presets.PRESETS.get(name)) is None:
      raise ValueError(f"preset={name!r}: expected one of {', '.join(text_presets.PRESETS)}")
    clean = preset.clean if clean is None else clean
    tokenizer = Tokenizer.from_file(path, special=preset.special, clean=clean)
    length = preset.length if length is None else length
    return cls(tokenizer, length, False, preset.pool, preset.padding, canonical=False)

  @property
  def pad_id(self) -> int:
    return self.tokenizer.pad_id

  def encode(self, texts: Sequence[str | bytes]) -> NDArray[np.int32]:
    """Encode captions as in training; return ids, int32 [N, length]."""
    return self.tokenizer.encode_batch(texts, self.length, self.append_cls)[0]

  def encode_prompts(self, texts: Sequence[str]) -> NDArray[np.int32]:
    """Encode prompts (templates with class names); return ids, int32 [N, length].

    Prompts are canonicalized as in the evaluation of OpenVision: `_` becomes a space, ASCII
    punctuation except "," is removed, then lower case and single spaces.
    """
    if self.canonical:
      texts = [canonicalise_text(text, ",") for text in texts]
    return self.encode(texts)

  def decode(self, ids: NDArray[np.int32]) -> list[str]:
    """Decode the rows of ids [N, T]."""
    return self.tokenizer.decode_batch(ids)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of everything that affects ids or their use by the text tower."""
    content = json.dumps([self.tokenizer.fingerprint, self._settings()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the files of `Tokenizer.save` and text_processor.json to a folder.

    A new folder is created atomically. Files of an identical tokenizer are kept. After an
    interrupted replacement, `is_complete` is False and `load` raises FileNotFoundError.

    Raises:
      ValueError: if the folder is not local.
    """
    path = tokenizer_folder.check_local(folder)
    files = self.tokenizer.files()
    content = {
      **self._settings(),
      "tokenizer_sha256": tokenizer_folder.sha256(files[TOKENIZER_FILE]),
      "tokenizers_version": tokenizers.__version__,
      "golden": _pairs(_GOLDEN_TEXTS, self.encode(_GOLDEN_TEXTS)),
      "golden_prompts": _pairs(_GOLDEN_PROMPTS, self.encode_prompts(_GOLDEN_PROMPTS)),
    }
    files[PROCESSOR_FILE] = tokenizer_folder.seal(content)
    tokenizer_folder.write(path, files, marks=(PACKING_FILE, PROCESSOR_FILE))

  @staticmethod
  def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains all files of `save`, without checking their content."""
    return Tokenizer.is_complete(folder) and (pathlib.Path(folder) / PROCESSOR_FILE).is_file()

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "TextProcessor":
    """Load a folder of `save` and verify checksums and golden ids.

    Raises:
      FileNotFoundError: if the folder or one of its files is missing.
      ValueError: if a file was modified, is malformed or has a newer format, or texts do not encode
        to the stored ids.
    """
    file = pathlib.Path(folder) / PROCESSOR_FILE
    tokenizer = Tokenizer.load(folder)
    if not file.is_file():
      raise FileNotFoundError(
        f"no text processor in {folder}: it holds a tokenizer, but not {PROCESSOR_FILE}. Models "
        "without a text tower have none; Tokenizer.load reads the folder."
      )
    content = tokenizer_folder.read_sealed(file)
    try:
      settings = {name: content[name] for name in _SETTINGS}
      checksum = content["tokenizer_sha256"]
      golden = [
        (text, ids, encode)
        for key, encode in (("golden", cls.encode), ("golden_prompts", cls.encode_prompts))
        for text, ids in tokenizer_folder.golden(content[key])
      ]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{file} is damaged: {error!r}.") from None
    data = fs.read_regular(os.fspath(file.with_name(TOKENIZER_FILE)), tokenizer_json.MAX_BYTES)
    if checksum != tokenizer_folder.sha256(data):
      raise ValueError(
        f"{file} belongs to another {TOKENIZER_FILE} than the one next to it; one of the two was "
        "modified or replaced. Copy both from the same run."
      )
    try:
      processor = cls(tokenizer, **settings)
    except ValueError as error:
      raise ValueError(f"{file}: {error}") from None
    for text, ids, encode in golden:
      if (now := encode(processor, [text])[0].tolist()) != ids:
        raise ValueError(
          f"the text processor in {folder} no longer reproduces its golden ids: {text[:40]!r} "
          f"was {_format_ids(ids)}, is {_format_ids(now)}. Either its files were modified, or "
          f"tokenizers {tokenizers.__version__} differs from {content.get('tokenizers_version')}."
        )
    return processor

  def _settings(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in _SETTINGS}


def _pairs(texts: Sequence[str], ids: NDArray[np.int32]) -> list[dict[str, Any]]:
  return [{"text": text, "ids": row.tolist()} for text, row in zip(texts, ids, strict=True)]


def _format_ids(ids: Sequence[int]) -> str:
  """Return ids for a message, shortened and without the padding in the middle."""
  words = [str(i) for i in ids if i]
  return " ".join(words[:12]) + (" ..." if len(words) > 12 else "")
