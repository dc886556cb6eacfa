"""Conversion of `transformers` vision transformers to one canonical form.

ViT and BEiT are compatible with our tower for certain field values. Their tensor names
differ between classes and versions, and some tensors can be folded into others. `canonical` returns
tensors as written by `transformers_vit.write`.

Dimensions: T tokens, D width, P patch.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from ov_convert import fields as fields_lib
from ov_convert.release import Fit, Interpolation, Preprocess
import ov_models

# Filters by their numbers in PIL.Image.Resampling.
_FILTERS: dict[Any, Interpolation] = {2: "bilinear", 3: "bicubic"}
_COMMON = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 16,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
}
# Defaults of the library for fields that are missing in config.json.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "vit": _COMMON | {"pooler_act": "tanh"},
  "beit": _COMMON
  | {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
  },
}
_SIZES = {
  "hidden_size": fields_lib.MAX_WIDTH,
  "num_hidden_layers": fields_lib.MAX_DEPTH,
  "num_attention_heads": fields_lib.MAX_WIDTH,
  "intermediate_size": 4 * fields_lib.MAX_WIDTH,
}
_OURS = {
  "num_channels": 3,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "use_absolute_position_embeddings": True,
  "use_relative_position_bias": False,
  "use_shared_relative_position_bias": False,
}
# Common incompatible towers: their default fields, and differences that no field states.
_OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
  "deit": (_COMMON, ["a second token after cls (distillation_token)"]),
  "siglip2": (
    {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    ["images of any aspect ratio (NaFlex)"],
  ),
}

_RENAMES = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^(?:vit|beit)\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.layer_scale([12])\.lambda1$", r".lambda_\1"),
  )
)
_POSITIONS = "embeddings.position_embeddings"
_PATCH_BIAS = "embeddings.patch_embeddings.projection.bias"
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def vit_config(content: Mapping[str, Any]) -> ov_models.ViTConfig:
  """Return our config of a tower, with learned positions, from the content of config.json.

  Raises:
    ValueError: if the tower is incompatible; lists all differing fields.
  """
  kind, problems = content.get("model_type"), list[str]()
  fields = dict(content)
  if isinstance(kind, str) and kind in _DEFAULTS:
    fields = _DEFAULTS[kind] | fields
  elif isinstance(kind, str) and kind in _OTHERS:
    defaults, reasons = _OTHERS[kind]
    tower = fields.get("vision_config")
    fields = {**defaults, **(tower if isinstance(tower, Mapping) else fields)}
    problems += reasons
  else:
    problems.append(
      f"model_type={fields_lib.shown(kind)} (supported: {', '.join(_DEFAULTS)}, "
      "and the families of ov_convert.families)"
    )
  problems += [
    f"{name}={fields_lib.shown(fields[name])} (expected {value!r})"
    for name, value in _OURS.items()
    if name in fields and fields[name] != value
  ]
  problems += [
    f"{name}={fields_lib.shown(fields[name])} (expected one integer, for a square)"
    for name in ("image_size", "patch_size")
    if name in fields and not isinstance(_side(fields[name]), int)
  ]
  if isinstance(kind, str) and kind in _DEFAULTS:
    problems += [
      f"{name}={fields_lib.shown(fields[name])} (expected an integer from 1 to {high})"
      for name, high in _SIZES.items()
      if type(fields[name]) is not int or not 1 <= fields[name] <= high
    ]
  if problems:
    raise ValueError(f"this {_kind_name(kind)} is not a supported tower: {'; '.join(problems)}.")
  sides = {name: _side(fields[name]) for name in ("image_size", "patch_size")}
  integer = lambda given, name, high: fields_lib.integer(given, name, None, high, "config.json: ")
  return ov_models.ViTConfig(
    width=fields["hidden_size"],
    depth=fields["num_hidden_layers"],
    mlp_dim=fields["intermediate_size"],
    num_heads=fields["num_attention_heads"],
    patch_size=integer(sides, "patch_size", fields_lib.MAX_SIDE),
    image_size=integer(sides, "image_size", fields_lib.MAX_SIDE),
    position="learned",
    pool="gap" if fields.get("use_mean_pooling") else "tok",
  )


def canonical(
  flat: Mapping[str, np.ndarray], content: Mapping[str, Any], vit: ov_models.ViTConfig
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Convert tensors of a tower to the names and form of `transformers_vit.write`.

  Args:
    flat: tensors by the names of the file.
    content: content of config.json.
    vit: config returned by `vit_config`.

  Returns:
    Tensors without prefix, including "classifier." if present, and notes on what was changed or
    omitted. Unknown tensors are kept; the name map reports them.

  Raises:
    ValueError: if two tensors have the same canonical name.
  """
  tensors: dict[str, np.ndarray] = {}
  for name, tensor in flat.items():
    known = name
    for pattern, replacement in _RENAMES:
      known = pattern.sub(replacement, known)
    if known in tensors:
      raise ValueError(f"the weights contain {known} twice, the second time as {name}; keep one.")
    tensors[known] = tensor
  notes = _fold_layer_scales(tensors, vit) + _fold_patch_bias(tensors, vit)
  notes += _without_biases(tensors, content, vit)
  if tensors.pop("embeddings.mask_token", None) is not None:
    notes.append(
      "embeddings.mask_token is not imported: it is used only in training, for masked patches"
    )
  if vit.pool == "tok":
    notes += _without_pooler(tensors, content, vit)
  return tensors, notes


