"""Conversion between our configs and open_clip_config.json.

Fields and defaults are those of CLIPVisionCfg and CLIPTextCfg in open_clip 3.3.0.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ov_convert import fields as checked
from ov_convert import vision
from ov_convert.release import Fit, Interpolation, Preprocess, Release, option_problems
import ov_models

# Options of both towers that the library has too.
_OPTIONS = ("activation", "norm_eps", "layer_scale")
_SUPPORTED = frozenset(
  {f"{tower}.{name}" for tower in ("encoder", "text") for name in _OPTIONS}
  | {"encoder.pre_norm", "encoder.pool", "encoder.position"}
)
_POOLS = {"gap": "avg", "mean": "avg", "tok": "tok"}
_ACTIVATIONS: tuple[Any, ...] = (None, {}, {"approximate": "none"}, {"approximate": "tanh"})
_DEFAULT_EPS = 1e-5
# Vocabulary of the tokenizer of the library, which it uses if the folder has none.
_OWN_VOCABULARY = 49408
_PLAIN: dict[str, Any] = {  # fields that must have these (default) values in both towers
  "qk_norm": False,
  "scaled_cosine_attn": False,
  "scale_heads": False,
  "scale_attn_inner": False,
  "scale_attn": False,
  "scale_fc": False,
}
# Fields that do not affect the computation, or are checked individually.
_VISION_READ = {
  "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
  "pos_embed_type", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "block_type",
  "no_ln_pre", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs", "ls_init_value",
  "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
  "timm_drop_path",
}  # fmt: skip
_TEXT_READ = {
  "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
  "width", "heads", "layers", "mlp_ratio", "embed_cls", "pad_id", "eos_id", "no_causal_mask",
  "final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "block_type",
  "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "ls_init_value",
}  # fmt: skip
_TOP_READ = {
  "embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias",
  "nonscalar_logit_scale", "output_dict", "quick_gelu",
}  # fmt: skip
# Dummy text tower (one word, width 1) of an image tower without text tower.
NO_TEXT: dict[str, Any] = {
  "context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1, "mlp_ratio": 1.0,
}  # fmt: skip


def masks_padding(text: ov_models.TextConfig) -> bool:
  """Return whether a text tower is written with an appended token; see `open_clip.mask_padding`."""
  return text.padding == "mask"


def problems(release: Release) -> list[str]:
  """Return all properties that the library does not support, each with a remedy."""
  encoder, text = release.encoder, release.text
  found = option_problems(release.config, _SUPPORTED)
  if encoder.pool not in _POOLS:
    found.append(
      f"encoder.pool={encoder.pool!r}: open_clip has a different attention pooling; train with "
      "pool='gap' or 'tok', or export as timm, which supports 'map'"
    )
  if encoder.position == "none":
    found.append("encoder.position='none': open_clip requires positions")
  if text is None:
    return found
  if (encoder.activation == "quick_gelu") != (text.activation == "quick_gelu"):
    found.append(
      f"encoder.activation={encoder.activation!r}, text.activation={text.activation!r}: quick_gelu "
      "applies to both towers"
    )
  if text.pool not in ("last", "first", "argmax"):
    found.append(f"text.pool={text.pool!r}: open_clip pools one token; use 'last', with [CLS]")
  if (words := release.words) is None:
    if text.vocab_size != _OWN_VOCABULARY:
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
  """Return the content of open_clip_config.json for a release without `problems`."""
  encoder, config = release.encoder, release.config
  model: dict[str, Any] = {"embed_dim": encoder.width}
  model["vision_cfg"] = {
    "image_size": encoder.image_size,
    "layers": encoder.depth,
    "width": encoder.width,
    "head_width": encoder.head_dim,
    "mlp_ratio": vision.mlp_ratio(encoder.width, encoder.mlp_dim),
    "patch_size": encoder.patch_size,
    "no_ln_pre": not encoder.pre_norm,
    "pool_type": _POOLS.get(encoder.pool, "tok"),
    "final_ln_after_pool": encoder.pool != "mean",
    **_write_options(encoder),
  }
  if encoder.activation == "quick_gelu":
    model["quick_gelu"] = True
  model["text_cfg"] = dict(NO_TEXT)
  text, words = release.text, release.words
  if isinstance(config, ov_models.VisionLanguageConfig) and text is not None:
    model["embed_dim"] = config.embed_dim
    model["init_logit_scale"] = config.log_scale_init
    if config.bias_init is not None:
      model["init_logit_bias"] = config.bias_init
    model["text_cfg"] = {
      "context_length": text.max_len,
      "vocab_size": text.vocab_size,
      "width": text.width,
      "heads": text.num_heads,
      "layers": text.depth,
      "mlp_ratio": vision.mlp_ratio(text.width, text.mlp_dim),
      "pool_type": text.pool,
      "no_causal_mask": text.mask == "full",
      "pad_id": text.pad_id,
      **({"proj_bias": True} if config.text_head_bias else {}),
      **_write_options(text),
    }
    if words is not None:  # any name makes the library look for files in the folder
      model["text_cfg"]["hf_tokenizer_name"] = "the files in this folder"
    if words is not None and words.append_cls:
      model["text_cfg"]["tokenizer_mode"] = "clips"
    if words is not None and masks_padding(text):
      model["custom_text"] = True
      model["text_cfg"] |= {"embed_cls": True, "pad_id": words.eos_id}
  preprocess = {
    "mean": list(release.preprocess.mean),
    "std": list(release.preprocess.std),
    "interpolation": release.preprocess.interpolation,
    "resize_mode": {"squash": "squash", "center": "shortest"}[release.preprocess.fit],
  }
  return {"model_cfg": model, "preprocess_cfg": preprocess}


def read_vision(
  model: Mapping[str, Any], position: Literal["sincos2d", "learned"]
) -> ov_models.ViTConfig:
  """Return the config of the image tower for a model without `config_mismatches`."""
  fields = model["vision_cfg"]
  width = fields.get("width", 768)
  image_size, patch_size = image_and_patch(model)
  pre_norm = not fields.get("no_ln_pre", False)
  pool: Literal["gap", "mean", "tok"] = "tok"
  if fields.get("pool_type", "tok") == "avg":
    pool = "gap" if fields.get("final_ln_after_pool", False) else "mean"
  return ov_models.ViTConfig(
    width=width,
    depth=fields.get("layers", 12),
    mlp_dim=int(width * fields.get("mlp_ratio", 4.0)),
    num_heads=width // fields.get("head_width", 64),
    patch_size=patch_size,
    image_size=image_size,
    position=position,
    position_resize="bicubic" if pre_norm else "bilinear",  # CLIP, or a ViT such as ours
    pool=pool,
    pre_norm=pre_norm,
    **_read_options(model, fields),
  )


def image_and_patch(model: Mapping[str, Any]) -> tuple[int, int]:
  """Return the sides of the image and of a patch in pixels."""
  fields = model["vision_cfg"]
  return _side(fields.get("image_size", 224)), _side(fields.get("patch_size", 16))


def has_text(model: Mapping[str, Any]) -> bool:
  """Return whether there is a text tower other than the dummy."""
  fields = model.get("text_cfg")
  fields = NO_TEXT if fields is None else fields  # {} is the text tower of the defaults
  return any(fields.get(name) != value for name, value in NO_TEXT.items())


def read_text(model: Mapping[str, Any]) -> ov_models.TextConfig:
  """Return the config of the text tower for a model that `has_text`, without mismatches."""
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
    **_read_options(model, fields),
  )


def _read_options(model: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  """Return the options of a tower without `config_mismatches`."""
  tanh = (fields.get("act_kwargs") or {}).get("approximate") == "tanh"
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
  eps = (fields.get("norm_kwargs") or {}).get("eps", _DEFAULT_EPS)
  scale = fields.get("ls_init_value")
  return {"activation": activation, "norm_eps": eps, "layer_scale": scale}


def _write_options(tower: ov_models.ViTConfig | ov_models.TextConfig) -> dict[str, Any]:
  """Return the fields of the options of a tower, without quick_gelu."""
  fields: dict[str, Any] = {"norm_kwargs": {"eps": tower.norm_eps}}
  if tower.activation == "gelu_tanh":
    fields["act_kwargs"] = {"approximate": "tanh"}
  if tower.layer_scale is not None:
    fields["ls_init_value"] = tower.layer_scale
  return fields


def config_mismatches(model: Mapping[str, Any]) -> list[str]:
  """Return the fields of a model_cfg, with their values, that our models do not have."""
  fields = model.get("vision_cfg")
  if not isinstance(fields, Mapping) or not isinstance(model.get("embed_dim"), int):
    return ["embed_dim (a number) and vision_cfg (an object) are missing"]
  found = _not_numbers(model, ("embed_dim",), "")
  for name in ("init_logit_scale", "init_logit_bias"):
    if model.get(name) is not None and not checked.is_number(model[name]):
      found.append(f"{name}={checked.shown(model[name])} (must be a number)")
  if not isinstance(model.get("text_cfg"), Mapping | None):
    return [*found, f"text_cfg={checked.shown(model['text_cfg'])} (must be an object)"]
  found += vision.field_mismatches(model, {}, _TOP_READ, "")
  wanted = _PLAIN | {"attentional_pool": False, "timm_model_name": None, "in_channels": 3}
  found += vision.field_mismatches(fields, wanted, _VISION_READ, "vision_cfg.")
  found += _wrong(fields, "pool_type", "tok", ("avg", "tok"), "vision_cfg.")
  found += _wrong_options(model, fields, "vision_cfg.")
  found += _not_numbers(fields, ("layers", "width", "head_width", "mlp_ratio"), "vision_cfg.")
  for name in ("patch_size", "image_size"):
    value = fields.get(name, 1)
    square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    found += _not_numbers({name: value[0] if square else value}, (name,), "vision_cfg.")
  return found + (text_mismatches(model) if has_text(model) else [])


def text_mismatches(model: Mapping[str, Any]) -> list[str]:
  """Return the fields of the text tower of a model_cfg that our models do not have."""
  fields = model.get("text_cfg")
  if not isinstance(fields, Mapping):
    return [f"text_cfg={checked.shown(fields)} (must be an object)"]
  found: list[str] = []
  timm = (model.get("vision_cfg") or {}).get("timm_model_name") is not None
  wanted = _PLAIN | {"hf_model_name": None, "proj_type": "linear"}
  wanted |= {} if timm else {"proj_bias": False}
  found += vision.field_mismatches(
    fields, wanted, _TEXT_READ | ({"proj_bias"} if timm else set()), "text_cfg."
  )
  sizes = ("layers", "width", "heads", "mlp_ratio", "vocab_size", "context_length")
  found += _not_numbers(fields, sizes, "text_cfg.")
  pad_id = fields.get("pad_id", 0)
  if type(pad_id) is not int or not 0 <= pad_id < checked.MAX_VOCABULARY:
    found.append(f"text_cfg.pad_id={checked.shown(pad_id)} (must be a token)")
  found += _wrong(fields, "pool_type", "argmax", ("last", "first", "argmax"), "text_cfg.")
  found += _wrong_options(model, fields, "text_cfg.")
  if fields.get("embed_cls") and not (
    fields.get("tokenizer_mode") == "clips" and fields.get("pool_type") == "last"
  ):
    found.append("text_cfg.embed_cls=True (supported only with tokenizer_mode='clips')")
  return found


def filter_of(name: Any) -> Interpolation:
  """Return the filter of a name in timm and open_clip; "bilinear" for unknown ones."""
  return "bicubic" if name == "bicubic" else "bilinear"


def read_preprocess(content: Mapping[str, Any], size: int) -> tuple[Preprocess, list[str]]:
  """Return preprocessing and notes on differences; defaults are those of the library."""
  fields = checked.section(content, "preprocess_cfg", "open_clip_config.json: ")
  notes = []
  mode = fields.get("resize_mode", "shortest")
  if mode == "longest":
    notes.append("preprocessing: resize_mode='longest' pads; OpenVision crops images")
  kind = fields.get("interpolation", "bicubic")
  if kind not in ("bilinear", "bicubic"):
    notes.append(
      f"preprocessing: interpolation={checked.shown(kind)}; OpenVision resizes images bilinearly"
    )
  defaults = {
    "mean": (0.48145466, 0.4578275, 0.40821073),  # of the library, as in CLIP
    "std": (0.26862954, 0.26130258, 0.27577711),
  }
  values = {}
  for name, default in defaults.items():
    given = fields.get(name) or default
    given = given if isinstance(given, list | tuple) else (given,) * 3  # same for all channels
    values[name] = checked.channel_values({name: given}, name, default, "preprocess_cfg.")
  fit: Fit = "squash" if mode == "squash" else "center"
  return Preprocess(size, fit, values["mean"], values["std"], filter_of(kind)), notes


def _wrong(
  fields: Mapping[str, Any], name: str, default: Any, allowed: tuple[Any, ...], prefix: str
) -> list[str]:
  value = fields.get(name, default)
  if value in allowed:
    return []
  return [f"{prefix}{name}={checked.shown(value)} (must be {' or '.join(map(repr, allowed))})"]


def _wrong_options(model: Mapping[str, Any], fields: Mapping[str, Any], prefix: str) -> list[str]:
  found = _wrong(fields, "act_kwargs", None, _ACTIVATIONS, prefix)
  if model.get("quick_gelu") and fields.get("act_kwargs"):
    found.append(f"{prefix}act_kwargs={checked.shown(fields['act_kwargs'])} (none with quick_gelu)")
  scale = fields.get("ls_init_value")
  if scale is not None and not checked.is_number(scale):
    found.append(f"{prefix}ls_init_value={checked.shown(scale)} (must be a number)")
  norm = fields.get("norm_kwargs") or {}
  if not isinstance(norm, Mapping):
    return [f"{prefix}norm_kwargs={checked.shown(norm)} (must be an object)"]
  eps = norm.get("eps", _DEFAULT_EPS)
  if not checked.is_number(eps) or not 0 < eps < 1:
    found.append(f"{prefix}norm_kwargs.eps={checked.shown(eps)} (must be a number from 0 to 1)")
  found += vision.field_mismatches(norm, {}, {"eps"}, f"{prefix}norm_kwargs.")
  return found + _wrong(fields, "block_type", None, (None, "default"), prefix)


_LIMITS = {
  "layers": checked.MAX_DEPTH, "width": checked.MAX_WIDTH, "head_width": checked.MAX_WIDTH,
  "heads": checked.MAX_WIDTH, "embed_dim": checked.MAX_WIDTH, "patch_size": checked.MAX_SIDE,
  "image_size": checked.MAX_SIDE, "vocab_size": checked.MAX_VOCABULARY,
  "context_length": checked.MAX_TOKENS,
}  # fmt: skip


def _not_numbers(fields: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> list[str]:
  """Return messages for sizes that are not positive numbers or too large."""

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
