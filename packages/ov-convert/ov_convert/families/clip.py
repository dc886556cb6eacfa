"""CLIP (https://arxiv.org/abs/2103.00020) in transformers.

The norm before the blocks is called `pre_layrnorm` there. Texts are pooled at the first end token,
which has the largest id.
"""

from collections.abc import Mapping
from typing import Any

from ov_convert import fields as limits
from ov_convert.families.family import NUMBER, Family, Field, Line, Section, dense, norm
from ov_convert.fields import shown
from ov_convert.name_map import CONV, SAME, TRANSPOSE

ACTIVATIONS = {
  "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}  # fmt: skip
TEXT = {"mask": "causal", "pool": "argmax", "padding": "attend"}
_LARGEST_ID = 2  # eos_token_id of old files: pool at the largest id, whatever the end token is


def check_end(content: Mapping[str, Any]) -> dict[str, Any]:
  """Raise ValueError unless the end token of texts has the largest id."""
  last = content.get("vocab_size", 49408)
  end = content.get("eos_token_id", 49407)
  if end == _LARGEST_ID or (isinstance(last, int) and end == last - 1):
    return {}
  raise ValueError(f"eos_token_id={shown(end)} (supported: the last of vocab_size={shown(last)})")


def special_ids(config: Any) -> dict[str, int]:
  """Return the ids of special tokens, which are the last ones."""
  end = config.text.vocab_size - 1
  return {"bos_token_id": max(end - 1, 0), "eos_token_id": end, "pad_token_id": end}


def sizes(width: int, depth: int, mlp_dim: int, heads: int) -> tuple[Field, ...]:
  """Return the fields of the sizes of a tower, with the defaults of transformers."""
  return (
    Field("hidden_size", "width", width),
    Field("num_hidden_layers", "depth", depth, high=limits.MAX_DEPTH),
    Field("intermediate_size", "mlp_dim", mlp_dim, high=4 * limits.MAX_WIDTH),
    Field("num_attention_heads", "num_heads", heads),
  )


def image_sides(image_size: int, patch_size: int) -> tuple[Field, ...]:
  """Return the fields of the sizes of images and patches."""
  return (
    Field("image_size", "image_size", image_size, high=limits.MAX_SIDE),
    Field("patch_size", "patch_size", patch_size, high=limits.MAX_SIDE),
  )


def act_and_eps(act: str, eps: float) -> tuple[Field, ...]:
  """Return the fields of the activation and of the epsilon."""
  return (
    Field("hidden_act", "activation", act, ACTIVATIONS),
    Field("layer_norm_eps", "norm_eps", eps, NUMBER),
  )


def texts(vocab_size: int, max_len: int) -> tuple[Field, ...]:
  """Return the fields of the vocabulary and of the text length."""
  return (
    Field("vocab_size", "vocab_size", vocab_size, high=limits.MAX_VOCABULARY),
    Field("max_position_embeddings", "max_len", max_len, high=limits.MAX_TOKENS),
  )


def blocks(theirs: str, ours: str) -> tuple[Line, ...]:
  """Return the lines of the blocks of CLIP and SigLIP."""
  layer, block = f"{theirs}encoder.layers.{{layer}}.", f"{ours}blocks/"
  return (
    *norm(f"{layer}layer_norm1", f"{block}norm1"),
    *dense(f"{layer}self_attn.q_proj", f"{block}attn/query"),
    *dense(f"{layer}self_attn.k_proj", f"{block}attn/key"),
    *dense(f"{layer}self_attn.v_proj", f"{block}attn/value"),
    *dense(f"{layer}self_attn.out_proj", f"{block}attn/out"),
    *norm(f"{layer}layer_norm2", f"{block}norm2"),
    *dense(f"{layer}mlp.fc1", f"{block}mlp/up"),
    *dense(f"{layer}mlp.fc2", f"{block}mlp/down"),
  )


_VISION_LINES = (
  ("vision_model.embeddings.class_embedding", ("encoder/cls",), SAME),
  ("vision_model.embeddings.patch_embedding.weight", ("encoder/patch_embed/kernel",), CONV),
  ("vision_model.embeddings.position_embedding.weight", ("encoder/position_embedding",), SAME),
  *norm("vision_model.pre_layrnorm", "encoder/pre_norm"),
  *blocks("vision_model.", "encoder/"),
  *norm("vision_model.post_layernorm", "encoder/norm"),
)
# Text embeddings have the same names in CLIP, SigLIP and AIMv2, projections in CLIP and AIMv2.
TEXT_EMBEDDINGS: tuple[Line, ...] = (
  ("text_model.embeddings.token_embedding.weight", ("text/embed/embedding",), SAME),
  ("text_model.embeddings.position_embedding.weight", ("text/position_embedding",), SAME),
)
_TEXT_LINES = (
  *TEXT_EMBEDDINGS,
  *blocks("text_model.", "text/"),
  *norm("text_model.final_layer_norm", "text/norm"),
)
HEAD_LINES: tuple[Line, ...] = (
  ("visual_projection.weight", ("image_head/kernel",), TRANSPOSE),
  ("text_projection.weight", ("text_head/kernel",), TRANSPOSE),
  ("logit_scale", ("log_scale",), SAME),
)
HEAD_FIELDS = (
  Field("projection_dim", "embed_dim", 512),
  Field("logit_scale_init_value", "log_scale_init", 2.6592, NUMBER),
)
BUFFERS = {
  f"{tower}_model.embeddings.position_ids": "numbers from 0" for tower in ("vision", "text")
}
_VISION: dict[str, Any] = {
  "fields": (
    *sizes(768, 12, 3072, 12), *image_sides(224, 32), *act_and_eps("quick_gelu", 1e-5)
  ),
  "ours": {
    "position": "learned", "position_resize": "bicubic", "pool": "tok", "pre_norm": True
  },
  "required": {"num_channels": 3},
  "unused": frozenset({"projection_dim"}),
}  # fmt: skip

MODEL = Family(
  name="CLIP",
  model_type="clip",
  architecture="CLIPModel",
  sections=(
    Section("encoder", "vision_config", **_VISION),
    Section(
      "text",
      "text_config",
      (*sizes(512, 12, 2048, 8), *texts(49408, 77), *act_and_eps("quick_gelu", 1e-5)),
      TEXT,
      unused=frozenset({"projection_dim"}),
      derive=check_end,
      extra=special_ids,
    ),
    Section("model", "", HEAD_FIELDS),
  ),
  lines=(*_VISION_LINES, *_TEXT_LINES, *HEAD_LINES),
  ignored=BUFFERS,
)
TOWER = Family(
  name="CLIP vision",
  model_type="clip_vision_model",
  architecture="CLIPVisionModel",
  sections=(Section("encoder", "", **_VISION),),
  lines=_VISION_LINES,
  renames=((r"^(?!vision_model\.|visual_projection)", "vision_model."),),
  ignored={
    "vision_model.embeddings.position_ids": "numbers from 0",
    "visual_projection.weight": "the tower returns the pooled vector before it",
  },
)
