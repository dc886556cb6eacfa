"""Captions in a text or JSON file next to an image, in a folder or in a tar."""

from collections.abc import Mapping

from ov_data.layouts import text_rules
from ov_data.layouts.items import Notes, clean_captions

TEXTS = ("txt", "text", "caption")  # the first one with a caption is used


def captions(
  key: str, texts: Mapping[str, bytes], meta: bytes | None, notes: Notes
) -> tuple[str, ...]:
  """Return the captions of the text file of an image, otherwise those of its JSON file.

  Args:
    key: key of the image, for messages and notes.
    texts: contents of text files by suffix in TEXTS.
    meta: JSON with "caption" or "captions".
    notes: notes that count unused captions.

  Raises:
    TextError: if there is no caption and one of the files cannot be read.
  """
  found: tuple[str, ...] = ()
  problem: text_rules.TextError | None = None
  for suffix in TEXTS:
    if suffix not in texts:
      continue
    try:
      texts_found = clean_captions([_bounded(texts[suffix])], key, notes)
    except text_rules.TextError as error:
      problem = problem or error
      continue
    if found and not set(texts_found) <= set(found):
      notes.add("captions in another text file not used", f"{key}: .{suffix}")
    found = found or texts_found
  if meta is not None:
    try:
      in_json = clean_captions(_json_captions(meta), key, notes)
    except text_rules.TextError as error:
      problem = problem or error
    else:
      if found and not set(in_json) <= set(found):
        notes.add("captions in JSON not used next to a text file", key)
      found = found or in_json
  if not found and problem:
    raise problem
  return found


def _bounded(data: bytes) -> str:
  if len(data) > text_rules.MAX_CAPTION_BYTES:
    raise text_rules.TextError(
      "caption too long", f"over {text_rules.MAX_CAPTION_BYTES:,} bytes of text"
    )
  return text_rules.decode(data)


def _json_captions(data: bytes) -> list[str]:
  if len(data) > text_rules.MAX_JSON_BYTES:
    raise text_rules.TextError(
      "metadata too long", f"over {text_rules.MAX_JSON_BYTES:,} bytes of JSON"
    )
  try:
    content = text_rules.parse_json(data, "JSON")
    if not isinstance(content, dict):
      raise ValueError(f"JSON: expected an object, found {text_rules.short(content)}.")
    return text_rules.listed_captions(content, ("captions", "caption"), "JSON")
  except ValueError as error:
    raise text_rules.TextError("unreadable caption", str(error)) from None