def _fold_layer_scales(tensors: dict[str, np.ndarray], vit: ov_models.ViTConfig) -> list[str]:
  """Fold layer scales into the preceding projections; return notes."""
  folded = 0
  for layer in range(vit.depth):
    block = f"encoder.layer.{layer}"
    for scale, linear in (("lambda_1", "attention.output.dense"), ("lambda_2", "output.dense")):
      name, weight, bias = f"{block}.{scale}", f"{block}.{linear}.weight", f"{block}.{linear}.bias"
      sizes = {_shape(tensors, tensor)[:1] for tensor in (name, weight, bias)}
      if sizes != {(vit.width,)}:
        continue  # missing, or of a wrong shape, which the name map reports
      factor = tensors.pop(name)
      tensors[weight] = tensors[weight] * factor[:, None]
      tensors[bias] = tensors[bias] * factor
      folded += 1
  note = f"{folded} layer scales are multiplied into the projections before them"
  return [note] if folded else []


def _fold_patch_bias(tensors: dict[str, np.ndarray], vit: ov_models.ViTConfig) -> list[str]:
  """Fold the patch bias into the positions; return notes."""
  positions, bias = tensors.get(_POSITIONS), tensors.get(_PATCH_BIAS)
  expected = (1, 1 + vit.num_patches, vit.width)
  if bias is None or bias.shape != (vit.width,) or _shape(tensors, _POSITIONS) != expected:
    return []
  tensors[_PATCH_BIAS] = np.zeros_like(bias)
  if positions is None or not bias.any():
    return []
  tensors[_POSITIONS] = np.concatenate([positions[:, :1], positions[:, 1:] + bias], axis=1)
  return ["the bias of the patches is added to their positions"]


def _without_biases(
  tensors: dict[str, np.ndarray], content: Mapping[str, Any], vit: ov_models.ViTConfig
) -> list[str]:
  """Add zero attention biases if a class or field disables them; return notes."""
  missing = []
  if content.get("model_type") == "beit":  # BEiT has no key bias
    missing = [] if vit.pool == "gap" else ["key"]
  elif not content.get("qkv_bias", True):
    missing = ["query", "key", "value"]
  for layer in range(vit.depth):
    for name in missing:
      bias = f"encoder.layer.{layer}.attention.attention.{name}.bias"
      tensors.setdefault(bias, np.zeros(vit.width, np.float32))
  return [f"no bias in {', '.join(missing)} of attention: set to zeros"] if missing else []


