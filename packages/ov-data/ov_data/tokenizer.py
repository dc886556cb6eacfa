"""Text to token ids: WordPiece through the `tokenizers` library, and the packing of captions.

A caption becomes `[bos] pieces [eos]`, padded to a fixed length; where it is too long, the last
slot is overwritten with [eos], so that every row ends in one. With `append_cls` the last column
is [CLS], behind the padding.

The tokenizer is part of a trained model. `save` writes it as one folder together with a few texts
and their ids, and `load` refuses a folder that no longer reproduces them.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
import hashlib
import json
import os
import pathlib
import string
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from ov_data import bert, fs, outputs, word_pieces

MAX_CHARS = 16_384  # of a text; what follows is cut off before tokenising
# More texts in a call are spread over the library's threads. For fewer, waking them costs more than
# it saves: the loader has threads of its own.
_FEW_TEXTS = 64

TOKENIZER_FILE = "tokenizer.json"
_MAX_BYTES = 256 << 20  # of a vocabulary
_PACKING_FILE = "packing.json"  # written last: a folder without it is incomplete

_TRAINED_SPECIALS = ("[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# ov_convert.hf_tokenizer has the same table; importer_test of apps/exporter compares them.
_SPECIAL_NAMES = {
  "pad": ("[PAD]", "<pad>"),
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
  """Encodes texts to fixed-length id rows and back. Safe to share between threads, picklable.

  Attributes:
    append_cls: whether rows end in [CLS].
    pad_id, bos_id, eos_id: ids of the special tokens.
    unk_id, cls_id: the same, or None where the vocabulary has none.
    vocab_size: one more than the largest id; the model's vocabulary must be at least as large.
  """

  def __init__(self, backend: tokenizers.Tokenizer, *, append_cls: bool = False):
    """Takes a tokenizer of the `tokenizers` library; use the named constructors otherwise.

    Raises:
      ValueError: the vocabulary lacks a token for padding, beginning, end, or (if asked) [CLS].
    """
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "[eos]" in a caption is text, not the end of it
    self._backend = backend
    self._ascii_backend = bert.without_normalizer(backend)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    found = {
      role: next((vocabulary[n] for n in names if n in vocabulary), None)
      for role, names in _SPECIAL_NAMES.items()
    }
    for role in ("pad", "bos", "eos", *(("cls",) if append_cls else ())):
      if found[role] is None:
        raise ValueError(_missing_special(role, vocabulary))
    self.pad_id, self.bos_id, self.eos_id = (int(found[r] or 0) for r in ("pad", "bos", "eos"))
    self.unk_id, self.cls_id = found["unk"], found["cls"]
    self.append_cls = append_cls
    self.vocab_size = max(vocabulary.values()) + 1

  @classmethod
  def from_vocab(cls, path: str | os.PathLike[str], *, append_cls: bool = False) -> "Tokenizer":
    """From a WordPiece vocabulary: UTF-8 text, one token a line, the line number is the id.

    A byte order mark at the beginning is no part of the first token. Empty lines at the end are
    ignored.

    Text is prepared as by TensorFlow Text's BertTokenizer(lower_case=True), which the OpenVision
    models were trained with. Note that this is not what Hugging Face's BERT normaliser does: it
    also folds compatibility characters ("½" to "1/2" with U+2044, "…" to "...", "™" to "tm").

    Raises:
      ValueError: not UTF-8, an empty or a repeated line, or no [PAD], [bos], [eos], [UNK].
      FileNotFoundError: no such file.
    """
    data = _read(path).removeprefix(codecs.BOM_UTF8)
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError as error:
      number = data.count(b"\n", 0, error.start) + 1
      raise ValueError(f"vocabulary {path}, line {number}: not UTF-8 ({error.reason}).") from None
    vocabulary: dict[str, int] = {}
    for i, line in enumerate(text.rstrip("\r\n").split("\n")):
      token = line.removesuffix("\r")
      if not token:
        raise ValueError(f"vocabulary {path}, line {i + 1}: empty; every line is one token.")
      if token in vocabulary:
        first = vocabulary[token] + 1
        raise ValueError(f"vocabulary {path}, line {i + 1}: {token!r} stands on line {first} too.")
      vocabulary[token] = i
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
  def from_file(cls, path: str | os.PathLike[str], *, append_cls: bool = False) -> "Tokenizer":
    """From a tokenizer.json of the `tokenizers` library; its padding and template are not used.

    Raises:
      ValueError: not such a file, or without tokens for padding, beginning and end.
      FileNotFoundError: no such file.
    """
    text = _read(path).removeprefix(codecs.BOM_UTF8)
    try:
      backend = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises bare Exception
      reason = " ".join(str(error).split())[:200]
      raise ValueError(f"{path} is no tokenizer.json: {reason}") from None
    try:
      return cls(backend, append_cls=append_cls)
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
  ) -> "Tokenizer":
    """Learns a vocabulary; the same texts, in any order, give the same tokenizer.

    Args:
      texts: captions of the training split.
      vocab_size: upper limit, with the 7 special tokens: [PAD] 0, [bos] 1, [eos] 2, [UNK] 3 ...
      kind: "pieces" spells rare words in parts; "words" knows whole words only, and is the better
        choice for a small closed language.
      min_frequency: words or pieces seen less often are left out.
      append_cls: see the class.

    Raises:
      ValueError: vocab_size leaves no room, or the texts hold no word.
    """
    if kind not in ("pieces", "words"):
      raise ValueError(f"kind={kind!r}: expected 'pieces' or 'words'.")
    room = vocab_size - len(_TRAINED_SPECIALS)
    if room < 1:
      raise ValueError(
        f"vocab_size={vocab_size}: expected more than the {len(_TRAINED_SPECIALS)} special tokens."
      )
    normalizer, splitter = bert.normalizer(), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
      split = splitter.pre_tokenize_str(normalizer.normalize_str(_clean(text)))
      counts.update(word for word, _ in split if len(word) <= bert.MAX_WORD_CHARS)
    if not counts:
      raise ValueError("the texts to train a tokenizer on hold no word.")
    learn = word_pieces.word_pieces if kind == "pieces" else word_pieces.frequent_words
    tokens = [*_TRAINED_SPECIALS, *learn(counts, room, min_frequency)]
    return cls(bert.backend({token: i for i, token in enumerate(tokens)}), append_cls=append_cls)

  def encode(self, text: str | bytes) -> list[int]:
    """Ids of the text alone, without special tokens."""
    return self._backend.encode(_clean(text), add_special_tokens=False).ids

  def encode_batch(
    self, texts: Sequence[str | bytes], length: int, append_cls: bool | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes and packs texts.

    Args:
      texts: B captions; bytes are read as UTF-8, damaged parts of it as U+FFFD.
      length: T, columns of the result, [bos], [eos] and [CLS] included.
      append_cls: overrides the tokenizer's own setting.

    Returns:
      ids int32 [B, T], and mask bool [B, T]: True where the id is not padding.

    Raises:
      ValueError: length leaves no room for the special tokens, or the vocabulary has no [CLS].
    """
    append_cls = self.append_cls if append_cls is None else append_cls
    cls_id = self.cls_id if append_cls else None
    if append_cls and cls_id is None:
      raise ValueError(f"append_cls: {_missing_special('cls', self._backend.get_vocab())}")
    content = length - 1 if append_cls else length
    if content < 2:
      specials = "[bos], [eos] and [CLS]" if append_cls else "[bos] and [eos]"
      raise ValueError(f"length={length} has no room for {specials}; raise it.")
    encodings = self._encodings([_clean(text) for text in texts])
    ids = np.full((len(encodings), length), self.pad_id, np.int32)
    for row, encoding in zip(ids, encodings):
      words = encoding.ids[: content - 2]
      row[0] = self.bos_id
      row[1 : 1 + len(words)] = words
      row[1 + len(words)] = self.eos_id
    if cls_id is not None:
      ids[:, -1] = cls_id
    return ids, ids != self.pad_id

  def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
    """Batches of one do release the interpreter lock, a plain `encode` does not."""
    if len(texts) > _FEW_TEXTS:
      return self._backend.encode_batch_fast(texts, add_special_tokens=False)
    encodings = []
    for text in texts:
      backend = self._backend
      if self._ascii_backend is not None and text.isascii():
        backend, text = self._ascii_backend, text.translate(bert.NORMAL_ASCII)
      encodings += backend.encode_batch_fast([text], add_special_tokens=False)
    return encodings

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of one row, up to its first [eos]; special and unused ids are passed over."""
    words: list[int] = []
    for i in np.asarray(ids).tolist():
      if i == self.eos_id:
        break
      if i not in (self.pad_id, self.bos_id, self.cls_id) and 0 <= i < self.vocab_size:
        words.append(i)
    return self._backend.decode(words, skip_special_tokens=False)

  def decode_batch(self, ids: np.ndarray) -> list[str]:
    """Texts of the rows of ids [B, T]."""
    return [self.decode(row) for row in ids]

  def check_fits(self, model_vocab_size: int) -> None:
    """Raises ValueError where the model has fewer embeddings than the vocabulary has tokens."""
    if self.vocab_size > model_vocab_size:
      raise ValueError(
        f"the tokenizer has {self.vocab_size} tokens but the model's vocab_size is "
        f"{model_vocab_size}; raise vocab_size to at least {self.vocab_size}."
      )

  def to_json(self) -> str:
    """What makes the pieces, as a tokenizer.json of the `tokenizers` library."""
    return self._backend.to_str(pretty=True)

  @property
  def fingerprint(self) -> str:
    """Changes with anything that changes ids."""
    content = json.loads(self.to_json())
    text = json.dumps([content, self.append_cls], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, and packing.json with the packing and the golden vectors.

    Raises:
      ValueError: the folder is not local.
    """
    path = outputs.local_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    packing = {
      "format": 1,
      "append_cls": self.append_cls,
      "vocab_size": self.vocab_size,
      "max_chars": MAX_CHARS,
      "fingerprint": self.fingerprint,
      "tokenizers_version": tokenizers.__version__,
      "golden_length": _GOLDEN_LENGTH,
      "golden": [
        {"text": text, "ids": row}
        for text, row in zip(_GOLDEN_TEXTS, self._golden_ids(_GOLDEN_TEXTS, _GOLDEN_LENGTH))
      ],
    }
    _write(path / TOKENIZER_FILE, self.to_json())
    _write(path / _PACKING_FILE, json.dumps(packing, ensure_ascii=False, indent=1) + "\n")

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
    """Reads a folder that `save` wrote and checks that it still encodes as it did then.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file cannot be read, or texts no longer encode to the stored ids.
    """
    path = pathlib.Path(folder)
    for name in (_PACKING_FILE, TOKENIZER_FILE):
      if not (path / name).is_file():
        raise FileNotFoundError(f"no tokenizer in {path}: {name} is missing.")
    try:
      packing: dict[str, Any] = json.loads((path / _PACKING_FILE).read_text("utf-8"))
      golden, length = packing["golden"], int(packing["golden_length"])
      expected = {entry["text"]: entry["ids"] for entry in golden}
      append_cls = bool(packing["append_cls"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path / _PACKING_FILE} is damaged: {error!r}.") from None
    tokenizer = cls.from_file(path / TOKENIZER_FILE, append_cls=append_cls)
    for (text, ids), now in zip(
      expected.items(), tokenizer._golden_ids(list(expected), length), strict=True
    ):
      if now != ids:
        raise ValueError(
          f"the tokenizer in {path} no longer encodes as when it was saved: {text[:40]!r} was "
          f"{ids}, is {now}. Either its files were changed, or tokenizers "
          f"{tokenizers.__version__} differs from {packing.get('tokenizers_version')}."
        )
    return tokenizer

  def _golden_ids(self, texts: Sequence[str], length: int) -> list[list[int]]:
    return self.encode_batch(texts, length)[0].tolist()


def canonicalise_text(text: str, keep: str = "") -> str:
  """Prepares class names and prompt templates as the OpenVision evaluation does.

  Underscores become spaces, ASCII punctuation goes (hyphens leave no space behind), upper case
  becomes lower, runs of white space become one space.

  Args:
    text: a class name or template.
    keep: a literal that stays as it is: "," for class names, "{}" for templates.
  """
  drop = str.maketrans("", "", string.punctuation)
  text = text.replace("_", " ")
  parts = text.split(keep) if keep else [text]
  return " ".join(keep.join(part.translate(drop) for part in parts).lower().split())


def _clean(text: str | bytes) -> str:
  """At most MAX_CHARS characters that can be encoded as UTF-8."""
  if isinstance(text, bytes):
    return text[: 4 * MAX_CHARS].decode("utf-8", "replace")[:MAX_CHARS]
  text = text[:MAX_CHARS]
  if text.isascii():
    return text
  return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"


def _read(path: str | os.PathLike[str]) -> bytes:
  """Return the content of a local file; FileNotFoundError where it is no regular one."""
  name = os.fsdecode(path)
  fs.check_name(name)
  if fs.is_remote(name):
    raise FileNotFoundError(f"{name}: expected a local file; copy it to a disk first")
  return fs.read_regular(name, _MAX_BYTES)


def _missing_special(role: str, vocabulary: dict[str, int]) -> str:
  names = " or ".join(_SPECIAL_NAMES[role])
  message = f"no {names} token among {len(vocabulary)} tokens."
  if role in ("bos", "eos") and "[unused0]" in vocabulary:
    message += (
      " This is a stock BERT vocabulary: name its tokens [unused0] and [unused1] [bos] and [eos]."
    )
  return message


def _write(path: pathlib.Path, text: str) -> None:
  """Whole file or none: written under another name, then renamed."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, "utf-8")
  partial.replace(path)
