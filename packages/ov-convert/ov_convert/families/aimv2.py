"""AIMv2 (https://arxiv.org/abs/2411.14402) in transformers.

The image tower has no cls token, normalises its patches, and has no biases in its blocks. With a
text tower (LiT), images are pooled by attention; without, by the mean of the normalised patches.
"""

from typing import Any

from ov_convert.families.clip import (
  ACTIVATIONS,
  HEAD_FIELDS,
  HEAD_LINES,
  TEXT,
  TEXT_EMBEDDINGS,
  check_end,
  image_sides,
  sizes,
  special_ids,
  texts,
)
from ov_convert.families.family import NUMBER, Family, Field, Line, Section, dense, norm
from ov_convert.name_map import CONV, LEAD_1_1, SAME

_FLAG = {True: True, False: False}
_BIASES = {True: "all", False: "none"}


def _fields(width: int, depth: int, mlp_dim: int, heads: int) -> tuple[Field, ...]:
  return (
    *sizes(width, depth, mlp_dim, heads),
    Field("hidden_act", "activation", "silu", ACTIVATIONS | {"silu": "silu"}),
    Field("rms_norm_eps", "norm_eps", 1e-5, NUMBER),
    Field("qkv_bias", "qkv_bias", False, _BIASES),
    Field("mlp_bias", "mlp_bias", False, _FLAG),
  )


def _blocks(theirs: str, ours: str) -> tuple[Line, ...]:
  layer, block = f"{theirs}encoder.layers.{{layer}}.", f"{ours}blocks/"
  return (
    *norm(f"{layer}rms_norm1", f"{block}norm1"),
    *dense(f"{layer}attention.q_proj", f"{block}attn/query"),
    *dense(f"{layer}attention.k_proj", f"{block}attn/key"),
    *dense(f"{layer}attention.v_proj", f"{block}attn/value"),
    *dense(f"{layer}attention.out_proj", f"{block}attn/out"),
    *norm(f"{layer}rms_norm2", f"{block}norm2"),
    *dense(f"{layer}ffn.gate_proj", f"{block}mlp/gate"),
    *dense(f"{layer}ffn.up_proj", f"{block}mlp/up"),
    *dense(f"{layer}ffn.down_proj", f"{block}mlp/down"),
  )


def _vision_lines(prefix: str) -> tuple[Line, ...]:
  embeddings, head = f"{prefix}embeddings.", f"{prefix}head."
  return (
    (f"{embeddings}patch_embed.weight", ("encoder/patch_embed/kernel",), CONV),
    (f"{embeddings}patch_embed.bias", ("encoder/patch_embed/bias",), SAME),
    *norm(f"{embeddings}rms_norm", "encoder/patch_norm"),
    (f"{embeddings}position_embedding.weight", ("encoder/position_embedding",), SAME),
    *_blocks(prefix, "encoder/"),
    *norm(f"{prefix}rms_norm", "encoder/norm"),
    (f"{head}cls_token", ("encoder/pool/query",), LEAD_1_1),
    *dense(f"{head}k_proj", "encoder/pool/key"),
    *dense(f"{head}v_proj", "encoder/pool/value"),
    *dense(f"{head}output_proj", "encoder/pool/out"),
  )


# The bias of the attention output is that of queries, keys and values.
_OURS = {"norm": "rms", "mlp": "gated", "out_bias": False}
_VISION: dict[str, Any] = {
  "fields": (
    *_fields(1024, 24, 2816, 8),
    *image_sides(224, 14),
    Field("use_head", "pool", True, {True: "attend", False: "mean"}),
  ),
  "ours": _OURS
  | {"cls_token": False, "patch_bias": True, "patch_norm": True}
  | {"position": "learned", "position_resize": "bicubic"},
  "required": {"num_channels": 3, "is_native": False},
}

MODEL = Family(
  name="AIMv2",
  model_type="aimv2",
  architecture="Aimv2Model",
  sections=(
    Section("encoder", "vision_config", **_VISION),
    Section(
      "text",
      "text_config",
      (*_fields(768, 12, 2048, 6), *texts(49408, 77)),
      TEXT | _OURS,
      derive=check_end,
      extra=special_ids,
    ),
    Section("model", "", HEAD_FIELDS, required={"max_logit_scale": 100.0}),
  ),
  lines=(
    *_vision_lines("vision_model."),
    *TEXT_EMBEDDINGS,
    *_blocks("text_model.", "text/"),
    *norm("text_model.rms_norm", "text/norm"),
    *HEAD_LINES,
  ),
)
TOWER = Family(
  name="AIMv2 vision",
  model_type="aimv2_vision_model",
  architecture="Aimv2VisionModel",
  sections=(Section("encoder", "", **_VISION),),
  lines=_vision_lines(""),
  renames=((r"^vision_model\.", ""),),
)
