"""What classes and versions of `transformers` make of a vision transformer, brought to one form.

ViT, BEiT and DINOv2 compute our tower where a few fields say so. They call the same tensors
differently, from version to version too, and store some that can be multiplied or added into
others. `canonical` gives tensors as `transformers_vit.write` would have written them.

Dimensions: T tokens, D width, P patch.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from ov_convert import fields as fields_lib
from ov_convert.release import Preprocess
import ov_models

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
# What the library takes for a field that config.json does not have.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "vit": _COMMON | {"pooler_act": "tanh"},
  "beit": _COMMON
  | {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
  },
  "dinov2": _COMMON
  | {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False},
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
  "use_swiglu_ffn": False,
}
# Towers that are often asked for: their fields, and what no field says.
_CLIP = (
  {"num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
  ["a norm before the first block (pre_layrnorm)"],
)
_SIGLIP = (
  {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
  ["no cls token", "pooling by attention with a patch for each of its keys (head)"],
)
_OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
  "clip": _CLIP,
  "clip_vision_model": _CLIP,
  "siglip": _SIGLIP,
  "siglip_vision_model": _SIGLIP,
  "deit": (_COMMON, ["a second token beside cls (distillation_token)"]),
  "dinov2_with_registers": (_DEFAULTS["dinov2"], ["tokens beside cls (register_tokens)"]),
}

_RENAMES = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^(?:vit|beit|dinov2)\.", ""),
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
  """Our config of a tower, with learned positions, from the content of its config.json.

  Raises:
    ValueError: it is no tower of ours; all fields that differ are listed.
  """
  kind, problems = content.get("model_type"), list[str]()
  fields = dict(content)
  if isinstance(kind, str) and kind in _DEFAULTS:
    fields = _DEFAULTS[kind] | fields
  elif isinstance(kind, str) and kind in _OTHERS:
    defaults, reasons = _OTHERS[kind]
    tower = fields.get("vision_config")
    fields = defaults | (tower if isinstance(tower, Mapping) else fields)  # type: ignore[operator]
    problems += reasons
  else:
    problems.append(f"model_type={fields_lib.shown(kind)} (read are {', '.join(_DEFAULTS)})")
  problems += [
    f"{name}={fields_lib.shown(fields[name])} (ours {value!r})"
    for name, value in _OURS.items()
    if name in fields and fields[name] != value
  ]
  problems += [
    f"{name}={fields_lib.shown(fields[name])} (ours is one number, for a square)"
    for name in ("image_size", "patch_size")
    if name in fields and not isinstance(_side(fields[name]), int)
  ]
  if isinstance(kind, str) and kind in _DEFAULTS:
    problems += [
      f"{name}={fields_lib.shown(fields[name])} (expected a whole number from 1 to {high})"
      for name, high in _SIZES.items()
      if type(fields[name]) is not int or not 1 <= fields[name] <= high
    ]
  if problems:
    raise ValueError(f"this {_told(kind)} is no tower of ours: {'; '.join(problems)}.")
  sides = {name: _side(fields[name]) for name in ("image_size", "patch_size")}
  whole = lambda given, name, high: fields_lib.whole(given, name, None, high, "config.json: ")
  mlp_dim = fields["intermediate_size"]
  if kind == "dinov2":
    ratio = fields_lib.number(fields, "mlp_ratio", 4, "config.json: ")
    mlp_dim = int(fields["hidden_size"] * ratio)
  return ov_models.ViTConfig(
    width=fields["hidden_size"],
    depth=fields["num_hidden_layers"],
    mlp_dim=mlp_dim,
    num_heads=fields["num_attention_heads"],
    patch_size=whole(sides, "patch_size", fields_lib.MAX_SIDE),
    image_size=whole(sides, "image_size", fields_lib.MAX_SIDE),
    position="learned",
    pool="gap" if fields.get("use_mean_pooling") else "tok",
  )


def canonical(
  flat: Mapping[str, np.ndarray], content: Mapping[str, Any], vit: ov_models.ViTConfig
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Tensors of a tower under the names, and in the form, of `transformers_vit.write`.

  Args:
    flat: by the names of the file.
    content: of config.json.
    vit: what `vit_config` makes of it.

  Returns:
    Tensors without a prefix, "classifier." among them where there is one, and notes on what was
    changed or left out. What fits nothing stays, for the name map to tell.

  Raises:
    ValueError: two tensors stand for the same.
  """
  tensors: dict[str, np.ndarray] = {}
  for name, tensor in flat.items():
    known = name
    for pattern, replacement in _RENAMES:
      known = pattern.sub(replacement, known)
    if known in tensors:
      raise ValueError(f"the weights hold {known} twice, the second time as {name}.")
    tensors[known] = tensor
  notes = _fold_layer_scales(tensors, vit) + _fold_patch_bias(tensors, vit)
  notes += _without_biases(tensors, content, vit)
  if tensors.pop("embeddings.mask_token", None) is not None:
    notes.append("embeddings.mask_token left out: it stands for patches that training hides")
  if vit.pool == "tok":
    notes += _without_pooler(tensors, content, vit)
  return tensors, notes


