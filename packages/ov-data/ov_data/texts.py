"""Which texts of a record a batch holds, and how: several at once, whole or one sentence of them.

Training of two towers wants more than one text of a picture: its alt text, one sentence of a long
caption as a second positive, and the whole caption as the decoder's target. Each is a `TextSpec`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol
import zlib

import numpy as np
from numpy.typing import NDArray

from ov_data.example import Feature, FeatureError
from ov_data.hashing import Uniforms
from ov_data.tokenizer import MAX_CHARS

if TYPE_CHECKING:
  from ov_data.sources import Dataset

Features = Mapping[str, Feature]
Choice = Literal["random", "first", "all"]

_CAPTION_SALT = 2
_BREAKS = ".!|"  # that end a sentence, in runs; the predecessor marked its breaks with "|"
_SENTENCE_END = re.compile(r"[.!|]+")
_EMPTY = f" \t\n\v\f\r{_BREAKS}".encode()  # what a text without a sentence consists of
_BATCH_NAMES = frozenset({"image", "valid", "index", "captions"})


class Tokenizer(Protocol):
  """What the loader needs of a tokenizer."""

  pad_id: int

  def encode_batch(
    self, texts: Sequence[str], length: int, append_cls: bool | None = None
  ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids and which of them are real, both [len(texts), length]."""


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """One text of each example, as a row of token ids.

  keys: features with texts; one is drawn first among those the record has, then among its texts.
    Specs of equal keys draw the same text of a record, so that a sentence is one of the caption.
  length: T, tokens with [bos], [eos] and [CLS].
  pick: "whole", or "sentence" for one sentence, see `split_sentences`.
  append_cls: whether the last column is [CLS], whatever the tokenizer's own setting.
  fallback: keys to draw from, always a whole text, where `keys` hold none.
  needs_words: whether a text of nothing but `.`, `!` and `|` is replaced by one of `fallback`. If
    there is none either, it is used as it is.
  """

  keys: tuple[str, ...]
  length: int
  pick: Literal["whole", "sentence"] = "whole"
  append_cls: bool = False
  fallback: tuple[str, ...] = ()
  needs_words: bool = True

  def __post_init__(self) -> None:
    for name in ("keys", "fallback"):
      if isinstance(value := getattr(self, name), str):
        raise ValueError(f"{name}={value!r}: expected a tuple of feature names, ({value!r},)")
      object.__setattr__(self, name, tuple(value))
    if not self.keys:
      raise ValueError("keys=(): expected the name of at least one feature with texts")
    if self.pick not in ("whole", "sentence"):
      raise ValueError(f"pick={self.pick!r}: expected 'whole' or 'sentence'")
    least = 3 if self.append_cls else 2
    if self.length < least:
      raise ValueError(f"length={self.length}: the special tokens alone take {least}")


