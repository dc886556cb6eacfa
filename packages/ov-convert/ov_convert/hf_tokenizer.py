"""Tokenizer files as `transformers.AutoTokenizer` and `open_clip.get_tokenizer` read them.

Two files: tokenizer.json of the `tokenizers` library, which holds the whole preparation of text,
and tokenizer_config.json, which names the special tokens. The class is PreTrainedTokenizerFast: it
takes tokenizer.json as it is, where BertTokenizer would put its own normaliser in its place. That
one differs from training for compatibility characters such as a fraction or an ellipsis.
"""

import json
import pathlib
from typing import Any

from ov_convert import fields
from ov_convert.release import Words
from ov_convert.writing import write_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ROLES = ("pad", "bos", "eos", "unk", "cls")
# How vocabularies name special tokens, where tokenizer_config.json does not. ov_data.tokenizer has
# the same table, which this package may not import; importer_test of apps/exporter compares them.
_USUAL_NAMES = {
  "pad": ("[PAD]", "<pad>"),
  "bos": ("[bos]", "[BOS]", "<bos>", "<s>", "<|startoftext|>"),
  "eos": ("[eos]", "[EOS]", "<eos>", "</s>", "<|endoftext|>"),
  "unk": ("[UNK]", "<unk>"),
  "cls": ("[CLS]", "<cls>"),
}


def write_tokenizer(folder: pathlib.Path, words: Words, *, template: bool) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    folder: exists.
    words: the tokenizer.
    template: whether the tokenizer itself puts [bos] before a text and [eos] behind it. Without,
      it gives the pieces alone, and the caller adds what belongs around them.

  Raises:
    ValueError: the tokenizer has no token for an id that `words` names.
  """
  content: dict[str, Any] = json.loads(words.tokenizer_json)
  tokens = {role: _named(words, role) for role in _ROLES}
  # Listed as special, they are found by their names only where the caller asks for it.
  added = {token["content"]: token for token in content.get("added_tokens") or []}
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  for role, token in tokens.items():
    if token is not None:
      entry = {"id": getattr(words, f"{role}_id"), "content": token, **flags, "special": True}
      added[token] = entry
  content["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
  content["truncation"] = content["padding"] = None  # said by the caller, with the length
  content["post_processor"] = _template(words) if template else None
  write_json(folder / TOKENIZER_FILE, content)
  config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
  config |= {f"{role}_token": token for role, token in tokens.items() if token is not None}
  # "[eos]" in a text is text, not the end of it.
  config |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
  config |= {"padding_side": "right", "truncation_side": "right"}
  if template:  # without, a text longer than its pieces may be is nothing to warn of
    config["model_max_length"] = words.length
  write_json(folder / CONFIG_FILE, config)


def words_from(
  tokenizer_json: str, settings: dict[str, Any], *, length: int, append_cls: bool
) -> Words:
  """The tokenizer of a folder.

  Args:
    tokenizer_json: content of tokenizer.json.
    settings: content of tokenizer_config.json, or {}.
    length: see Words.
    append_cls: see Words.

  Raises:
    ValueError: no such file, or no token for padding, beginning, end or (if asked) [CLS].
  """
  try:
    names = Words(tokenizer_json, length, append_cls, 0, 0, 0).vocabulary
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{TOKENIZER_FILE} is none of the tokenizers library: {error!r}.") from None
  for token, number in names.items():
    # The library makes tables as long as the largest id.
    if type(number) is not int or not 0 <= number < fields.MAX_VOCABULARY:
      raise ValueError(
        f"{TOKENIZER_FILE} gives {fields.shown(token)} the id {fields.shown(number)}; expected a "
        f"whole number below {fields.MAX_VOCABULARY}."
      )
  found: dict[str, int | None] = {}
  for role in _ROLES:
    named = settings.get(f"{role}_token")
    named = named.get("content") if isinstance(named, dict) else named
    candidates = ([named] if isinstance(named, str) else []) + list(_USUAL_NAMES[role])
    found[role] = next((names[name] for name in candidates if name in names), None)
  needed = ("pad", "bos", "eos", "cls") if append_cls else ("pad", "bos", "eos")
  if missing := [role for role in needed if found[role] is None]:
    usual = "; ".join(f"{role}: {' or '.join(_USUAL_NAMES[role])}" for role in missing)
    raise ValueError(
      f"{TOKENIZER_FILE} has no token for {', '.join(missing)} among its {len(names)}. Name them "
      f"in {CONFIG_FILE}, or as is usual ({usual})."
    )
  ids = {f"{role}_id": number for role, number in found.items()}
  return Words(tokenizer_json, length, append_cls, **ids)  # type: ignore[arg-type]


def _named(words: Words, role: str) -> str | None:
  number = getattr(words, f"{role}_id")
  token = words.token(number)
  if number is not None and token is None:
    raise ValueError(f"{role}_id={number} is no id of the tokenizer; it belongs to another one.")
  return token


def _template(words: Words) -> dict[str, Any]:
  """[bos] text [eos], and two texts one after the other."""
  ids = {"bos": words.bos_id, "eos": words.eos_id}
  tokens = {role: str(words.token(number)) for role, number in ids.items()}

  def special(role: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": tokens[role], "type_id": 0}}

  def text(name: str) -> list[dict[str, Any]]:
    return [special("bos"), {"Sequence": {"id": name, "type_id": 0}}, special("eos")]

  return {
    "type": "TemplateProcessing",
    "single": text("A"),
    "pair": [*text("A"), *text("B")],
    "special_tokens": {
      tokens[role]: {"id": tokens[role], "ids": [number], "tokens": [tokens[role]]}
      for role, number in ids.items()
    },
  }