def _fold_layer_scales(tensors: dict[str, np.ndarray], vit: ov_models.ViTConfig) -> list[str]:
  """Layer scales into the projections whose outputs they scale."""
  folded = 0
  for layer in range(vit.depth):
    block = f"encoder.layer.{layer}"
    for scale, linear in (("lambda_1", "attention.output.dense"), ("lambda_2", "output.dense")):
      name, weight, bias = f"{block}.{scale}", f"{block}.{linear}.weight", f"{block}.{linear}.bias"
      sizes = {_shape(tensors, tensor)[:1] for tensor in (name, weight, bias)}
      if sizes != {(vit.width,)}:
        continue  # not there, or of a wrong shape, which the name map tells
      factor = tensors.pop(name)
      tensors[weight] = tensors[weight] * factor[:, None]
      tensors[bias] = tensors[bias] * factor
      folded += 1
  note = f"{folded} layer scales are multiplied into the projections before them"
  return [note] if folded else []


def _fold_patch_bias(tensors: dict[str, np.ndarray], vit: ov_models.ViTConfig) -> list[str]:
  """The bias of the patches into their positions."""
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
  """Zeros for the biases of attention that a class or a field leaves away."""
  missing = []
  if content.get("model_type") == "beit":  # its key has none
    missing = [] if vit.pool == "gap" else ["key"]
  elif not content.get("qkv_bias", True):
    missing = ["query", "key", "value"]
  for layer in range(vit.depth):
    for name in missing:
      bias = f"encoder.layer.{layer}.attention.attention.{name}.bias"
      tensors.setdefault(bias, np.zeros(vit.width, np.float32))
  return [f"no bias in {', '.join(missing)} of attention: read as zeros"] if missing else []


def _without_pooler(
  tensors: dict[str, np.ndarray], content: Mapping[str, Any], vit: ov_models.ViTConfig
) -> list[str]:
  """The identity for a pooler of the cls token; ours has none."""
  identity = (np.eye(vit.width, dtype=np.float32), np.zeros(vit.width, np.float32))
  found = [tensors.pop(name, value) for name, value in zip(_POOLER, identity, strict=True)]
  tensors |= zip(_POOLER, identity, strict=True)
  linear = content.get("model_type") != "vit" or content.get("pooler_act", "tanh") == "linear"
  given = any(a.shape != b.shape or (a != b).any() for a, b in zip(found, identity, strict=True))
  if given:
    return ["pooler.dense left out: the pooled vector is the normed cls token"]
  return [] if linear else ["the tanh of the pooler is left out"]


def preprocess_from(content: Mapping[str, Any], side: int) -> tuple[Preprocess, list[str]]:
  """Our preprocessing from the content of preprocessor_config.json, and what differs in it.

  Args:
    content: of the file.
    side: pixels that the tower reads.

  Raises:
    ValueError: sizes, mean or std are no numbers of the kind.
  """
  size, crop = content.get("size", side), content.get("crop_size", side)
  center = bool(content.get("do_center_crop")) or _edge(size, "shortest_edge") > 0
  # One number is the shorter side where the middle is cut out of it, else a square.
  short = size if center and isinstance(size, int) else _edge(size, "shortest_edge")
  notes = []
  if center and short not in (0, side):
    notes.append(f"pictures are brought to a shorter side of {side}, not {short}, before the crop")
  if content.get("resample", 2) != 2:
    notes.append(
      f"pictures are resized bilinearly, not by resample={fields_lib.shown(content['resample'])}"
    )
  if (wide := _edge(crop if center else size, "height")) not in (0, side):
    notes.append(f"pictures get {side} pixels a side as config.json says, not {wide}")
  where = "preprocessor_config.json: "
  factor = fields_lib.number(content, "rescale_factor", 1 / 255, where)
  if abs(factor * 255 - 1) > 1e-4:
    notes.append(f"pixels are scaled by 1/255, not {factor!r}")
  mean = fields_lib.three(content, "image_mean", (0.5,) * 3, where)
  std = fields_lib.three(content, "image_std", (0.5,) * 3, where)
  if content.get("do_normalize") is False:
    mean, std = (0.0,) * 3, (1.0,) * 3
  return Preprocess(side, "center" if center else "squash", mean, std), notes


def _told(kind: Any) -> str:
  return kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 60 else "model"


def _edge(size: Any, name: str) -> int:
  """`name` of a size, which may be one number for a square; 0 where it is not said."""
  edge = size.get(name) if isinstance(size, Mapping) else size if name == "height" else None
  if not isinstance(edge, int | None):
    given = fields_lib.shown(size)
    raise ValueError(f"preprocessor_config.json has a size of {given}; expected whole pixels.")
  return edge or 0


def _side(size: Any) -> Any:
  """One number for a square of two; anything else as it is."""
  if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
    return size[0]
  return size


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
  return tensors[name].shape if name in tensors else ()
