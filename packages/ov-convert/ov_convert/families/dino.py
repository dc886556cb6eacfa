"""DINOv2 (https://arxiv.org/abs/2304.07193), with and without registers, and DINOv3.

DINOv3: https://arxiv.org/abs/2508.10104. Names are those of files; modules of transformers 5 have
others. The mask token, which only pretraining uses, is not read, and is written as zeros.
"""

from collections.abc import Mapping
from typing import Any

from ov_convert import fields as limits
from ov_convert.families.clip import ACTIVATIONS, image_sides, sizes
from ov_convert.families.family import NUMBER, Family, Field, Line, Section, dense, norm
from ov_convert.fields import shown
from ov_convert.name_map import CONV, LEAD_1, LEAD_1_1, SAME
from ov_convert.release import Config, encoder_of

_MASK_TOKEN = {"embeddings.mask_token": "it is used only in training, for masked patches"}
_CLASSIFIER = {
  f"classifier.{name}": "it is a classifier, not a part of the tower" for name in ("weight", "bias")
}
_REQUIRED = {"num_channels": 3, "apply_layernorm": True}
_UNUSED = frozenset(
  {
    "out_features", "out_indices", "_out_features", "_out_indices", "stage_names",
    "reshape_hidden_states", "use_mask_token", "return_class_token",
  }
)  # fmt: skip
_MLP = frozenset({"hidden_act", "mlp_ratio", "intermediate_size"})
_FLAG = {True: True, False: False}
_GATED = {False: "plain", True: "gated"}


def _swiglu_width(width: int, ratio: float) -> int:
  """Return the hidden width of SwiGLU in DINOv2: 2/3 of the MLP, rounded up to a multiple of 8."""
  return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def _read_mlp(content: Mapping[str, Any]) -> dict[str, Any]:
  width = limits.integer(content, "hidden_size", 768, limits.MAX_WIDTH)
  ratio = limits.number(content, "mlp_ratio", 4)
  gated = content.get("use_swiglu_ffn", False)
  act = content.get("hidden_act", "gelu")
  if gated:
    return {"mlp_dim": _swiglu_width(width, ratio), "activation": "silu"}
  if not isinstance(act, str) or act not in ACTIVATIONS:
    raise ValueError(f"hidden_act={shown(act)} (supported: {' or '.join(ACTIVATIONS)})")
  return {"mlp_dim": int(width * ratio), "activation": ACTIVATIONS[act]}


