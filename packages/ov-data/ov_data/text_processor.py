"""The text side of a trained model in one folder: tokenizer, packing, pooling, prompt preparation.

A text tower only works with the ids it was trained on: the same lower-casing, length, special
tokens, and the same place to pool. So these are written once, at training, and read wherever the
model is used. The folder holds checksums and texts with their ids, and `TextProcessor.load` refuses
one that was changed or no longer reproduces them.
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

from ov_data import fs, tokenizer_folder, tokenizer_json
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
  """Texts to the ids that one text tower was trained on, and back. Safe to share between threads.

  tokenizer: its own `append_cls` plays no part.
  length: T, tokens of a text with [bos], [eos] and [CLS].
  append_cls: whether the last column is [CLS].
  pool, padding: how the tower reads its tokens, as in its configuration: which token stands for
    the text, and whether padding is attended to. Kept here so that neither can get lost.
  canonical: whether prompts are canonicalised, see `encode_prompts`.

  Raises:
    ValueError: a value that is none of these, no room for a word, no [CLS] in the vocabulary, or
      a pooling that would not find its token.
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
    if self.pool == "last" and not self.append_cls:
      raise ValueError(
        "pool='last' reads the last column, which is padding after most texts; "
        "set append_cls=True, or pool another way"
      )
    for name in ("append_cls", "canonical"):
      if type(value := getattr(self, name)) is not bool:
        raise ValueError(f"{name}={value!r}: expected True or False")
    if type(self.length) is not int or self.length > MAX_LENGTH:
      raise ValueError(f"length={self.length!r}: expected a whole number of at most {MAX_LENGTH:,}")
    end, last = self.tokenizer.eos_id, self.tokenizer.vocab_size - 1
    if self.pool == "argmax" and end != last:
      raise ValueError(
        f"pool='argmax' reads the token of the largest id, which should be [eos]; here that is id "
        f"{end} of 0 to {last}, so it would read some word. Use pool='last' with append_cls=True"
      )
    self.encode([])  # raises where length or [CLS] do not fit

  @property
  def pad_id(self) -> int:
    return self.tokenizer.pad_id

  def encode(self, texts: Sequence[str | bytes]) -> NDArray[np.int32]:
    """Ids int32 [N, length] of captions, as in training."""
    return self.tokenizer.encode_batch(texts, self.length, self.append_cls)[0]

  def encode_prompts(self, texts: Sequence[str]) -> NDArray[np.int32]:
    """Ids int32 [N, length] of prompts: templates filled with the names of classes.

    They are canonicalised as in the evaluation of OpenVision: `_` becomes a space, ASCII
    punctuation but "," goes, then lower case and single spaces.
    """
    if self.canonical:
      texts = [canonicalise_text(text, ",") for text in texts]
    return self.encode(texts)

  def decode(self, ids: NDArray[np.int32]) -> list[str]:
    """Texts of the rows of ids [N, T]."""
    return self.tokenizer.decode_batch(ids)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits that change with anything that changes ids, or how the tower reads them."""
    content = json.dumps([self.tokenizer.fingerprint, self._settings()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the folder of `Tokenizer.save`, and text_processor.json next to its files.

    A new folder is complete or absent; where the tokenizer in it is the same, its files stay. Where
    it is replaced and the save is interrupted, `is_complete` is False and `load` raises
    FileNotFoundError.

    Raises:
      ValueError: the folder is not local.
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
    """Return whether a folder holds all files of `save`; their content is not checked."""
    return Tokenizer.is_complete(folder) and (pathlib.Path(folder) / PROCESSOR_FILE).is_file()

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "TextProcessor":
    """Reads a folder that `save` wrote and checks that it is unchanged and encodes as it did then.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file was changed, cannot be read or is of a later format, or texts no longer
        encode to the stored ids.
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
        "changed or exchanged. Take both from the same run."
      )
    try:
      processor = cls(tokenizer, **settings)
    except ValueError as error:
      raise ValueError(f"{file}: {error}") from None
    for text, ids, encode in golden:
      if (now := encode(processor, [text])[0].tolist()) != ids:
        raise ValueError(
          f"the text processor in {folder} no longer encodes as when it was saved: {text[:40]!r} "
          f"was {_shown(ids)}, is {_shown(now)}. Either its files were changed, or tokenizers "
          f"{tokenizers.__version__} differs from {content.get('tokenizers_version')}."
        )
    return processor

  def _settings(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in _SETTINGS}


def _pairs(texts: Sequence[str], ids: NDArray[np.int32]) -> list[dict[str, Any]]:
  return [{"text": text, "ids": row.tolist()} for text, row in zip(texts, ids, strict=True)]


def _shown(ids: Sequence[int]) -> str:
  """Ids without the padding in their middle, cut to what a reader takes in."""
  words = [str(i) for i in ids if i]
  return " ".join(words[:12]) + (" ..." if len(words) > 12 else "")