def _without_pooler(
  tensors: dict[str, np.ndarray], content: Mapping[str, Any], vit: ov_models.ViTConfig
) -> list[str]:
  """Replace the pooler of the cls token by the identity; return notes."""
  identity = (np.eye(vit.width, dtype=np.float32), np.zeros(vit.width, np.float32))
  found = [tensors.pop(name, value) for name, value in zip(_POOLER, identity, strict=True)]
  tensors |= zip(_POOLER, identity, strict=True)
  linear = content.get("model_type") != "vit" or content.get("pooler_act", "tanh") == "linear"
  given = any(a.shape != b.shape or (a != b).any() for a, b in zip(found, identity, strict=True))
  if given:
    return ["pooler.dense is not imported: the pooled vector is the normed cls token"]
  return [] if linear else ["the tanh of the pooler is not imported"]


def preprocess_from(content: Mapping[str, Any], side: int) -> tuple[Preprocess, list[str]]:
  """Return preprocessing from the content of preprocessor_config.json, and notes on differences.

  Args:
    content: content of the file.
    side: image size of the tower.

  Raises:
    ValueError: if sizes, mean or std are invalid.
  """
  size, crop = content.get("size", side), content.get("crop_size", side)
  center = bool(content.get("do_center_crop")) or _edge(size, "shortest_edge") > 0
  # A single number is the shorter side with a center crop, otherwise a square.
  short = size if center and isinstance(size, int) else _edge(size, "shortest_edge")
  notes = []
  if center and short not in (0, side):
    notes.append(f"images are resized to a shorter side of {side}, not {short}, before the crop")
  resample = content.get("resample", 2)
  if not isinstance(resample, int) or resample not in _FILTERS:
    notes.append(f"images are resized bilinearly, not by resample={fields_lib.shown(resample)}")
    resample = 2
  if (wide := _edge(crop if center else size, "height")) not in (0, side):
    notes.append(f"images are resized to {side} x {side} pixels as in config.json, not {wide}")
  where = "preprocessor_config.json: "
  factor = fields_lib.number(content, "rescale_factor", 1 / 255, where)
  if abs(factor * 255 - 1) > 1e-4:
    notes.append(f"pixels are scaled by 1/255, not {factor!r}")
  mean = fields_lib.channel_values(content, "image_mean", (0.5,) * 3, where)
  std = fields_lib.channel_values(content, "image_std", (0.5,) * 3, where)
  if content.get("do_normalize") is False:
    mean, std = (0.0,) * 3, (1.0,) * 3
  fit: Fit = "center" if center else "squash"
  return Preprocess(side, fit, mean, std, _FILTERS[resample]), notes


def _kind_name(kind: Any) -> str:
  return kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 60 else "model"


def _edge(size: Any, name: str) -> int:
  """Return an edge of a size, which may be one number for a square; 0 if it is not given."""
  edge = size.get(name) if isinstance(size, Mapping) else size if name == "height" else None
  if not isinstance(edge, int | None):
    given = fields_lib.shown(size)
    raise ValueError(f"preprocessor_config.json has a size of {given}; expected an integer.")
  return edge or 0


def _side(size: Any) -> Any:
  """Return the side of a square [s, s]; other values unchanged."""
  if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
    return size[0]
  return size


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
  return tensors[name].shape if name in tensors else ()


def preprocessor(preprocess: Preprocess) -> dict[str, Any]:
  """Return the content of preprocessor_config.json, with a class available in all versions."""
  side = preprocess.image_size
  square = {"height": side, "width": side}
  center = preprocess.fit == "center"
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": side} if center else square,
    "resample": next(n for n, name in _FILTERS.items() if name == preprocess.interpolation),
    "do_center_crop": center,
    "crop_size": square,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(preprocess.mean),
    "image_std": list(preprocess.std),
  }