def _write_mlp(config: Config) -> dict[str, Any]:
  vit = encoder_of(config)
  if vit.mlp == "gated":
    fitting = [r for r in range(1, 17) if _swiglu_width(vit.width, r) == vit.mlp_dim]
    return {"mlp_ratio": fitting[0] if fitting else 4, "hidden_act": "gelu"}
  act = next((name for name, ours in ACTIVATIONS.items() if ours == vit.activation), "gelu")
  return {"mlp_ratio": max(vit.mlp_dim // vit.width, 1), "hidden_act": act}


def _embeddings(patches: str) -> tuple[Line, ...]:
  return (
    ("embeddings.cls_token", ("encoder/cls",), LEAD_1_1),
    ("embeddings.register_tokens", ("encoder/registers",), LEAD_1),
    ("embeddings.position_embeddings", ("encoder/position_embedding",), LEAD_1),
    (f"{patches}.weight", ("encoder/patch_embed/kernel",), CONV),
    (f"{patches}.bias", ("encoder/patch_embed/bias",), SAME),
  )


def _v2_zeros(config: Config) -> dict[str, tuple[int, ...]]:
  return {"embeddings.mask_token": (1, encoder_of(config).width)}


def _v3_zeros(config: Config) -> dict[str, tuple[int, ...]]:
  vit = encoder_of(config)
  empty = {} if vit.registers else {"embeddings.register_tokens": (1, 0, vit.width)}
  return {"embeddings.mask_token": (1, 1, vit.width), **empty}


_LAYER, _BLOCK = "encoder.layer.{layer}.", "encoder/blocks/"
_V2_LINES = (
  *_embeddings("embeddings.patch_embeddings.projection"),
  *norm(f"{_LAYER}norm1", f"{_BLOCK}norm1"),
  *dense(f"{_LAYER}attention.attention.query", f"{_BLOCK}attn/query"),
  *dense(f"{_LAYER}attention.attention.key", f"{_BLOCK}attn/key"),
  *dense(f"{_LAYER}attention.attention.value", f"{_BLOCK}attn/value"),
  *dense(f"{_LAYER}attention.output.dense", f"{_BLOCK}attn/out"),
  (f"{_LAYER}layer_scale1.lambda1", (f"{_BLOCK}scale1",), SAME),
  *norm(f"{_LAYER}norm2", f"{_BLOCK}norm2"),
  (f"{_LAYER}layer_scale2.lambda1", (f"{_BLOCK}scale2",), SAME),
  *norm("layernorm", "encoder/norm"),
)
_V2_PLAIN = (
  *dense(f"{_LAYER}mlp.fc1", f"{_BLOCK}mlp/up"),
  *dense(f"{_LAYER}mlp.fc2", f"{_BLOCK}mlp/down"),
)
_V2_GATED = (
  *dense(f"{_LAYER}mlp.weights_in", f"{_BLOCK}mlp/gate", f"{_BLOCK}mlp/up"),
  *dense(f"{_LAYER}mlp.weights_out", f"{_BLOCK}mlp/down"),
)
_V2_RENAMES = (
  (r"^dinov2(_with_registers)?\.", ""),
  (r"\.attention\.q_proj\.", ".attention.attention.query."),
  (r"\.attention\.k_proj\.", ".attention.attention.key."),
  (r"\.attention\.v_proj\.", ".attention.attention.value."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
)


def _v2(*, gated: bool, registers: bool) -> Family:
  fields = (*sizes(768, 12, 3072, 12), *image_sides(224, 16 if registers else 14))
  fields = tuple(field for field in fields if field.ours != "mlp_dim") + (
    Field("layer_norm_eps", "norm_eps", 1e-6, NUMBER),
    Field("qkv_bias", "qkv_bias", True, {True: "all", False: "none"}),
    Field("layerscale_value", "layer_scale", 1.0, NUMBER),
    Field("use_swiglu_ffn", "mlp", False, _GATED),
  )
  if registers:
    fields += (Field("num_register_tokens", "registers", 4, high=4096),)
  ours = {
    "position": "learned", "position_resize": "bicubic", "pool": "tok", "patch_bias": True
  }  # fmt: skip
  return Family(
    name="DINOv2 with registers" if registers else "DINOv2",
    model_type="dinov2_with_registers" if registers else "dinov2",
    architecture="Dinov2WithRegistersModel" if registers else "Dinov2Model",
    sections=(
      Section("encoder", "", fields, ours, _REQUIRED, _UNUSED | _MLP, _read_mlp, _write_mlp),
    ),
    lines=(*_V2_LINES, *(_V2_GATED if gated else _V2_PLAIN)),
    renames=_V2_RENAMES,
    ignored=_MASK_TOKEN | _CLASSIFIER,
    zeros=_v2_zeros,
    applies=lambda content: bool(content.get("use_swiglu_ffn", False)) == gated,
  )


V2 = tuple(_v2(gated=g, registers=r) for r in (False, True) for g in (False, True))

# Biases of queries, keys and values, by our qkv_bias.
_BIASES = {"all": (True, True, True), "query_value": (True, False, True), "none": (False,) * 3}
_BIAS_NAMES = ("query_bias", "key_bias", "value_bias")


def _read_v3(content: Mapping[str, Any]) -> dict[str, Any]:
  given = tuple(content.get(n, d) for n, d in zip(_BIAS_NAMES, (True, False, True), strict=True))
  rescale = content.get("pos_embed_rescale", 2.0)
  rescale = None if rescale is None else limits.number(content, "pos_embed_rescale", 2.0)
  for ours, theirs in _BIASES.items():
    if given == theirs:
      return {"qkv_bias": ours, "rotary_rescale": rescale}
  shown_biases = ", ".join(f"{n}={shown(v)}" for n, v in zip(_BIAS_NAMES, given, strict=True))
  raise ValueError(f"{shown_biases} (supported: all, none, or all but key_bias)")


def _write_v3(config: Config) -> dict[str, Any]:
  vit = encoder_of(config)
  biases = dict(zip(_BIAS_NAMES, _BIASES[vit.qkv_bias], strict=True))
  return {**biases, "pos_embed_rescale": vit.rotary_rescale}


_LAYER3 = "layer.{layer}."
V3 = Family(
  name="DINOv3",
  model_type="dinov3_vit",
  architecture="DINOv3ViTModel",
  sections=(
    Section(
      "encoder",
      "",
      (
        *sizes(384, 12, 1536, 6),
        *image_sides(224, 16),
        Field("hidden_act", "activation", "gelu", ACTIVATIONS | {"silu": "silu"}),
        Field("layer_norm_eps", "norm_eps", 1e-5, NUMBER),
        Field("rope_theta", "rotary_base", 100.0, NUMBER),
        Field("proj_bias", "out_bias", True, _FLAG),
        Field("mlp_bias", "mlp_bias", True, _FLAG),
        Field("layerscale_value", "layer_scale", 1.0, NUMBER),
        Field("use_gated_mlp", "mlp", False, _GATED),
        Field("num_register_tokens", "registers", 0, high=4096, low=0),
      ),
      {"position": "none", "rotary": "dinov3", "pool": "tok", "patch_bias": True},
      _REQUIRED | {"pos_embed_shift": None, "pos_embed_jitter": None},
      _UNUSED | {*_BIAS_NAMES, "pos_embed_rescale", "rope_parameters"},
      _read_v3,
      _write_v3,
    ),
  ),
  lines=(
    *_embeddings("embeddings.patch_embeddings"),
    *norm(f"{_LAYER3}norm1", f"{_BLOCK}norm1"),
    *dense(f"{_LAYER3}attention.q_proj", f"{_BLOCK}attn/query"),
    *dense(f"{_LAYER3}attention.k_proj", f"{_BLOCK}attn/key"),
    *dense(f"{_LAYER3}attention.v_proj", f"{_BLOCK}attn/value"),
    *dense(f"{_LAYER3}attention.o_proj", f"{_BLOCK}attn/out"),
    (f"{_LAYER3}layer_scale1.lambda1", (f"{_BLOCK}scale1",), SAME),
    *norm(f"{_LAYER3}norm2", f"{_BLOCK}norm2"),
    *dense(f"{_LAYER3}mlp.gate_proj", f"{_BLOCK}mlp/gate"),
    *dense(f"{_LAYER3}mlp.up_proj", f"{_BLOCK}mlp/up"),
    *dense(f"{_LAYER3}mlp.down_proj", f"{_BLOCK}mlp/down"),
    (f"{_LAYER3}layer_scale2.lambda1", (f"{_BLOCK}scale2",), SAME),
    *norm("norm", "encoder/norm"),
  ),
  renames=((r"^model\.", ""),),
  ignored=_MASK_TOKEN,
  zeros=_v3_zeros,
)
