"""SigLIP (https://arxiv.org/abs/2303.15343) and SigLIP 2 (https://arxiv.org/abs/2502.14786).

Both have the same classes in transformers, if images have a fixed size. Images are embedded as
their pooled vector, without projection. Texts attend to their padding and are pooled at the last
position.
"""

from typing import Any

from ov_convert.families.clip import (
  BUFFERS,
  TEXT_EMBEDDINGS,
  act_and_eps,
  blocks,
  image_sides,
  sizes,
  texts,
)
from ov_convert.families.family import Family, Field, Section, dense, norm
from ov_convert.name_map import CONV, LEAD_1, LEAD_1_1, SAME, TRANSPOSE

_QKV = ("query", "key", "value")
_POOL = "vision_model.head."
_VISION_LINES = (
  *dense("vision_model.embeddings.patch_embedding", "encoder/patch_embed")[1:],
  ("vision_model.embeddings.patch_embedding.weight", ("encoder/patch_embed/kernel",), CONV),
  ("vision_model.embeddings.position_embedding.weight", ("encoder/position_embedding",), SAME),
  *blocks("vision_model.", "encoder/"),
  *norm("vision_model.post_layernorm", "encoder/norm"),
  (f"{_POOL}probe", ("encoder/pool/probe",), LEAD_1_1),
  (
    f"{_POOL}attention.in_proj_weight",
    tuple(f"encoder/pool/attn/{name}/kernel" for name in _QKV),
    TRANSPOSE,
  ),
  (
    f"{_POOL}attention.in_proj_bias",
    tuple(f"encoder/pool/attn/{name}/bias" for name in _QKV),
    SAME,
  ),
  *dense(f"{_POOL}attention.out_proj", "encoder/pool/attn/out"),
  *norm(f"{_POOL}layernorm", "encoder/pool/norm"),
  *dense(f"{_POOL}mlp.fc1", "encoder/pool/mlp/up"),
  *dense(f"{_POOL}mlp.fc2", "encoder/pool/mlp/down"),
)
_TEXT_LINES = (
  *TEXT_EMBEDDINGS,
  *blocks("text_model.", "text/"),
  *norm("text_model.final_layer_norm", "text/norm"),
  *dense("text_model.head", "text_head"),
  ("logit_scale", ("log_scale",), LEAD_1),
  ("logit_bias", ("bias",), LEAD_1),
)
_VISION: dict[str, Any] = {
  "fields": (
    *sizes(768, 12, 3072, 12),
    *image_sides(224, 16),
    *act_and_eps("gelu_pytorch_tanh", 1e-6),
    Field("vision_use_head", "pool", True, {True: "map"}),
  ),
  "ours": {
    "position": "learned", "position_resize": "bicubic", "cls_token": False, "patch_bias": True
  },
  "required": {"num_channels": 3},
}  # fmt: skip

MODEL = Family(
  name="SigLIP",
  model_type="siglip",
  architecture="SiglipModel",
  sections=(
    Section("encoder", "vision_config", **_VISION),
    Section(
      "text",
      "text_config",
      (*sizes(768, 12, 3072, 12), *texts(32000, 64), *act_and_eps("gelu_pytorch_tanh", 1e-6)),
      {"mask": "full", "pool": "last", "padding": "attend"},
      # The embedding has the width of the image tower; the weights are checked.
      unused=frozenset({"projection_size"}),
      extra=lambda config: {"projection_size": config.embed_dim},
    ),
    Section("model", "", (), {"image_head": False, "text_head_bias": True, "bias_init": 0.0}),
  ),
  lines=(*_VISION_LINES, *_TEXT_LINES),
  ignored=BUFFERS,
)
TOWER = Family(
  name="SigLIP vision",
  model_type="siglip_vision_model",
  architecture="SiglipVisionModel",
  sections=(Section("encoder", "", **_VISION),),
  lines=_VISION_LINES,
  renames=((r"^(?!vision_model\.)", "vision_model."),),
  ignored={"vision_model.embeddings.position_ids": "numbers from 0"},
)
