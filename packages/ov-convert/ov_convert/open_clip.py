"""Folders of open_clip: `open_clip.create_model_from_pretrained("local-dir:FOLDER")`.

Written for the library as it is released (3.3.0): two towers as its CLIP; an image tower alone as
`visual`, with a text tower of one word and zero weights beside it, for the library demands one, and
the identity for a projection. Caption decoders are left out. Read are such folders, those of the
published PyTorch weights, and other ViTs that fit.

`open_clip.get_tokenizer("local-dir:FOLDER")` makes the ids of training, but for what it does to a
text before, which no setting turns off: ftfy repairs mojibake, makes typographic quotes straight
and drops control characters, and HTML entities are resolved. Texts with these get other ids.

A text tower that masks padding has no switch in the library's configuration. It is written as the
library's tower with an appended token (`embed_cls`), whose mask hides what follows padding. There
[eos] is made the padding, so that all behind the text is hidden and nothing else. Embeddings are
the same; ids have [eos] where training has [PAD]. See `mask_padding`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from ov_convert import fields, hf_tokenizer, open_clip_config, reading, vision
from ov_convert.name_map import (
  CONV,
  LEAD_1,
  SAME,
  TRANSPOSE,
  Dropped,
  Entry,
  Fixed,
  Flat,
  NameMap,
  Params,
)
from ov_convert.release import Config, Imported, Release, Words, encoder_of
from ov_convert.writing import write_json, write_weights
import ov_models

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHTS_FILES = (  # in the library's own order
  WEIGHTS_FILE,
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
  "open_clip_pytorch_model.pth",
  "model.safetensors",
  "pytorch_model.bin",
)
_QKV = ("query", "key", "value")
_BLOCK = (  # theirs, ours, transform
  ("ln_1.weight", ("norm1/scale",), SAME),
  ("ln_1.bias", ("norm1/bias",), SAME),
  ("attn.in_proj_weight", tuple(f"attn/{name}/kernel" for name in _QKV), TRANSPOSE),
  ("attn.in_proj_bias", tuple(f"attn/{name}/bias" for name in _QKV), SAME),
  ("attn.out_proj.weight", ("attn/out/kernel",), TRANSPOSE),
  ("attn.out_proj.bias", ("attn/out/bias",), SAME),
  ("ln_2.weight", ("norm2/scale",), SAME),
  ("ln_2.bias", ("norm2/bias",), SAME),
  ("mlp.c_fc.weight", ("mlp/up/kernel",), TRANSPOSE),
  ("mlp.c_fc.bias", ("mlp/up/bias",), SAME),
  ("mlp.c_proj.weight", ("mlp/down/kernel",), TRANSPOSE),
  ("mlp.c_proj.bias", ("mlp/down/bias",), SAME),
)
_NO_DECODER = "open_clip has no caption decoder of this kind"
_NO_HEAD = "a tower on its own is not projected: the projection must be the identity"
_NO_TEXT = "stands in for a text tower, which the library demands"


def name_map(config: Config) -> NameMap:
  """Every tensor of `config` in both libraries, before `mask_padding`.

  Raises:
    ValueError: the config has parameters that the library lacks; all are listed.
  """
  ours = "" if isinstance(config, ov_models.ViTConfig) else "encoder/"
  encoder = encoder_of(config)
  lines: list[Entry | Fixed] = list(_image_tower(encoder, ours))
  if isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None:
    lines += _text_tower(config.text)
    lines.append(Entry("visual.proj", ("image_head/kernel",)))
    lines.append(Entry("logit_scale", ("log_scale",), also=(LEAD_1,)))
    if config.bias_init is not None:
      lines.append(Entry("logit_bias", ("bias",), also=(LEAD_1,)))
  else:
    lines.append(Fixed("visual.proj", np.eye(encoder.width, dtype=np.float32), _NO_HEAD))
    lines += _no_text_tower(encoder.width)
  decoder = () if getattr(config, "decoder", None) is None else (Dropped("decoder/", _NO_DECODER),)
  return NameMap(
    "open_clip",
    entries=tuple(line for line in lines if isinstance(line, Entry)),
    fixed=tuple(line for line in lines if isinstance(line, Fixed)),
    dropped=decoder,
  )


def check(release: Release) -> None:
  """Raises ValueError, naming them, where a model has what the library cannot express."""
  if found := open_clip_config.problems(release):
    raise ValueError("open_clip cannot express this model:\n  " + "\n  ".join(found))


def write(folder: pathlib.Path, release: Release) -> None:
  """Writes open_clip_config.json, open_clip_model.safetensors, and the tokenizer of a text tower.

  Raises:
    ValueError: see `check`.
  """
  check(release)
  folder.mkdir(parents=True, exist_ok=True)
  names = name_map(release.config)
  flat = names.to_theirs(release.params, release.config)
  text, words = release.text, release.words
  if text is not None and words is not None:
    pad_id = words.pad_id
    if open_clip_config.masks_padding(text):
      flat = mask_padding(flat, int(words.cls_id or 0))
      pad_id = words.eos_id
    shown = dataclasses.replace(words, pad_id=pad_id)
    hf_tokenizer.write_tokenizer(folder, shown, template=not words.append_cls)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, names.fixed)
  write_json(folder / CONFIG_FILE, open_clip_config.write(release))


def read(folder: str | os.PathLike[str], python: str | os.PathLike[str] | None = None) -> Imported:
  """Reads a folder: what `write` wrote, published PyTorch weights, or another ViT that fits.

  Args:
    folder: holds open_clip_config.json and the weights, *.safetensors, *.bin or *.pth.
    python: interpreter with PyTorch for the latter two; see `reading.read_tensors`.

  Returns:
    Two towers; or the ViTConfig of an image tower without a text tower, whose projection is left
    out. Notes say what was changed or left out.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is none of ours; all differing fields, or tensors, are listed.
  """
  root = pathlib.Path(folder)
  content = reading.read_json(root / CONFIG_FILE)
  model = fields.section(content, "model_cfg", f"{root / CONFIG_FILE}: ") or content
  if found := open_clip_config.misfits(model):
    raise ValueError(f"{root / CONFIG_FILE} is no model of ours:\n  " + "\n  ".join(found))
  flat = reading.read_tensors(root, _WEIGHTS_FILES, python)
  if not any(name.startswith("visual.") for name in flat):  # a repository of the image tower alone
    flat = {f"visual.{name}": tensor for name, tensor in flat.items()}
  table = flat.get("visual.positional_embedding", np.zeros((0, 0)))
  size, patch = open_clip_config.image_and_patch(model)
  encoder = open_clip_config.read_vision(model, vision.kind_of_positions(table, size, patch))
  sizes = {"width": encoder.width, "width * mlp_ratio": encoder.mlp_dim}
  fields.check_against_weights(flat, encoder.depth, sizes, f"{root / CONFIG_FILE}: vision_cfg")
  preprocess, notes = open_clip_config.read_preprocess(content, encoder.image_size)
  with_words = any(name.endswith("token_embedding.weight") for name in flat)
  if not (open_clip_config.has_text(model) and with_words):
    params, more = _read_image_tower(flat, encoder)
    return Imported(encoder, params, preprocess, None, (*notes, *more))
  text = open_clip_config.read_text(model)
  sizes = {"width": text.width, "width * mlp_ratio": text.mlp_dim, "vocab_size": text.vocab_size}
  fields.check_against_weights(flat, text.depth, sizes, f"{root / CONFIG_FILE}: text_cfg")
  words, more = _read_words(root, model["text_cfg"], text)
  if open_clip_config.masks_padding(text):
    if words is None or words.cls_id is None:
      raise ValueError(f"{root}: text_cfg.embed_cls needs the tokenizer beside it; {more[0]}")
    text = dataclasses.replace(text, pad_id=words.pad_id)
    flat = unmask_padding(flat, words.cls_id)
  else:
    flat = {name.removeprefix("text."): tensor for name, tensor in flat.items()}
  config = ov_models.VisionLanguageConfig(
    encoder=encoder,
    text=text,
    decoder=None,
    embed_dim=model["embed_dim"],
    log_scale_init=_log_scale(model),
    bias_init=float(np.reshape(flat["logit_bias"], ())) if "logit_bias" in flat else None,
  )
  params = name_map(config).to_ours(flat, config)
  return Imported(config, params, preprocess, words, (*notes, *more))


def _log_scale(model: Mapping[str, Any]) -> float:
  given = model.get("init_logit_scale")
  return ov_models.VisionLanguageConfig.log_scale_init if given is None else float(given)


def mask_padding(flat: Flat, cls_id: int) -> Flat:
  """Tensors of a CLIP as those of a CustomTextCLIP whose text tower masks padding.

  The library's tower puts one more token behind the T of a text, and lets no token see a column
  whose neighbour to the left is padding. With [eos] for padding those are the padding and the
  column of [CLS]. So the appended token takes the embedding and the position of [CLS]; column
  T - 1, which nothing sees, gets position 0.

  Args:
    flat: as `name_map` names them.
    cls_id: id of [CLS].
  """
  renamed = {}
  for name, tensor in flat.items():
    whole = name.startswith(("visual.", "logit_"))
    renamed[name if whole else f"text.{name}"] = tensor
  table = flat["positional_embedding"]
  unseen = np.zeros_like(table[:1])
  renamed["text.positional_embedding"] = np.concatenate([table[:-1], unseen, table[-1:]])
  renamed["text.cls_emb"] = flat["token_embedding.weight"][cls_id]
  return renamed


def unmask_padding(flat: Mapping[str, np.ndarray], cls_id: int) -> Flat:
  """The inverse of `mask_padding`; ValueError where the appended token is not [CLS]."""
  plain = {name.removeprefix("text."): tensor for name, tensor in flat.items()}
  appended = plain.pop("cls_emb", None)
  words, table = plain.get("token_embedding.weight"), plain.get("positional_embedding")
  if words is not None and not cls_id < len(words):
    raise ValueError(f"[CLS] has id {cls_id}, but there are embeddings of {len(words)} tokens.")
  if appended is not None and words is not None and not np.array_equal(words[cls_id], appended):
    raise ValueError(f"text.cls_emb is not the embedding of [CLS], id {cls_id}, as we write it.")
  if table is not None and len(table) > 1:
    plain["positional_embedding"] = np.concatenate([table[:-2], table[-1:]])
  return plain


def _image_tower(config: ov_models.ViTConfig, ours: str) -> Iterator[Entry | Fixed]:
  yield Entry("visual.class_embedding", (f"{ours}cls",))
  yield vision.position("visual.positional_embedding", config, ours, SAME)
  yield Entry("visual.conv1.weight", (f"{ours}patch_embed/kernel",), CONV)
  yield Entry("visual.ln_post.weight", (f"{ours}norm/scale",))
  yield Entry("visual.ln_post.bias", (f"{ours}norm/bias",))
  yield from _blocks("visual.", ours, config.depth)


def _text_tower(config: ov_models.TextConfig) -> Iterator[Entry]:
  yield Entry("token_embedding.weight", ("text/embed/embedding",))
  yield Entry("positional_embedding", ("text/position_embedding",))
  yield Entry("ln_final.weight", ("text/norm/scale",))
  yield Entry("ln_final.bias", ("text/norm/bias",))
  yield Entry("text_projection", ("text_head/kernel",))
  yield from _blocks("", "text/", config.depth)


def _no_text_tower(embed_dim: int) -> Iterator[Fixed]:
  """All tensors of open_clip_config.NO_TEXT, zero."""
  shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
  shapes |= {"token_embedding.weight": (1, 1), "positional_embedding": (1, 1)}
  shapes |= {"ln_final.weight": (1,), "ln_final.bias": (1,), "text_projection": (1, embed_dim)}
  for name, ours, _ in _BLOCK:
    rows = len(ours)
    matrix = any(path.endswith("kernel") for path in ours)
    shapes[f"transformer.resblocks.0.{name}"] = (rows, 1) if matrix else (rows,)
  for name, shape in shapes.items():
    yield Fixed(name, np.zeros(shape, np.float32), _NO_TEXT)


def _blocks(theirs: str, ours: str, depth: int) -> Iterator[Entry]:
  for layer in range(depth):
    for name, paths, transform in _BLOCK:
      path = tuple(f"{ours}blocks/{path}" for path in paths)
      yield Entry(f"{theirs}transformer.resblocks.{layer}.{name}", path, transform, layer)


def _read_image_tower(
  flat: Mapping[str, np.ndarray], encoder: ov_models.ViTConfig
) -> tuple[Params, list[str]]:
  """An image tower on its own, without its projection."""
  notes = []
  head = flat.get("visual.proj")
  if head is not None and not np.array_equal(head, np.eye(*head.shape[:2], dtype=np.float32)):
    notes.append(f"left out visual.proj {head.shape}: the tower gives what it had before it")
  image = {name: tensor for name, tensor in flat.items() if name.startswith("visual.")}
  names = [line.theirs for line in _image_tower(encoder, "") if isinstance(line, Fixed)]
  whole = name_map(encoder)
  fixed = tuple(line for line in whole.fixed if line.theirs in names)
  tower = dataclasses.replace(whole, fixed=fixed)
  return tower.to_ours(image, encoder, ["visual.proj"]), notes


def _read_words(
  root: pathlib.Path, text_cfg: Mapping[str, Any], text: ov_models.TextConfig
) -> tuple[Words | None, list[str]]:
  """The tokenizer beside the weights, or why there is none."""
  if not (root / hf_tokenizer.TOKENIZER_FILE).is_file():
    note = f"no {hf_tokenizer.TOKENIZER_FILE} in the folder: give the tokenizer yourself"
    if (root / "vocab.txt").is_file():
      note += "; ov_data.Tokenizer.from_vocab makes one of its vocab.txt"
    return None, [note]
  content = json.dumps(reading.read_json(root / hf_tokenizer.TOKENIZER_FILE), ensure_ascii=False)
  settings_file = root / hf_tokenizer.CONFIG_FILE
  settings = reading.read_json(settings_file) if settings_file.is_file() else {}
  if open_clip_config.masks_padding(text):
    settings.pop("pad_token", None)  # there [eos] is the padding
  # The published configs do not say that [CLS] ends a row; their pooling needs it.
  append_cls = text_cfg.get("tokenizer_mode") == "clips" or text.pool == "last"
  try:
    return hf_tokenizer.words_from(
      content, settings, length=text.max_len, append_cls=append_cls
    ), []
  except ValueError as error:
    return None, [f"the tokenizer is left out: {error}"]
