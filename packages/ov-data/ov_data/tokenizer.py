"""Tokenizer on top of the `tokenizers` library, and packing of captions.

A caption becomes `[bos] pieces [eos]`, padded or truncated to a fixed length. Truncated rows also
end with [eos]. With `append_cls` the last column is [CLS], after the padding. Tokenizers without a
[bos] token, such as those of SigLIP, omit it.

The tokenizer is part of a trained model. `save` writes it to a folder with checksums and a few
texts with their ids. `load` rejects a folder that was modified or no longer reproduces the ids.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import json
import os
import pathlib
import string
from typing import Literal

import numpy as np
import tokenizers

from ov_data import (
  bert,
  detokenize,
  fs,
  reversible_pieces,
  text_cleaning,
  tokenizer_folder,
  tokenizer_json,
  word_pieces,
)

MAX_CHARS = 16_384  # longer texts are truncated before tokenization
# Larger calls use the threads of the library. For smaller calls the overhead exceeds the gain,
# because the loader is multithreaded.
_FEW_TEXTS = 64

TOKENIZER_FILE = "tokenizer.json"
PACKING_FILE = "packing.json"  # written last: a folder without it is incomplete
PROCESSOR_FILE = "text_processor.json"  # written by `TextProcessor`
MAX_LENGTH = 1 << 20  # maximum number of tokens of a row

_TRAINED_SPECIALS = ("[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Keep in sync with ov_convert.hf_tokenizer; importer_test of apps/exporter compares the tables.
_SPECIAL_NAMES = {
  "pad": ("[PAD]", "<pad>", "<|endoftext|>"),  # CLIP pads with its end token
  "bos": ("[bos]", "[BOS]", "<bos>", "<s>", "<|startoftext|>"),
  "eos": ("[eos]", "[EOS]", "<eos>", "</s>", "<|endoftext|>"),
  "unk": ("[UNK]", "<unk>"),
  "cls": ("[CLS]", "<cls>"),
}
_GOLDEN_LENGTH = 24
_GOLDEN_TEXTS = (
  "a large red striped circle above a small blue solid square",
  "A Café—naïve résumé, über coöperation! It's 3.5 €, ½ price™…",
  "東京タワー at night\t😀\nline two",
  "",
  "hyphen-ated [bos] don't " + "word " * 30,
)


class Tokenizer:
  """Encoder of texts to fixed-length rows of ids, and decoder. Thread-safe and picklable.

  Attributes:
    append_cls: whether rows end with [CLS].
    pad_id, eos_id: ids of the special tokens.
    bos_id: id of the first token of a row, or None if rows begin with the first piece.
    unk_id, cls_id: ids of the special tokens, or None if the vocabulary lacks them.
    special: see `__init__`.
    vocab_size: largest id + 1; lower bound of the vocabulary size of the model.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    append_cls: bool = False,
    special: Mapping[str, str] | None = None,
  ):
    """Wrap a tokenizer of the `tokenizers` library; see also the named constructors.

    Args:
      backend: tokenizer of the library.
      append_cls: whether rows end with [CLS].
      special: special tokens by role: "pad", "eos", and optionally "bos", "unk" and "cls". By
        default they are found by their usual names, and "bos" is required.

    Raises:
      ValueError: if the vocabulary lacks a required token, or `special` has an unknown role.
    """
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "[eos]" in a caption is plain text
    self._backend = backend
    self._ascii = bert.ascii_fast_path(backend)
    self._splits_as_bert = detokenize.splits_as_bert(backend)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    found = _special_ids(vocabulary, special)
    required = ("pad", "eos") if special is not None else ("pad", "bos", "eos")
    for role in (*required, *(("cls",) if append_cls else ())):
      if found[role] is None:
        raise ValueError(_missing_special(role, vocabulary))
    self.pad_id, self.eos_id = int(found["pad"] or 0), int(found["eos"] or 0)
    self.bos_id, self.unk_id, self.cls_id = found["bos"], found["unk"], found["cls"]
    self.special = None if special is None else dict(special)
    self.append_cls = append_cls
    self.vocab_size = max(vocabulary.values()) + 1

  @classmethod
  def from_vocab(cls, path: str | os.PathLike[str], *, append_cls: bool = False) -> "Tokenizer":
    """Create a tokenizer from a WordPiece vocabulary file in UTF-8, one token per line.

    A byte order mark and trailing empty lines are ignored.

    Text preparation equals TensorFlow Text's BertTokenizer(lower_case=True), with which the
    OpenVision models were trained. Unlike Hugging Face's BERT normalizer, it also folds
    compatibility characters ("½" to "1/2" with U+2044, "…" to "...", "™" to "tm").

    Raises:
      ValueError: if the file is not UTF-8, has empty or repeated lines, or lacks [PAD], [bos],
        [eos] or [UNK].
      FileNotFoundError: if the file does not exist.
    """
    vocabulary = tokenizer_json.parse_lines(_read(path), path)
    if "[UNK]" not in vocabulary:
      raise ValueError(
        f"vocabulary {path}: no [UNK] token among its {len(vocabulary)} lines; expected one token "
        "a line, as in vocab.txt of BERT."
      )
    try:
      return cls(bert.backend(vocabulary), append_cls=append_cls)
    except ValueError as error:
      raise ValueError(f"vocabulary {path}: {error}") from None

  @classmethod
  def from_file(
    cls,
    path: str | os.PathLike[str],
    *,
    append_cls: bool = False,
    special: Mapping[str, str] | None = None,
    clean: text_cleaning.Clean = "none",
  ) -> "Tokenizer":
    """Create a tokenizer from a tokenizer.json of the `tokenizers` library.

    Padding, truncation and template of the file are ignored.

    Args:
      path: tokenizer.json.
      append_cls: whether rows end with [CLS].
      special: see `__init__`.
      clean: cleaning of texts that the file does not contain, see `text_cleaning`.

    Raises:
      ValueError: if the file is malformed, ids are out of range, or pad, bos or eos tokens are
        missing.
      FileNotFoundError: if the file does not exist.
    """
    backend = tokenizer_json.parse(_read(path), path)
    text_cleaning.add(backend, clean)
    try:
      return cls(backend, append_cls=append_cls, special=special)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  @classmethod
  def train(
    cls,
    texts: Iterable[str],
    vocab_size: int,
    *,
    kind: Literal["pieces", "words"] = "pieces",
    min_frequency: int = 1,
    append_cls: bool = False,
    strip_accents: bool = False,
  ) -> "Tokenizer":
    """Learn a vocabulary. The result does not depend on the order of the texts.

    Texts are normalized to NFC and lower case. `decode` restores such a text up to white space if
    the vocabulary contains its letters; see `reversible_pieces`.

    Args:
      texts: captions of the training split.
      vocab_size: maximum vocabulary size, including the 7 special tokens [PAD] 0, [bos] 1, [eos] 2,
        [UNK] 3, ...
      kind: "pieces" splits rare words into parts; "words" contains only complete words and suits a
        small closed language.
      min_frequency: minimum frequency of words or pieces.
      append_cls: whether rows end with [CLS].
      strip_accents: whether to remove accents, as in the released models, and all other nonspacing
        marks, including vowel signs of Hindi, Thai and other scripts. Reduces small European
        vocabularies, but loses the meaning of such marks.

    Raises:
      ValueError: if vocab_size is too small or the texts contain no word.
    """
    if kind not in ("pieces", "words"):
      raise ValueError(f"kind={kind!r}: expected 'pieces' or 'words'.")
    room = vocab_size - len(_TRAINED_SPECIALS)
    if room < 1:
      raise ValueError(
        f"vocab_size={vocab_size}: expected more than the {len(_TRAINED_SPECIALS)} special tokens."
      )
    letters = kind == "words"
    normalizer = reversible_pieces.normalizer(strip_accents=strip_accents, letters=letters)
    counts: Counter[str] = Counter()
    for text in texts:
      words = normalizer.normalize_str(_clean(text)).split()
      counts.update(word for word in words if len(word) <= reversible_pieces.MAX_WORD_CHARS)
    if not counts:
      raise ValueError("the training texts contain no word.")
    learn = word_pieces.word_pieces if kind == "pieces" else word_pieces.frequent_words
    learnt = learn(counts, room, min_frequency)
    learnt += reversible_pieces.spelling_tokens(learnt, letters=letters)[: room - len(learnt)]
    tokens = [*_TRAINED_SPECIALS, *learnt]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = reversible_pieces.backend(vocabulary, strip_accents=strip_accents, letters=letters)
    return cls(backend, append_cls=append_cls)

  def encode(self, text: str | bytes) -> list[int]:
    """Return the ids of a text without special tokens."""
    return self._backend.encode(_clean(text), add_special_tokens=False).ids

  def encode_batch(
    self, texts: Sequence[str | bytes], length: int, append_cls: bool | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encode and pack texts.

    Args:
      texts: B captions; bytes are decoded as UTF-8 with U+FFFD for invalid bytes.
      length: number of columns T of the result, including [bos], [eos] and [CLS].
      append_cls: overrides the setting of the tokenizer.

    Returns:
      ids int32 [B, T], and mask bool [B, T], which is False on padding.

    Raises:
      ValueError: if length is too small for the special tokens, or the vocabulary has no [CLS].
    """
    append_cls = self.append_cls if append_cls is None else append_cls
    cls_id = self.cls_id if append_cls else None
    if append_cls and cls_id is None:
      raise ValueError(f"append_cls: {_missing_special('cls', self._backend.get_vocab())}")
    content = length - 1 if append_cls else length
    first = [] if self.bos_id is None else [self.bos_id]
    if not isinstance(length, int | np.integer) or length > MAX_LENGTH:
      raise ValueError(f"length={length!r}: expected an integer of at most {MAX_LENGTH:,}.")
    if content < 1 + len(first):
      specials = "[bos], [eos] and [CLS]" if append_cls else "[bos] and [eos]"
      raise ValueError(f"length={length} is too short for {specials}; raise it.")
    encodings = self._encodings([_clean(text) for text in texts])
    ids = np.full((len(encodings), length), self.pad_id, np.int32)
    mask = np.zeros((len(encodings), length), bool)
    for row, used, encoding in zip(ids, mask, encodings):
      words = [*first, *encoding.ids[: content - 1 - len(first)], self.eos_id]
      used[: len(words)] = True
      row[: len(words)] = words
    if cls_id is not None:
      ids[:, -1] = cls_id
      mask[:, -1] = True
    return ids, mask

  def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
    """Encode texts. Uses `encode_batch` for single texts too, because `encode` holds the GIL."""
    if len(texts) > _FEW_TEXTS:
      return self._backend.encode_batch_fast(texts, add_special_tokens=False)
    encodings = []
    for text in texts:
      backend = self._backend
      if self._ascii is not None and text.isascii():
        backend, text = self._ascii.backend, self._ascii.prepare(text)
      encodings += backend.encode_batch_fast([text], add_special_tokens=False)
    return encodings

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of one row up to its first [eos], without special and unused ids.

    A tokenizer of `train` restores spaces. BERT's text preparation loses spaces around punctuation;
    they are restored by the usual rules of spelling. Unknown words become the unknown token.
    """
    words: list[int] = []
    for i in np.asarray(ids).tolist():
      if i == self.eos_id:
        break
      if i not in (self.pad_id, self.bos_id, self.cls_id) and 0 <= i < self.vocab_size:
        words.append(i)
    if self._splits_as_bert:
      return detokenize.join_pieces([self._backend.id_to_token(i) or "" for i in words])
    return self._backend.decode(words, skip_special_tokens=False)

  def decode_batch(self, ids: np.ndarray) -> list[str]:
    """Return the texts of the rows of ids [B, T]."""
    return [self.decode(row) for row in ids]

  def check_fits(self, model_vocab_size: int) -> None:
    """Raise ValueError if the model has fewer embeddings than the vocabulary has tokens."""
    if self.vocab_size > model_vocab_size:
      raise ValueError(
        f"the tokenizer has {self.vocab_size} tokens but the model's vocab_size is "
        f"{model_vocab_size}; raise vocab_size to at least {self.vocab_size}."
      )

  def to_json(self) -> str:
    """Return the tokenizer as a tokenizer.json of the `tokenizers` library, without packing."""
    return self._backend.to_str(pretty=True)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digits of everything that affects ids."""
    content = [json.loads(self.to_json()), self.append_cls]
    if self.special is not None:
      content.append(self.special)
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def files(self) -> dict[str, bytes]:
    """Return the files of `save` by name: tokenizer.json and packing.json, in this order."""
    tokenizer = self.to_json().encode()
    packing = {
      "append_cls": self.append_cls,
      **({} if self.special is None else {"special": self.special}),
      "vocab_size": self.vocab_size,
      "max_chars": MAX_CHARS,
      "fingerprint": self.fingerprint,
      "tokenizer_sha256": tokenizer_folder.sha256(tokenizer),
      "tokenizers_version": tokenizers.__version__,
      "golden_length": _GOLDEN_LENGTH,
      "golden": [
        {"text": text, "ids": row}
        for text, row in zip(_GOLDEN_TEXTS, self._golden_ids(_GOLDEN_TEXTS, _GOLDEN_LENGTH))
      ],
    }
    return {TOKENIZER_FILE: tokenizer, PACKING_FILE: tokenizer_folder.seal(packing)}

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, and packing.json with the packing, checksums and golden ids.

    A new folder is created atomically. After an interrupted replacement of another tokenizer,
    `is_complete` is False and `load` raises FileNotFoundError.

    Raises:
      ValueError: if the folder is not local.
    """
    path = tokenizer_folder.check_local(folder)
    tokenizer_folder.write(path, self.files(), marks=(PACKING_FILE, PROCESSOR_FILE))

  @staticmethod
  def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains all files of `save`, without checking their content."""
    path = pathlib.Path(folder)
    return all((path / name).is_file() for name in (PACKING_FILE, TOKENIZER_FILE))

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
    """Load a folder of `save` and verify checksums and golden ids.

    Raises:
      FileNotFoundError: if the folder or one of its files is missing.
      ValueError: if a file was modified or is malformed, or texts do not encode to the stored ids.
    """
    path = pathlib.Path(folder)
    for name in (PACKING_FILE, TOKENIZER_FILE):
      if not (path / name).is_file():
        raise FileNotFoundError(
          f"no tokenizer in {path}: {name} is missing. This is not a tokenizer folder, or saving "
          "it was interrupted; save the tokenizer again."
        )
    packing = tokenizer_folder.read_sealed(path / PACKING_FILE)
    try:
      expected = tokenizer_folder.golden(packing["golden"])
      length, append_cls = packing["golden_length"], packing["append_cls"]
      if type(append_cls) is not bool or type(length) is not int or not 2 <= length <= 4096:
        raise ValueError(f"append_cls is {append_cls!r}, golden_length {str(length)[:40]}")
      special = packing.get("special")
      if special is not None and not all(isinstance(token, str) for token in special.values()):
        raise ValueError(f"special is {str(special)[:40]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{path / PACKING_FILE} is damaged: {error!r}.") from None
    data = _read(path / TOKENIZER_FILE)
    if packing.get("tokenizer_sha256") not in (None, tokenizer_folder.sha256(data)):
      raise ValueError(
        f"{path / TOKENIZER_FILE} was modified or replaced after {PACKING_FILE} was written; a "
        "model needs the tokenizer that it was trained with. Copy both files from its run again."
      )
    tokenizer = cls.from_file(path / TOKENIZER_FILE, append_cls=append_cls, special=special)
    same_library = packing.get("tokenizers_version") == tokenizers.__version__
    if same_library and packing.get("fingerprint") not in (None, tokenizer.fingerprint):
      raise ValueError(
        f"the tokenizer in {path} has fingerprint {tokenizer.fingerprint}, but {PACKING_FILE} says "
        f"{str(packing['fingerprint'])[:40]!r}; {TOKENIZER_FILE} was modified. Copy both files "
        "from the same run."
      )
    for (text, ids), now in zip(
      expected, tokenizer._golden_ids([text for text, _ in expected], length), strict=True
    ):
      if now != ids:
        raise ValueError(
          f"the tokenizer in {path} no longer reproduces its golden ids: {text[:40]!r} was "
          f"{ids}, is {now}. Either its files were modified, or tokenizers "
          f"{tokenizers.__version__} differs from {packing.get('tokenizers_version')}."
        )
    return tokenizer

  def _golden_ids(self, texts: Sequence[str], length: int) -> list[list[int]]:
    return self.encode_batch(texts, length)[0].tolist()


def canonicalise_text(text: str, keep: str = "") -> str:
  """Canonicalize a class name or prompt template as in the OpenVision evaluation.

  Underscores become spaces, ASCII punctuation is removed (hyphens without a space), the text is
  lower-cased, and runs of white space become one space.

  Args:
    text: class name or template.
    keep: literal that is not changed: "," for class names, "{}" for templates.
  """
  drop = str.maketrans("", "", string.punctuation)
  text = text.replace("_", " ")
  parts = text.split(keep) if keep else [text]
  return " ".join(keep.join(part.translate(drop) for part in parts).lower().split())


def _clean(text: str | bytes) -> str:
  """Return at most MAX_CHARS characters of valid Unicode."""
  if isinstance(text, bytes):
    return text[: 4 * MAX_CHARS].decode("utf-8", "replace")[:MAX_CHARS]
  text = text[:MAX_CHARS]
  if text.isascii():
    return text
  return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"


def _read(path: str | os.PathLike[str]) -> bytes:
  """Return the content of a local file; raise FileNotFoundError if it is not a regular file."""
  name = os.fsdecode(path)
  fs.check_name(name)
  if fs.is_remote(name):
    raise FileNotFoundError(f"{name}: expected a local file; copy it to a local disk first")
  return fs.read_regular(name, tokenizer_json.MAX_BYTES)


def _special_ids(
  vocabulary: dict[str, int], special: Mapping[str, str] | None
) -> dict[str, int | None]:
  """Return the ids of special tokens by role; see `Tokenizer`."""
  if special is None:
    return {
      role: next((vocabulary[n] for n in names if n in vocabulary), None)
      for role, names in _SPECIAL_NAMES.items()
    }
  for role, token in special.items():
    if role not in _SPECIAL_NAMES or token not in vocabulary:
      raise ValueError(
        f"special={{{str(role)[:40]!r}: {str(token)[:40]!r}}}: expected a role of "
        f"{', '.join(_SPECIAL_NAMES)} with one of the {len(vocabulary)} tokens"
      )
  return {role: vocabulary[special[role]] if role in special else None for role in _SPECIAL_NAMES}


def _missing_special(role: str, vocabulary: dict[str, int]) -> str:
  names = " or ".join(_SPECIAL_NAMES[role])
  message = f"no {names} token among {len(vocabulary)} tokens."
  if role in ("bos", "eos") and "[unused0]" in vocabulary:
    message += (
      " This is a stock BERT vocabulary: name its tokens [unused0] and [unused1] [bos] and [eos]."
    )
  return message
