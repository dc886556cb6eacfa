"""open_clip format: `open_clip.create_model_from_pretrained("local-dir:FOLDER")`.

`write` targets the released library (3.3.0). Two towers become its CLIP class. A single image tower
becomes `visual` with an identity projection and, because the library requires a text tower, a dummy
text tower of one word with zero weights. Caption decoders are omitted. `read` accepts such folders,
the published PyTorch weights, and other compatible ViTs.

`open_clip.get_tokenizer("local-dir:FOLDER")` returns the ids of training, except for text cleaning
that cannot be disabled: ftfy repairs mojibake, straightens typographic quotes and removes control
characters, and HTML entities are unescaped. Texts with these get different ids.

The configuration of the library has no option to mask padding. A text tower that masks padding is
written as a tower with an appended token (`embed_cls`), whose mask hides columns after padding.
[eos] is used as padding there, so that exactly the columns after the text are hidden. Embeddings
are the same; ids have [eos] where training has [PAD]. See `mask_padding`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from ov_convert import (
  fields,
  hf_tokenizer,
  open_clip_config,
  open_clip_text,
  open_clip_timm,
  reading,
  vision,
)
from ov_convert.name_map import (
  CONV,
  LEAD_1,
  SAME,
  Dropped,
  Entry,
  Fixed,
  Flat,
  NameMap,
  Params,
)
from ov_convert.release import Config, Imported, Release, TokenizerSpec, encoder_of
from ov_convert.writing import write_json, write_weights
import ov_models

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_WEIGHTS_FILES = (  # in the order in which the library searches them
  WEIGHTS_FILE,
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
  "open_clip_pytorch_model.pth",
  "model.safetensors",
  "pytorch_model.bin",
)
_NO_DECODER = "open_clip has no caption decoder of this kind"
_NO_HEAD = "a single tower has no projection, so it must be the identity"
_NO_TEXT = "dummy text tower, which the library requires"


def name_map(config: Config) -> NameMap:
  """Return the name map of `config`, before `mask_padding`.

  Raises:
    ValueError: if the library lacks some of the parameters; lists all of them.
  """
  ours = "" if isinstance(config, ov_models.ViTConfig) else "encoder/"
  encoder = encoder_of(config)
  lines: list[Entry | Fixed] = list(_image_tower(encoder, ours))
  if isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None:
    lines += open_clip_text.entries(config.text)
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
  """Raise ValueError listing all properties of a model that the library does not support."""
  found = open_clip_timm.problems(release)
  if found is None:
    found = open_clip_config.problems(release)
  if found:
    raise ValueError("open_clip does not support this model:\n  " + "\n  ".join(found))


def write(folder: pathlib.Path, release: Release) -> None:
  """Write open_clip_config.json, open_clip_model.safetensors, and the tokenizer of a text tower.

  Raises:
    ValueError: see `check`.
  """
  check(release)
  folder.mkdir(parents=True, exist_ok=True)
  text, words = release.text, release.words
  fixed: tuple[Fixed, ...] = ()
  content = open_clip_config.write(release)
  if open_clip_timm.problems(release) is None:
    names = name_map(release.config)
    flat, fixed = names.to_theirs(release.params, release.config), names.fixed
  else:
    flat, vision_cfg = open_clip_timm.write(release)
    content["model_cfg"] |= {"vision_cfg": vision_cfg, "custom_text": True}
  if text is not None and words is not None:
    pad_id = words.pad_id
    if open_clip_config.masks_padding(text):
      flat = mask_padding(flat, int(words.cls_id or 0))
      pad_id = words.eos_id
    shown = dataclasses.replace(words, pad_id=pad_id)
    hf_tokenizer.write_tokenizer(folder, shown, template=not words.append_cls)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, fixed)
  write_json(folder / CONFIG_FILE, content)


def read(folder: str | os.PathLike[str], python: str | os.PathLike[str] | None = None) -> Imported:
  """Read a folder written by `write`, published PyTorch weights, or another compatible ViT.

  Args:
    folder: directory with open_clip_config.json and weights as *.safetensors, *.bin or *.pth.
    python: interpreter with PyTorch for *.bin and *.pth; see `reading.read_tensors`.

  Returns:
    The model with two towers, or an image tower without its projection. Notes list what was changed
    or omitted.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the model is incompatible; lists all differing fields or tensors.
  """
  root = pathlib.Path(folder)
  content = reading.read_json(root / CONFIG_FILE)
  model = fields.section(content, "model_cfg", f"{root / CONFIG_FILE}: ") or content
  if open_clip_timm.applies(model):
    return _read_timm(root, content, model, python)
  if found := open_clip_config.config_mismatches(model):
    raise ValueError(f"{root / CONFIG_FILE} is not a supported model:\n  " + "\n  ".join(found))
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
      raise ValueError(
        f"{root}: text_cfg.embed_cls requires the tokenizer in the folder; {more[0]}"
      )
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


def _read_timm(
  root: pathlib.Path, content: Mapping[str, Any], model: Mapping[str, Any], python: Any
) -> Imported:
  """Return a model whose image tower is one of timm."""
  flat = reading.read_tensors(root, _WEIGHTS_FILES, python)
  config, params, notes = open_clip_timm.read(str(root / CONFIG_FILE), model, flat)
  assert config.text is not None
  preprocess, more = open_clip_config.read_preprocess(content, config.encoder.image_size)
  words, about_words = _read_words(root, model["text_cfg"], config.text)
  return Imported(config, params, preprocess, words, (*notes, *more, *about_words))


def _log_scale(model: Mapping[str, Any]) -> float:
  given = model.get("init_logit_scale")
  return ov_models.VisionLanguageConfig.log_scale_init if given is None else float(given)


def mask_padding(flat: Flat, cls_id: int) -> Flat:
  """Convert tensors of a CLIP to those of a CustomTextCLIP whose text tower masks padding.

  The CustomTextCLIP tower appends one token to the T tokens of a text, and masks each column whose
  left neighbour is padding. With [eos] as padding these are the padding and the column of [CLS]. So
  the appended token gets the embedding and the position of [CLS]; column T - 1, which is masked,
  gets position 0.

  Args:
    flat: tensors by the names of `name_map`.
    cls_id: id of [CLS].
  """
  renamed = {}
  for name, tensor in flat.items():
    unchanged = name.startswith(("visual.", "logit_"))
    renamed[name if unchanged else f"text.{name}"] = tensor
  table = flat["positional_embedding"]
  unseen = np.zeros_like(table[:1])
  renamed["text.positional_embedding"] = np.concatenate([table[:-1], unseen, table[-1:]])
  renamed["text.cls_emb"] = flat["token_embedding.weight"][cls_id]
  return renamed


def unmask_padding(flat: Mapping[str, np.ndarray], cls_id: int) -> Flat:
  """Invert `mask_padding`; raise ValueError if the appended token is not [CLS]."""
  plain = {name.removeprefix("text."): tensor for name, tensor in flat.items()}
  appended = plain.pop("cls_emb", None)
  words, table = plain.get("token_embedding.weight"), plain.get("positional_embedding")
  if words is not None and not cls_id < len(words):
    raise ValueError(f"[CLS] has id {cls_id}, but the embedding table has {len(words)} tokens.")
  if appended is not None and words is not None and not np.array_equal(words[cls_id], appended):
    raise ValueError(
      f"text.cls_emb differs from the embedding of [CLS], id {cls_id}; expected equal values, as "
      "in OpenVision exports."
    )
  if table is not None and len(table) > 1:
    plain["positional_embedding"] = np.concatenate([table[:-2], table[-1:]])
  return plain


def _image_tower(config: ov_models.ViTConfig, ours: str) -> Iterator[Entry | Fixed]:
  yield Entry("visual.class_embedding", (f"{ours}cls",))
  yield vision.position("visual.positional_embedding", config, ours, SAME)
  yield Entry("visual.conv1.weight", (f"{ours}patch_embed/kernel",), CONV)
  if config.pre_norm:
    yield Entry("visual.ln_pre.weight", (f"{ours}pre_norm/scale",))
    yield Entry("visual.ln_pre.bias", (f"{ours}pre_norm/bias",))
  yield Entry("visual.ln_post.weight", (f"{ours}norm/scale",))
  yield Entry("visual.ln_post.bias", (f"{ours}norm/bias",))
  yield from open_clip_text.blocks("visual.", ours, config)


def _no_text_tower(embed_dim: int) -> Iterator[Fixed]:
  """Yield the tensors of the dummy text tower `open_clip_config.NO_TEXT`, all zero."""
  shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
  shapes |= {"token_embedding.weight": (1, 1), "positional_embedding": (1, 1)}
  shapes |= {"ln_final.weight": (1,), "ln_final.bias": (1,), "text_projection": (1, embed_dim)}
  for name, ours, _ in open_clip_text.BLOCK:
    rows = len(ours)
    matrix = any(path.endswith("kernel") for path in ours)
    shapes[f"transformer.resblocks.0.{name}"] = (rows, 1) if matrix else (rows,)
  for name, shape in shapes.items():
    yield Fixed(name, np.zeros(shape, np.float32), _NO_TEXT)


def _read_image_tower(
  flat: Mapping[str, np.ndarray], encoder: ov_models.ViTConfig
) -> tuple[Params, list[str]]:
  """Return an image tower without its projection."""
  notes = []
  head = flat.get("visual.proj")
  if head is not None and not np.array_equal(head, np.eye(*head.shape[:2], dtype=np.float32)):
    notes.append(
      f"visual.proj {head.shape} is not imported: the tower returns the pooled vector before it"
    )
  image = {name: tensor for name, tensor in flat.items() if name.startswith("visual.")}
  names = [line.theirs for line in _image_tower(encoder, "") if isinstance(line, Fixed)]
  names_map = name_map(encoder)
  fixed = tuple(line for line in names_map.fixed if line.theirs in names)
  tower = dataclasses.replace(names_map, fixed=fixed)
  return tower.to_ours(image, encoder, ["visual.proj"]), notes


def _read_words(
  root: pathlib.Path, text_cfg: Mapping[str, Any], text: ov_models.TextConfig
) -> tuple[TokenizerSpec | None, list[str]]:
  """Return the tokenizer in the folder, or a note on why there is none."""
  if not (root / hf_tokenizer.TOKENIZER_FILE).is_file() and (root / "vocab.txt").is_file():
    return None, [
      f"no {hf_tokenizer.TOKENIZER_FILE} in the folder; provide the tokenizer separately; "
      "ov_data.Tokenizer.from_vocab creates one from its vocab.txt"
    ]
  # Published configs do not state that rows end with [CLS], but their pooling requires it.
  append_cls = text_cfg.get("tokenizer_mode") == "clips" or text.pool == "last"
  return hf_tokenizer.read_folder(
    root,
    text,
    append_cls=append_cls,
    open_clip=fields.section(text_cfg, "tokenizer_kwargs", "text_cfg."),
    unpadded=open_clip_config.masks_padding(text),  # its padding is [eos], see `mask_padding`
  )
