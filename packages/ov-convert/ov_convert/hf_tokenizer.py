"""Tokenizer files for `transformers.AutoTokenizer` and `open_clip.get_tokenizer`.

There are two files: tokenizer.json of the `tokenizers` library, which contains the complete text
processing, and tokenizer_config.json, which names the special tokens. The class is
PreTrainedTokenizerFast, which uses tokenizer.json unchanged. BertTokenizer would replace its
normaliser by one that differs from training for compatibility characters such as fractions.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from ov_convert import fields, reading, text_cleaning
from ov_convert.release import TokenizerSpec
from ov_convert.writing import write_json
import ov_models

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ROLES = ("pad", "bos", "eos", "unk", "cls")
# Common names of special tokens, used if tokenizer_config.json does not name them. Must equal the
# table of ov_data.tokenizer, which this package may not import; apps/exporter/importer_test.py
# compares them.
_USUAL_NAMES = {
  "pad": ("[PAD]", "<pad>", "<|endoftext|>"),  # CLIP pads with its end token
  "bos": ("[bos]", "[BOS]", "<bos>", "<s>", "<|startoftext|>"),
  "eos": ("[eos]", "[EOS]", "<eos>", "</s>", "<|endoftext|>"),
  "unk": ("[UNK]", "<unk>"),
  "cls": ("[CLS]", "<cls>"),
}
# Vocabularies of SentencePiece, which this package cannot read.
_SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# By the model of tokenizer.json: padding and end token, and cleaning, of the classes of SigLIP in
# transformers.
_SIGLIP: dict[str, tuple[str, str, text_cleaning.Clean]] = {
  "Unigram": ("</s>", "</s>", "siglip"),  # SiglipTokenizer
  "BPE": ("<pad>", "<eos>", "lower"),  # Siglip2Tokenizer
}
# `clean` of HFTokenizer of open_clip.
_OPEN_CLIP_CLEAN: dict[str, text_cleaning.Clean] = {
  "whitespace": "none", "lower": "lower", "canonicalize": "canonicalize"
}  # fmt: skip


def write_tokenizer(folder: pathlib.Path, words: TokenizerSpec, *, template: bool) -> None:
  """Write tokenizer.json and tokenizer_config.json.

  Args:
    folder: existing directory.
    words: tokenizer.
    template: whether the tokenizer adds [bos], if any, and [eos]. Otherwise it returns the pieces
      only, and the caller adds special tokens.

  Raises:
    ValueError: if the tokenizer has no token for an id of `words`.
  """
  content: dict[str, Any] = json.loads(words.tokenizer_json)
  tokens = {role: _named(words, role) for role in _ROLES}
  # Special tokens are matched in text only if the caller requests it.
  added = {token["content"]: token for token in content.get("added_tokens") or []}
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  for role, token in tokens.items():
    if token is not None:
      entry = {"id": getattr(words, f"{role}_id"), "content": token, **flags, "special": True}
      added[token] = entry
  content["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
  content["truncation"] = content["padding"] = None  # set by the caller
  content["post_processor"] = _template(words) if template else None
  write_json(folder / TOKENIZER_FILE, content)
  config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
  config |= {f"{role}_token": token for role, token in tokens.items() if token is not None}
  # "[eos]" in a text is ordinary text, not the end token.
  config |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
  config |= {"padding_side": "right", "truncation_side": "right"}
  if template:  # otherwise the library would warn about long texts before they are truncated
    config["model_max_length"] = words.length
  write_json(folder / CONFIG_FILE, config)


def read_folder(
  root: pathlib.Path,
  text: ov_models.TextConfig,
  *,
  append_cls: bool = False,
  open_clip: Mapping[str, Any] | None = None,
  unpadded: bool = False,
) -> tuple[TokenizerSpec | None, list[str]]:
  """Return the tokenizer of a folder, or notes on why there is none.

  A SentencePiece vocabulary of a tower that reads the last column is that of SigLIP or SigLIP 2:
  texts have no [bos] and no [CLS], and are cleaned.

  Args:
    root: folder with tokenizer.json and, optionally, tokenizer_config.json.
    text: text tower.
    append_cls: see `TokenizerSpec`; ignored for SigLIP.
    open_clip: tokenizer_kwargs of open_clip, which then define the cleaning; None for transformers.
    unpadded: whether to ignore the padding token of tokenizer_config.json.

  Raises:
    ValueError: if the folder has a SentencePiece vocabulary without tokenizer.json.
  """
  if not (root / TOKENIZER_FILE).is_file():
    for name in _SENTENCEPIECE_FILES:
      if (root / name).is_file():
        raise ValueError(
          f"{root} has {name}, which needs SentencePiece, but no {TOKENIZER_FILE}; convert it with "
          "transformers, see docs/fine_tune.md."
        )
    return None, [f"no {TOKENIZER_FILE} in the folder; provide the tokenizer separately"]
  content = reading.read_json(root / TOKENIZER_FILE, reading.MAX_TOKENIZER_BYTES)
  settings = reading.read_json(root / CONFIG_FILE) if (root / CONFIG_FILE).is_file() else {}
  if unpadded:
    settings.pop("pad_token", None)
  notes = []
  begins = True
  kind = _sentencepiece_kind(content)
  clean: text_cleaning.Clean = "none"
  try:
    if kind and text.pool == "last" and text.padding == "attend":
      begins = append_cls = False
      pad, end, clean = _SIGLIP[kind]
      for role, token in (("pad_token", pad), ("eos_token", end)):
        if settings.get(role) is None:
          settings[role] = token
      if settings.get("padding_side") == "left":
        notes.append("texts are padded on the right, not on the left: the last column is pooled")
    if open_clip is not None:
      named = open_clip.get("clean", "whitespace")
      if not isinstance(named, str) or named not in _OPEN_CLIP_CLEAN:
        raise ValueError(
          f"tokenizer_kwargs.clean={fields.shown(named)} (supported: {', '.join(_OPEN_CLIP_CLEAN)})"
        )
      clean = _OPEN_CLIP_CLEAN[named]
    cleaned = json.dumps(text_cleaning.add(content, clean), ensure_ascii=False)
    words = tokenizer_spec_from(
      cleaned, settings, length=text.max_len, append_cls=append_cls, begins=begins
    )
  except ValueError as error:
    return None, [f"the tokenizer is not imported: {error}"]
  return words, notes


def _sentencepiece_kind(content: Mapping[str, Any]) -> str:
  """Return "Unigram" or "BPE" for a vocabulary of SentencePiece, "" for others."""
  model = content.get("model")
  model = model if isinstance(model, Mapping) else {}
  if model.get("type") == "BPE" and model.get("byte_fallback") is True:
    return "BPE"
  return "Unigram" if model.get("type") == "Unigram" else ""


def tokenizer_spec_from(
  tokenizer_json: str,
  settings: dict[str, Any],
  *,
  length: int,
  append_cls: bool,
  begins: bool = True,
) -> TokenizerSpec:
  """Return the tokenizer defined by the content of tokenizer files.

  Args:
    tokenizer_json: content of tokenizer.json.
    settings: content of tokenizer_config.json, or {}.
    length: see `TokenizerSpec`.
    append_cls: see `TokenizerSpec`.
    begins: whether texts begin with [bos].

  Raises:
    ValueError: if tokenizer.json is malformed, or has no [PAD], [bos] (with `begins`), [eos] or
      (with `append_cls`) [CLS] token.
  """
  try:
    names = TokenizerSpec(tokenizer_json, length, append_cls, 0, 0, 0).vocabulary
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(
      f"{TOKENIZER_FILE} is not a file of the tokenizers library: {error!r}."
    ) from None
  for token, number in names.items():
    # The tokenizers library allocates tables of the size of the largest id.
    if type(number) is not int or not 0 <= number < fields.MAX_VOCABULARY:
      raise ValueError(
        f"{TOKENIZER_FILE} assigns {fields.shown(token)} the id {fields.shown(number)}; expected "
        f"an integer below {fields.MAX_VOCABULARY}."
      )
  found: dict[str, int | None] = {}
  for role in _ROLES:
    named = settings.get(f"{role}_token")
    named = named.get("content") if isinstance(named, dict) else named
    candidates = ([named] if isinstance(named, str) else []) + list(_USUAL_NAMES[role])
    found[role] = next((names[name] for name in candidates if name in names), None)
  if not begins:
    found |= {"bos": None, "cls": None}
  needed = ["pad", *["bos"] * begins, "eos", *["cls"] * append_cls]
  if missing := [role for role in needed if found[role] is None]:
    usual = "; ".join(f"{role}: {' or '.join(_USUAL_NAMES[role])}" for role in missing)
    raise ValueError(
      f"{TOKENIZER_FILE} has no token for {', '.join(missing)} among its {len(names)}. Name them "
      f"in {CONFIG_FILE}, or use the usual names ({usual})."
    )
  begin = found.pop("bos")
  ids = {f"{role}_id": number for role, number in found.items() if number is not None}
  return TokenizerSpec(tokenizer_json, length, append_cls, bos_id=begin, **ids)


def _named(words: TokenizerSpec, role: str) -> str | None:
  number = getattr(words, f"{role}_id")
  token = words.token(number)
  if number is not None and token is None:
    raise ValueError(
      f"{role}_id={number} is not an id of the tokenizer, which belongs to another model."
    )
  return token


def _template(words: TokenizerSpec) -> dict[str, Any]:
  """Return the post-processor that adds [bos], if any, and [eos] to single texts and pairs."""
  ids = {} if words.bos_id is None else {"bos": words.bos_id}
  ids["eos"] = words.eos_id
  tokens = {role: str(words.token(number)) for role, number in ids.items()}

  def special(role: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": tokens[role], "type_id": 0}}

  def text(name: str) -> list[dict[str, Any]]:
    first = [special("bos")] if "bos" in ids else []
    return [*first, {"Sequence": {"id": name, "type_id": 0}}, special("eos")]

  return {
    "type": "TemplateProcessing",
    "single": text("A"),
    "pair": [*text("A"), *text("B")],
    "special_tokens": {
      tokens[role]: {"id": tokens[role], "ids": [number], "tokens": [tokens[role]]}
      for role, number in ids.items()
    },
  }
