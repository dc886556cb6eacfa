"""Selection and encoding of the texts of a batch.

Training can use several texts per image: the alt text, one sentence of a long caption as a second
positive, and the complete caption as the target of the decoder. Each is a `TextSpec`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol
import zlib

import numpy as np
from numpy.typing import NDArray

from ov_data.example import FeatureError
from ov_data.hashing import Uniforms
from ov_data.tokenizer import MAX_CHARS

if TYPE_CHECKING:
  from ov_data.sources import Dataset

Texts = Mapping[str, list[bytes]]  # texts of a record by feature
Choice = Literal["random", "first", "all"]

_CAPTION_SALT = 2
_BREAKS = ".!|"  # sentence delimiters; the released OpenVision code marks breaks with "|"
_SENTENCE_END = re.compile(r"[.!|]+")
_EMPTY = f" \t\n\v\f\r{_BREAKS}".encode()  # characters of a text without a sentence
_BATCH_NAMES = frozenset({"image", "valid", "index", "captions"})


class Tokenizer(Protocol):
  """Tokenizer interface that the loader requires."""

  pad_id: int

  def encode_batch(
    self, texts: Sequence[str], length: int, append_cls: bool | None = None
  ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return token ids and the mask of real tokens, both [len(texts), length]."""


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """One text of each example, as a row of token ids.

  Attributes:
    keys: features with texts. First one of the present features is sampled, then one of its texts.
      Specs with equal keys sample the same text, so a sentence is taken from the same caption.
    length: number of tokens T, including [bos], [eos] and [CLS].
    pick: "whole", or "sentence" for one sentence, see `split_sentences`.
    append_cls: whether the last column is [CLS]; overrides the setting of the tokenizer.
    fallback: features to sample a complete text from if `keys` have none.
    needs_words: whether to replace a text that contains only `.`, `!` and `|` by a fallback text,
      if there is one.
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
      raise ValueError(f"length={self.length}: the special tokens need {least}")


def split_sentences(text: str) -> list[str]:
  """Split a text at runs of `.` and `!` and drop parts without a word.

  As in the training of OpenVision, decimal points end a sentence and `?` does not.
  """
  return [part for part in _SENTENCE_END.split(text) if part.strip()]


@dataclasses.dataclass(frozen=True)
class SelectedTexts:
  """The texts of one row: one for each array of ids, and all captions if requested."""

  texts: tuple[str, ...]
  captions: list[str] | None


class TextReader:
  """Stateless selection of the texts of records, and writing of their ids to batches.

  Args:
    tokenizer: tokenizer, see `Tokenizer`.
    specs: texts by the name of their batch entry; None for one caption of the source's
      `caption_keys` as "ids" with "mask".
    length: number of tokens without `specs`; ignored otherwise.
    captions: "random" or "first" of the texts of a record; "all" is "first" and adds all captions
      of the source's `caption_keys` as strings under "captions"; keys with identical captions are
      used once.
    seed: seed of the selection.

  Raises:
    ValueError: if an argument is out of range or a name is reserved.
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
      raise ValueError(f"texts: {', '.join(sorted(taken))} are reserved names of the batch")
    self._tokenizer = tokenizer
    self._specs = None if specs is None else dict(specs)
    self._length = length or 0
    self._captions = captions
    self._seed = seed

  @property
  def names(self) -> set[str]:
    """Batch entries that this class fills."""
    names = {"ids", "mask"} if self._specs is None else set(self._specs)
    return names | ({"captions"} if self._captions == "all" else set())

  @property
  def uses_caption_keys(self) -> bool:
    """Whether the `caption_keys` of the sources are used."""
    return self._specs is None or self._captions == "all"

  def keys(self, caption_keys: Sequence[str]) -> tuple[str, ...]:
    """Return the features to read from a source with these caption keys."""
    keys = tuple(caption_keys) if self.uses_caption_keys else ()
    for spec in (self._specs or {}).values():
      keys += spec.keys + spec.fallback
    return tuple(dict.fromkeys(keys))

  def check_keys(self, datasets: Sequence["Dataset"]) -> None:
    """Check the keys of the specs against the first records.

    Raises:
      ValueError: if no source has a key, or a source has none of the keys of a spec.
    """
    known = [(d.source.path, d.present_keys) for d in datasets if d.present_keys]
    everything = sorted(set().union(*(keys for _, keys in known)))
    for name, spec in (self._specs or {}).items():
      wanted = spec.keys + spec.fallback
      for key in wanted:
        if known and key not in everything:
          raise ValueError(
            f"texts: {name!r} reads feature {key!r}, which is in none of the first records; they "
            f"have {', '.join(everything)}. Set the keys of the TextSpec to existing features."
          )
      for path, keys in known:
        if not keys & set(wanted):
          raise ValueError(
            f"texts: {name!r} reads {', '.join(wanted)}, and the first records of "
            f"{path} have none of them, but {', '.join(sorted(keys))}. Add a key "
            "of that source to the TextSpec."
          )

  def blank(self, size: int) -> dict[str, Any]:
    """Return the empty texts of a batch of `size` rows."""
    batch: dict[str, Any] = {}
    for name, length in self._lengths().items():
      batch[name] = np.full((size, length), self._tokenizer.pad_id, np.int32)
    if self._specs is None:
      batch["mask"] = np.zeros((size, self._length), bool)
    if self._captions == "all":
      batch["captions"] = [[] for _ in range(size)]
    return batch

  def choose(self, found: Texts, caption_keys: Sequence[str], position: int) -> SelectedTexts:
    """Select the texts of the record at a position of the global stream.

    Raises:
      FeatureError: if the record lacks a required text.
    """
    captions = None
    if self._captions == "all":
      # All keys of a split file hold the same list, which retrieval must not count twice.
      lists = dict.fromkeys(tuple(_texts(found, key)) for key in caption_keys)
      captions = [text.decode(errors="replace") for texts in lists for text in texts]
      if caption_keys and not captions:
        raise FeatureError(f"no caption under {', '.join(caption_keys)}")
    if self._specs is None:
      return SelectedTexts((self._one_caption(found, caption_keys, position),), captions)
    return SelectedTexts(
      tuple(self._one(found, s, position) for s in self._specs.values()), captions
    )

  def write(
    self, batch: dict[str, Any], rows: Sequence[int], chosen: Sequence[SelectedTexts]
  ) -> None:
    """Encode the selected texts of the rows of a batch, in place."""
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

  def _one_caption(self, found: Texts, keys: Sequence[str], position: int) -> str:
    if not keys:
      return ""
    choices = [texts for key in keys if (texts := _texts(found, key))]
    if not choices:
      raise FeatureError(f"no caption under {', '.join(keys)}")
    return self._draw(choices, self._uniforms(position)).decode(errors="replace")

  def _one(self, found: Texts, spec: TextSpec, position: int) -> str:
    for keys, pick, needs_words in (
      (spec.keys, spec.pick, spec.needs_words),
      (spec.fallback, "whole", False),
      (spec.keys, "whole", False),
    ):
      choices = [
        texts
        for key in keys
        if (texts := [t for t in _texts(found, key) if not needs_words or t.strip(_EMPTY)])
      ]
      if not choices:
        continue
      # Seed with the keys: equal keys sample the same text, other keys sample independently.
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


def _texts(found: Texts, key: str) -> list[bytes]:
  return [text for text in found.get(key, ()) if text.strip()]