def split_sentences(text: str) -> list[str]:
  """The parts of a text between runs of `.` and `!`, those without a word left out.

  `?` ends no sentence and decimal points do, as in the training of OpenVision.
  """
  return [part for part in _SENTENCE_END.split(text) if part.strip()]


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The texts of one row: one for each array of ids, and all captions where asked for."""

  texts: tuple[str, ...]
  captions: list[str] | None


class TextReader:
  """Chooses the texts of records and writes their ids into batches. Holds no state of the reading.

  Args:
    tokenizer: see `Tokenizer`.
    specs: what to deliver under which name; None for one caption of the source's `caption_keys`
      as "ids" with its "mask", of `length` tokens.
    length: of these; unused with specs.
    captions: "random" or "first" among the texts of a record; "all" is "first", and all captions
      of the source's `caption_keys` besides, as strings under "captions"; of keys that hold the
      same ones only the first.
    seed: of the choice.

  Raises:
    ValueError: an argument out of range, or a name that the batch needs itself.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    specs: Mapping[str, TextSpec] | None,
    length: int | None,
    captions: Choice,
    seed: int,
  ):
    if captions not in ("random", "first", "all"):
      raise ValueError(f"captions={captions!r}: expected 'random', 'first' or 'all'")
    if specs is None and (length is None or length < 1):
      raise ValueError(f"text_len={length}: expected the tokens of a caption, or texts=...")
    if taken := _BATCH_NAMES & set(specs or ()):
      raise ValueError(f"texts: {', '.join(sorted(taken))} are names of the batch itself")
    self._tokenizer = tokenizer
    self._specs = None if specs is None else dict(specs)
    self._length = length or 0
    self._captions = captions
    self._seed = seed

  @property
  def names(self) -> set[str]:
    """Keys of a batch that this class fills."""
    names = {"ids", "mask"} if self._specs is None else set(self._specs)
    return names | ({"captions"} if self._captions == "all" else set())

  @property
  def uses_caption_keys(self) -> bool:
    """Whether the `caption_keys` of the sources are read."""
    return self._specs is None or self._captions == "all"

  def keys(self, caption_keys: Sequence[str]) -> tuple[str, ...]:
    """Features to read of a source with these caption keys."""
    keys = tuple(caption_keys) if self.uses_caption_keys else ()
    for spec in (self._specs or {}).values():
      keys += spec.keys + spec.fallback
    return tuple(dict.fromkeys(keys))

  def check_keys(self, datasets: Sequence["Dataset"]) -> None:
    """Looks at first records: every key of the specs must stand in some source, and every source
    must have one for each spec.

    Raises:
      ValueError: a key that no source has, or a source without any of a spec's keys.
    """
    known = [(d.source.path, d.present_keys) for d in datasets if d.present_keys]
    everything = sorted(set().union(*(keys for _, keys in known)))
    for name, spec in (self._specs or {}).items():
      wanted = spec.keys + spec.fallback
      for key in wanted:
        if known and key not in everything:
          raise ValueError(
            f"texts: {name!r} reads feature {key!r}, which is in none of the first records; they "
            f"have {', '.join(everything)}. Set the keys of the TextSpec to what is there."
          )
      for path, keys in known:
        if not keys & set(wanted):
          raise ValueError(
            f"texts: {name!r} reads {', '.join(wanted)}, and the first records of "
            f"{path} have none of them, but {', '.join(sorted(keys))}. Add a key "
            "of that source to the TextSpec."
          )

  def blank(self, size: int) -> dict[str, Any]:
    """The texts of a batch of `size` rows before any is written."""
    batch: dict[str, Any] = {}
    for name, length in self._lengths().items():
      batch[name] = np.full((size, length), self._tokenizer.pad_id, np.int32)
    if self._specs is None:
      batch["mask"] = np.zeros((size, self._length), bool)
    if self._captions == "all":
      batch["captions"] = [[] for _ in range(size)]
    return batch

  def choose(self, features: Features, caption_keys: Sequence[str], position: int) -> Chosen:
    """The texts of the record at a position of the global stream.

    Raises:
      FeatureError: a text is wanted, and the record has none.
    """
    captions = None
    if self._captions == "all":
      # The keys of a split file all hold the same list, which must not count twice in retrieval.
      lists = dict.fromkeys(tuple(_texts(features, key)) for key in caption_keys)
      captions = [text.decode(errors="replace") for texts in lists for text in texts]
      if caption_keys and not captions:
        raise FeatureError(f"no caption under {', '.join(caption_keys)}")
    if self._specs is None:
      return Chosen((self._one_caption(features, caption_keys, position),), captions)
    return Chosen(tuple(self._one(features, s, position) for s in self._specs.values()), captions)

  def write(self, batch: dict[str, Any], rows: Sequence[int], chosen: Sequence[Chosen]) -> None:
    """Encodes the chosen texts of these rows of a batch, in place."""
    if self._specs is None:
      texts = [row.texts[0] for row in chosen]
      batch["ids"][rows], batch["mask"][rows] = self._tokenizer.encode_batch(texts, self._length)
    for number, (name, spec) in enumerate((self._specs or {}).items()):
      texts = [row.texts[number] for row in chosen]
      batch[name][rows], _ = self._tokenizer.encode_batch(texts, spec.length, spec.append_cls)
    for row, texts_of_row in zip(rows, chosen):
      if texts_of_row.captions is not None:
        batch["captions"][row] = texts_of_row.captions

  def _lengths(self) -> dict[str, int]:
    if self._specs is None:
      return {"ids": self._length}
    return {name: spec.length for name, spec in self._specs.items()}

  def _one_caption(self, features: Features, keys: Sequence[str], position: int) -> str:
    if not keys:
      return ""
    choices = [texts for key in keys if (texts := _texts(features, key))]
    if not choices:
      raise FeatureError(f"no caption under {', '.join(keys)}")
    return self._draw(choices, self._uniforms(position)).decode(errors="replace")

  def _one(self, features: Features, spec: TextSpec, position: int) -> str:
    for keys, pick, needs_words in (
      (spec.keys, spec.pick, spec.needs_words),
      (spec.fallback, "whole", False),
      (spec.keys, "whole", False),
    ):
      choices = [
        texts
        for key in keys
        if (texts := [t for t in _texts(features, key) if not needs_words or t.strip(_EMPTY)])
      ]
      if not choices:
        continue
      # The keys are part of the draw: the same text for the same keys, unrelated ones for others.
      uniforms = self._uniforms(position, zlib.crc32("\0".join(keys).encode()))
      text = self._draw(choices, uniforms)[: 4 * MAX_CHARS].decode(errors="replace")
      if pick == "whole":
        return text
      sentences = split_sentences(text) or [text]
      return sentences[uniforms.below(len(sentences))] if uniforms else sentences[0]
    raise FeatureError(f"no text under {', '.join(spec.keys + spec.fallback)}")

  def _uniforms(self, *words: int) -> Uniforms | None:
    if self._captions != "random":
      return None
    return Uniforms(self._seed, _CAPTION_SALT, *words)

  @staticmethod
  def _draw(choices: Sequence[Sequence[bytes]], uniforms: Uniforms | None) -> bytes:
    if uniforms is None:
      return choices[0][0]
    texts = choices[uniforms.below(len(choices))]
    return texts[uniforms.below(len(texts))]


def _texts(features: Features, key: str) -> list[bytes]:
  return [t for t in features.get(key, ()) if isinstance(t, bytes) and t.strip()]
