"""open_clip_config.json: what our configs are there, and which of theirs are ours.

Fields and their defaults are those of open_clip 3.3.0, CLIPVisionCfg and CLIPTextCfg.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ov_convert import fields as checked
from ov_convert import vision
from ov_convert.release import Fit, Preprocess, Release
import ov_models

_EPS = 1e-6
_PLAIN: dict[str, Any] = {  # what both towers must have, with its default
  "ls_init_value": None,
  "qk_norm": False,
  "scaled_cosine_attn": False,
  "scale_heads": False,
  "scale_attn_inner": False,
  "scale_attn": False,
  "scale_fc": False,
}
# Fields that say nothing about the function, or are looked at by themselves.
_VISION_READ = {
  "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
  "pos_embed_type", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "block_type",
  "no_ln_pre", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs",
  "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
  "timm_drop_path",
}  # fmt: skip
_TEXT_READ = {
  "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
  "width", "heads", "layers", "mlp_ratio", "embed_cls", "pad_id", "eos_id", "no_causal_mask",
  "final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "block_type",
  "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
_TOP_READ = {
  "embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias",
  "nonscalar_logit_scale", "output_dict",
}  # fmt: skip
# One word, width 1: stands in for the text tower of an image tower on its own.
NO_TEXT: dict[str, Any] = {
  "context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1, "mlp_ratio": 1.0,
}  # fmt: skip


def masks_padding(text: ov_models.TextConfig) -> bool:
  """Whether a text tower is written with an appended token; see open_clip.mask_padding."""
  return text.padding == "mask"


def problems(release: Release) -> list[str]:
  """Fields that the library cannot express, each with what to do."""
  found = []
  if release.encoder.pool == "map":
    found.append(
      "encoder.pool='map': the attention pooling of open_clip is another; train with pool='gap' or "
      "'tok', or write timm, which has ours"
    )
  if (text := release.text) is None:
    return found
  if text.pool not in ("last", "first", "argmax"):
    found.append(f"text.pool={text.pool!r}: open_clip pools one token; use 'last', with [CLS]")
  if (words := release.words) is None:
    found.append("words=None: a text tower needs its tokenizer")
    return found
  if words.length != text.max_len:
    found.append(f"words.length={words.length}, text.max_len={text.max_len}: must be the same")
  if words.append_cls and words.cls_id is None:
    found.append("words.cls_id=None: append_cls=True needs the id of [CLS]")
  if masks_padding(text) and not (text.pool == "last" and words.append_cls):
    found.append(
      f"text.padding='mask' with text.pool={text.pool!r}, append_cls={words.append_cls}: open_clip "
      "masks padding only for pool='last' with [CLS]; else train with padding='attend' "
      "(model.preset=openvision_released)"
    )
  return found


def write(release: Release) -> dict[str, Any]:
  """The content of open_clip_config.json; `problems` are none."""
  encoder, config = release.encoder, release.config
  eps = {"norm_kwargs": {"eps": _EPS}}
  model: dict[str, Any] = {"embed_dim": encoder.width}
  model["vision_cfg"] = {
    "image_size": encoder.image_size,
    "layers": encoder.depth,
    "width": encoder.width,
    "head_width": encoder.head_dim,
    "mlp_ratio": vision.mlp_ratio(encoder.width, encoder.mlp_dim),
    "patch_size": encoder.patch_size,
    "no_ln_pre": True,
    "pool_type": {"gap": "avg", "tok": "tok"}[encoder.pool],
    "final_ln_after_pool": True,
    **eps,
  }
  model["text_cfg"] = dict(NO_TEXT)
  text, words = release.text, release.words
  if isinstance(config, ov_models.VisionLanguageConfig) and text is not None and words is not None:
    model["embed_dim"] = config.embed_dim
    model["init_logit_scale"] = config.log_scale_init
    if config.bias_init is not None:
      model["init_logit_bias"] = config.bias_init
    model["text_cfg"] = {
      "context_length": text.max_len,
      "vocab_size": text.vocab_size,
      "hf_tokenizer_name": "files beside this one",  # any name makes the library look there
      "width": text.width,
      "heads": text.num_heads,
      "layers": text.depth,
      "mlp_ratio": vision.mlp_ratio(text.width, text.mlp_dim),
      "pool_type": text.pool,
      "no_causal_mask": text.mask == "full",
      "act_kwargs": {"approximate": "tanh"},
      "pad_id": text.pad_id,
      **eps,
    }
    if words.append_cls:
      model["text_cfg"]["tokenizer_mode"] = "clips"
    if masks_padding(text):
      model["custom_text"] = True
      model["text_cfg"] |= {"embed_cls": True, "pad_id": words.eos_id}
  preprocess = {
    "mean": list(release.preprocess.mean),
    "std": list(release.preprocess.std),
    "interpolation": "bilinear",
    "resize_mode": {"squash": "squash", "center": "shortest"}[release.preprocess.fit],
  }
  return {"model_cfg": model, "preprocess_cfg": preprocess}


def read_vision(
  model: Mapping[str, Any], position: Literal["sincos2d", "learned"]
) -> ov_models.ViTConfig:
  """The image tower; `misfits` are none."""
  fields = model["vision_cfg"]
  width = fields.get("width", 768)
  image_size, patch_size = image_and_patch(model)
  return ov_models.ViTConfig(
    width=width,
    depth=fields.get("layers", 12),
    mlp_dim=int(width * fields.get("mlp_ratio", 4.0)),
    num_heads=width // fields.get("head_width", 64),
    patch_size=patch_size,
    image_size=image_size,
    position=position,
    pool="gap" if fields.get("pool_type", "tok") == "avg" else "tok",
  )


def image_and_patch(model: Mapping[str, Any]) -> tuple[int, int]:
  """Pixels a side of the picture and of a patch."""
  fields = model["vision_cfg"]
  return _side(fields.get("image_size", 224)), _side(fields.get("patch_size", 16))


def has_text(model: Mapping[str, Any]) -> bool:
  """Whether there is a text tower, and not only what stands in for one."""
  fields = model.get("text_cfg") or NO_TEXT
  return any(fields.get(name) != value for name, value in NO_TEXT.items())


def read_text(model: Mapping[str, Any]) -> ov_models.TextConfig:
  """The text tower; `misfits` are none, and it `has_text`."""
  fields = model["text_cfg"]
  width, masked = fields.get("width", 512), fields.get("embed_cls", False)
  return ov_models.TextConfig(
    vocab_size=fields.get("vocab_size", 49408),
    max_len=fields.get("context_length", 77),
    width=width,
    depth=fields.get("layers", 12),
    mlp_dim=int(width * fields.get("mlp_ratio", 4.0)),
    num_heads=fields.get("heads", 8),
    pool=fields.get("pool_type", "argmax"),
    mask="full" if fields.get("no_causal_mask", False) else "causal",
    padding="mask" if masked else "attend",
    pad_id=0 if masked else fields.get("pad_id", 0),
  )


def misfits(model: Mapping[str, Any]) -> list[str]:
  """Fields of a model_cfg, with their values, that none of our models has."""
  fields = model.get("vision_cfg")
  if not isinstance(fields, Mapping) or not isinstance(model.get("embed_dim"), int):
    return ["embed_dim, a number, and vision_cfg, an object, are not there"]
  found = _not_numbers(model, ("embed_dim",), "")
  for name in ("init_logit_scale", "init_logit_bias"):
    if model.get(name) is not None and not checked.is_number(model[name]):
      found.append(f"{name}={checked.shown(model[name])} (must be a number)")
  if not isinstance(model.get("text_cfg") or {}, Mapping):
    return [*found, f"text_cfg={checked.shown(model['text_cfg'])} (must be an object)"]
  found += vision.unlike(model, {"quick_gelu": False}, _TOP_READ, "")
  wanted = _PLAIN | {"attentional_pool": False, "timm_model_name": None, "in_channels": 3}
  found += vision.unlike(fields, wanted, _VISION_READ, "vision_cfg.")
  found += _wrong(fields, "no_ln_pre", False, (True,), "vision_cfg.")
  found += _wrong(fields, "pool_type", "tok", ("avg", "tok"), "vision_cfg.")
  if fields.get("pool_type", "tok") == "avg":
    found += _wrong(fields, "final_ln_after_pool", False, (True,), "vision_cfg.")
  found += _wrong(fields, "act_kwargs", None, (None, {}, {"approximate": "none"}), "vision_cfg.")
  found += _wrong_norm_and_block(fields, "vision_cfg.")
  found += _not_numbers(fields, ("layers", "width", "head_width", "mlp_ratio"), "vision_cfg.")
  for name in ("patch_size", "image_size"):
    value = fields.get(name, 1)
    square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    found += _not_numbers({name: value[0] if square else value}, (name,), "vision_cfg.")
  if not has_text(model):
    return found
  fields = model["text_cfg"]
  wanted = _PLAIN | {"hf_model_name": None, "proj_bias": False, "proj_type": "linear"}
  found += vision.unlike(fields, wanted, _TEXT_READ, "text_cfg.")
  sizes = ("layers", "width", "heads", "mlp_ratio", "vocab_size", "context_length")
  found += _not_numbers(fields, sizes, "text_cfg.")
  pad_id = fields.get("pad_id", 0)
  if type(pad_id) is not int or not 0 <= pad_id < checked.MAX_VOCABULARY:
    found.append(f"text_cfg.pad_id={checked.shown(pad_id)} (must be a token)")
  found += _wrong(fields, "pool_type", "argmax", ("last", "first", "argmax"), "text_cfg.")
  found += _wrong(fields, "act_kwargs", None, ({"approximate": "tanh"},), "text_cfg.")
  found += _wrong_norm_and_block(fields, "text_cfg.")
  if fields.get("embed_cls") and not (
    fields.get("tokenizer_mode") == "clips" and fields.get("pool_type") == "last"
  ):
    found.append("text_cfg.embed_cls=True (only as we write it, with tokenizer_mode='clips')")
  return found


def read_preprocess(content: Mapping[str, Any], size: int) -> tuple[Preprocess, list[str]]:
  """Preprocessing, and what of it is not ours; defaults are those of the library."""
  fields = checked.section(content, "preprocess_cfg", "open_clip_config.json: ")
  notes = []
  mode = fields.get("resize_mode", "shortest")
  if mode == "longest":
    notes.append("preprocessing: resize_mode='longest' pads; pictures are cropped here instead")
  if (kind := fields.get("interpolation", "bicubic")) != "bilinear":
    notes.append(
      f"preprocessing: interpolation={checked.shown(kind)}; pictures are resized bilinearly here"
    )
  defaults = {
    "mean": (0.48145466, 0.4578275, 0.40821073),  # of the library, as in CLIP
    "std": (0.26862954, 0.26130258, 0.27577711),
  }
  values = {}
  for name, default in defaults.items():
    given = fields.get(name) or default
    given = given if isinstance(given, list | tuple) else (given,) * 3  # one for all channels
    values[name] = checked.three({name: given}, name, default, "preprocess_cfg.")
  fit: Fit = "squash" if mode == "squash" else "center"
  return Preprocess(size, fit, values["mean"], values["std"]), notes


def _wrong(
  fields: Mapping[str, Any], name: str, default: Any, allowed: tuple[Any, ...], prefix: str
) -> list[str]:
  value = fields.get(name, default)
  if value in allowed:
    return []
  return [f"{prefix}{name}={checked.shown(value)} (must be {' or '.join(map(repr, allowed))})"]


def _wrong_norm_and_block(fields: Mapping[str, Any], prefix: str) -> list[str]:
  norm = fields.get("norm_kwargs") or {}
  if not isinstance(norm, Mapping):
    return [f"{prefix}norm_kwargs={checked.shown(norm)} (must be an object)"]
  # Without the field open_clip takes 1e-5, which moves text features by 1e-3.
  found = _wrong(norm, "eps", 1e-5, (_EPS,), f"{prefix}norm_kwargs.")
  found += vision.unlike(norm, {}, {"eps"}, f"{prefix}norm_kwargs.")
  return found + _wrong(fields, "block_type", None, (None, "default"), prefix)


_LIMITS = {
  "layers": checked.MAX_DEPTH, "width": checked.MAX_WIDTH, "head_width": checked.MAX_WIDTH,
  "heads": checked.MAX_WIDTH, "embed_dim": checked.MAX_WIDTH, "patch_size": checked.MAX_SIDE,
  "image_size": checked.MAX_SIDE, "vocab_size": checked.MAX_VOCABULARY,
  "context_length": checked.MAX_TOKENS,
}  # fmt: skip


def _not_numbers(fields: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> list[str]:
  """Sizes that are none, or too large."""

  def is_size(name: str, value: Any) -> bool:
    if name == "mlp_ratio":
      return checked.is_number(value) and value > 0
    return type(value) is int and 0 < value <= _LIMITS[name]

  return [
    f"{prefix}{name}={checked.shown(fields[name])} (must be a positive number"
    + (f" up to {_LIMITS[name]})" if name in _LIMITS else ")")
    for name in names
    if name in fields and not is_size(name, fields[name])
  ]


def _side(value: int | list[int]) -> int:
  return value if isinstance(value, int) else value[0]
