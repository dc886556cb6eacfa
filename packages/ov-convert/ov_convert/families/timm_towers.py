"""Image towers of timm with options: CLIP, SigLIP, DINOv2, DINOv3, PE-Core and AIMv2.

A configuration of timm names an architecture, whose sizes and options are in the code of the
library, and arguments that replace them. `Tower.content` combines both with the sizes of tensors.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from ov_convert import fields as limits
from ov_convert.families.family import NUMBER, Family, Field, Line, Section, dense, norm
from ov_convert.name_map import CONV, LEAD_1, LEAD_1_1, SAME, TRANSPOSE
from ov_convert.release import Config, encoder_of
import ov_models

_QKV = ("query", "key", "value")
_BLOCK = "encoder/blocks/"
_SIZES = (
  Field("embed_dim", "width"),
  Field("depth", "depth", high=limits.MAX_DEPTH),
  Field("mlp_dim", "mlp_dim", high=4 * limits.MAX_WIDTH),
  Field("num_heads", "num_heads"),
  Field("img_size", "image_size", high=limits.MAX_SIDE),
  Field("patch_size", "patch_size", high=limits.MAX_SIDE),
)
_UNUSED = frozenset(
  {
    "mlp_ratio", "num_classes", "dynamic_img_size", "dynamic_img_pad", "strict_img_size",
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "weight_init", "fix_init", "ref_feat_shape",
  }
)  # fmt: skip
_COMMON: tuple[Line, ...] = (
  ("cls_token", ("encoder/cls",), LEAD_1_1),
  ("reg_token", ("encoder/registers",), LEAD_1),
  ("pos_embed", ("encoder/position_embedding",), LEAD_1),
  ("patch_embed.proj.weight", ("encoder/patch_embed/kernel",), CONV),
  ("patch_embed.proj.bias", ("encoder/patch_embed/bias",), SAME),
  *norm("patch_embed.norm", "encoder/patch_norm"),
  *norm("norm_pre", "encoder/pre_norm"),
  *norm("blocks.{layer}.norm1", f"{_BLOCK}norm1"),
  (
    "blocks.{layer}.attn.qkv.weight",
    tuple(f"{_BLOCK}attn/{name}/kernel" for name in _QKV),
    TRANSPOSE,
  ),
  *dense("blocks.{layer}.attn.proj", f"{_BLOCK}attn/out"),
  *norm("blocks.{layer}.norm2", f"{_BLOCK}norm2"),
  *dense("blocks.{layer}.mlp.fc2", f"{_BLOCK}mlp/down"),
  *norm("norm", "encoder/norm"),
  ("attn_pool.latent", ("encoder/pool/probe",), LEAD_1_1),
  *dense("attn_pool.q", "encoder/pool/attn/query"),
  *dense("attn_pool.kv", "encoder/pool/attn/key", "encoder/pool/attn/value"),
  *dense("attn_pool.proj", "encoder/pool/attn/out"),
  *norm("attn_pool.norm", "encoder/pool/norm"),
  *dense("attn_pool.mlp.fc1", "encoder/pool/mlp/up"),
  *dense("attn_pool.mlp.fc2", "encoder/pool/mlp/down"),
)
_FUSED_BIAS: tuple[Line, ...] = (
  ("blocks.{layer}.attn.qkv.bias", tuple(f"{_BLOCK}attn/{name}/bias" for name in _QKV), SAME),
)
_SEPARATE_BIASES: tuple[Line, ...] = tuple(
  (f"blocks.{{layer}}.attn.{name[0]}_bias", (f"{_BLOCK}attn/{name}/bias",), SAME)
  for name in ("query", "value")
)
_PLAIN = dense("blocks.{layer}.mlp.fc1", f"{_BLOCK}mlp/up")
_PACKED = dense("blocks.{layer}.mlp.fc1", f"{_BLOCK}mlp/gate", f"{_BLOCK}mlp/up")
_GATED = (
  *dense("blocks.{layer}.mlp.fc1_g", f"{_BLOCK}mlp/gate"),
  *dense("blocks.{layer}.mlp.fc1_x", f"{_BLOCK}mlp/up"),
)


def _scales(first: str, second: str) -> tuple[Line, ...]:
  return (
    (f"blocks.{{layer}}.{first}", (f"{_BLOCK}scale1",), SAME),
    (f"blocks.{{layer}}.{second}", (f"{_BLOCK}scale2",), SAME),
  )


@dataclasses.dataclass(frozen=True)
class Tower:
  """Architectures of timm with the same options.

  Attributes:
    pattern: regular expression of their names.
    base: architecture that is written.
    family: fields and tensors; its fields are arguments of the class.
    heads: attention heads of the architectures by (width, depth).
    arguments: arguments that are in the code of the architectures.
    hidden: multiple of the width of the MLP that the argument mlp_ratio gives.
    no_embed_class: whether the position table has no row for cls.
  """

  pattern: str
  base: str
  family: Family
  heads: Mapping[tuple[int, int], int]
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  hidden: int = 1
  no_embed_class: bool = False

  def content(self, config: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of a model, with sizes from its tensors.

    Raises:
      ValueError: if a tensor that determines a size is missing.
    """
    needed = ("patch_embed.proj.weight", "blocks.0.mlp.fc2.weight")
    if missing := [n for n in needed if n not in flat or flat[n].ndim != (4 if "proj" in n else 2)]:
      raise ValueError(f"the weights have no matrix {', '.join(missing)}; expected a ViT of timm.")
    width, mlp_dim = flat["blocks.0.mlp.fc2.weight"].shape
    layers = {int(m[1]) for n in flat if (m := re.match(r"blocks\.(\d{1,5})\.", n))}
    settings = limits.section(config, "pretrained_cfg", "") or config
    side = re.search(r"_(\d+)$", config["architecture"].partition(".")[0])
    size = settings.get("input_size") or [int(side[1]) if side else 224]
    found = {
      "embed_dim": width, "depth": len(layers), "mlp_dim": mlp_dim,
      "patch_size": flat["patch_embed.proj.weight"].shape[-1],
      "img_size": size[-1] if isinstance(size, list | tuple) else size,
      "num_heads": self.heads.get((width, len(layers))),
    }  # fmt: skip
    if found["num_heads"] is None:
      del found["num_heads"]
    if (pool := config.get("global_pool")) is not None:
      found["global_pool"] = pool
    given = limits.section(config, "model_args", "")
    return found | dict(self.arguments) | dict(given)

  def model_args(self, config: ov_models.ViTConfig) -> dict[str, Any]:
    """Return the arguments of a config without `family.problems`."""
    args = self.family.write_config(config)
    for name in ("architectures", "model_type", "mlp_dim"):
      args.pop(name, None)
    ratio = self.hidden * config.mlp_dim / config.width
    while int(config.width * ratio) < self.hidden * config.mlp_dim:
      ratio = float(np.nextafter(ratio, np.inf))
    return {k: v for k, v in args.items() if k not in self.arguments} | {"mlp_ratio": ratio}


def _family(
  name: str,
  ours: Mapping[str, Any],
  lines: tuple[Line, ...],
  fields: tuple[Field, ...] = (),
  required: Mapping[str, Any] | None = None,
  derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
  extra: Callable[[Config], Mapping[str, Any]] | None = None,
) -> Family:
  section = Section(
    "encoder", "", (*_SIZES, *fields), ours, dict(required or {}), _UNUSED, derive, extra
  )
  ignored = {f"head.{part}": "the tower returns the pooled vector before it" for part in _HEAD}
  return Family(
    f"timm {name}", name, name, (section,), (*_COMMON, *lines),
    ignored=ignored | {"rope.periods": "computed"},
  )  # fmt: skip


_HEAD = ("weight", "bias")
_LEARNED = {"position": "learned", "position_resize": "bicubic"}
_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
_CLIP_HEADS = {
  (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 16, (1664, 48): 16
}  # fmt: skip
_POOLS = Field("global_pool", "pool", "token", {"token": "tok"})
_SCALE = Field("init_values", "layer_scale", 1e-5, NUMBER)


def _clip(name: str, activation: str) -> Tower:
  ours = _LEARNED | {"pre_norm": True, "norm_eps": 1e-5, "activation": activation}
  family = _family(f"CLIP {activation}", ours, (*_FUSED_BIAS, *_PLAIN), (_POOLS,))
  return Tower(
    rf"vit_[a-z0-9]+_patch\d+_{name}_\d+", f"vit_base_patch16_{name}_224", family, _CLIP_HEADS
  )


def _siglip(activation: str, pattern: str) -> Tower:
  ours = _LEARNED | {"cls_token": False, "patch_bias": True}
  fields = (
    Field("global_pool", "pool", "map", {"map": "map"}),
    Field("act_layer", "activation", activation, _ACT),
  )
  family = _family("SigLIP", ours, (*_FUSED_BIAS, *_PLAIN), fields)
  # The base architecture has exact GELU, so act_layer is always written.
  return Tower(
    pattern, "vit_base_patch16_siglip_224", family,
    {(768, 12): 12, (1024, 24): 16, (1152, 27): 16, (1536, 40): 16},
  )  # fmt: skip


# Architectures of SigLIP that are defined with the tanh approximation.
_TANH = (
  r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_(gap_)?\d+|"
  r"vit_large_patch16_siglip_512"
)
_DINO_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 20, (1536, 40): 24}
_DINO_HEADS |= {(4096, 40): 32}
_V2 = _LEARNED | {"patch_bias": True}


def _dinov2(name: str, pattern: str, base: str, *, registers: bool, packed: bool) -> Tower:
  fields: tuple[Field, ...] = (_POOLS, _SCALE)
  ours = _V2
  if registers:
    fields += (Field("reg_tokens", "registers", 4, high=4096),)
  if packed:
    ours = ours | {"mlp": "gated", "activation": "silu"}
  lines = (*_FUSED_BIAS, *(_PACKED if packed else _PLAIN), *_scales("ls1.gamma", "ls2.gamma"))
  required = {"no_embed_class": True} if registers else {}
  return Tower(
    pattern, base, _family(name, ours, lines, fields, required), _DINO_HEADS,
    hidden=2 if packed else 1, no_embed_class=registers,
  )  # fmt: skip


def _dinov3(name: str, pattern: str, base: str, *, gated: bool, bias: bool) -> Tower:
  ours: dict[str, Any] = {
    "position": "none", "rotary": "dinov3", "patch_bias": True, "norm_eps": 1e-5,
    "qkv_bias": "query_value" if bias else "none",
  }  # fmt: skip
  if gated:
    ours |= {"mlp": "gated", "activation": "silu"}
  fields = (
    Field("global_pool", "pool", "avg", {"avg": "mean", "token": "tok"}),
    _SCALE,
    Field("num_reg_tokens", "registers", 4, high=4096, low=0),
    Field("rope_temperature", "rotary_base", 100.0, NUMBER),
  )
  lines = (*_SEPARATE_BIASES, *(_GATED if gated else _PLAIN), *_scales("gamma_1", "gamma_2"))
  return Tower(pattern, base, _family(name, ours, lines, fields), _DINO_HEADS)


def _read_pe(content: Mapping[str, Any]) -> dict[str, Any]:
  width = limits.integer(content, "embed_dim", None, limits.MAX_WIDTH)
  side = limits.integer(content, "img_size", None, limits.MAX_SIDE)
  grid = side // limits.integer(content, "patch_size", None, limits.MAX_SIDE)
  given = content.get("ref_feat_shape", [grid, grid])
  if list(given if isinstance(given, list | tuple) else [given] * 2) != [grid, grid]:
    raise ValueError(
      f"ref_feat_shape={limits.shown(given)} (supported: the grid {grid} x {grid} of img_size)"
    )
  return {"pool_heads": 8, "pool_mlp_dim": 4 * width}


def _write_pe(config: Config) -> dict[str, Any]:
  return {"ref_feat_shape": list(encoder_of(config).grid)}


def _pe(name: str, pattern: str, base: str, *, cls_token: bool) -> Tower:
  ours = _LEARNED | {
    "pre_norm": True, "norm_eps": 1e-5, "rotary": "pe", "rotary_base": 1e4,
    "cls_token": cls_token,
  }  # fmt: skip
  fields = (Field("global_pool", "pool", "map", {"map": "map"}),)
  family = _family(name, ours, (*_FUSED_BIAS, *_PLAIN), fields, None, _read_pe, _write_pe)
  heads = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1536, 50): 16}
  return Tower(pattern, base, family, heads)


def _aimv2() -> Tower:
  ours = _LEARNED | {
    "cls_token": False, "patch_bias": True, "patch_norm": True, "norm": "rms", "norm_eps": 1e-5,
    "mlp": "gated", "activation": "silu", "qkv_bias": "none", "out_bias": False, "mlp_bias": False,
  }  # fmt: skip
  fields = (Field("global_pool", "pool", "avg", {"avg": "mean"}),)
  heads = {(1024, 24): 8, (1536, 24): 12, (2048, 24): 16, (3072, 24): 24}
  return Tower(
    r"aimv2_[a-z0-9]+_patch14_\d+", "aimv2_large_patch14_224",
    _family("AIMv2", ours, _GATED, fields), heads,
  )  # fmt: skip


# The first matching pattern is used.
TOWERS: tuple[Tower, ...] = (
  _clip("clip_quickgelu", "quick_gelu"),
  _clip("clip", "gelu"),
  _siglip("gelu_tanh", _TANH),
  _siglip("gelu", r"vit_[a-z0-9]+_patch\d+_siglip_\d+"),
  _dinov2(
    "DINOv2 giant", r"vit_giant_patch14_dinov2", "vit_giant_patch14_dinov2",
    registers=False, packed=True,
  ),
  _dinov2(
    "DINOv2", r"vit_[a-z]+_patch14_dinov2", "vit_base_patch14_dinov2",
    registers=False, packed=False,
  ),
  _dinov2(
    "DINOv2 giant with registers", r"vit_giant_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2", registers=True, packed=True,
  ),
  _dinov2(
    "DINOv2 with registers", r"vit_[a-z]+_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2",
    registers=True, packed=False,
  ),
  _dinov3(
    "DINOv3 plus", r"vit_[a-z]+_plus_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb",
    gated=True, bias=True,
  ),
  _dinov3(
    "DINOv3 plus without biases", r"vit_([a-z]+_plus|7b)_patch16_dinov3",
    "vit_small_plus_patch16_dinov3", gated=True, bias=False,
  ),
  _dinov3(
    "DINOv3", r"vit_[a-z]+_patch16_dinov3_qkvb", "vit_small_patch16_dinov3_qkvb",
    gated=False, bias=True,
  ),
  _dinov3(
    "DINOv3 without biases", r"vit_[a-z]+_patch16_dinov3", "vit_small_patch16_dinov3",
    gated=False, bias=False,
  ),
  _pe(
    "PE-Core", r"vit_pe_core_(tiny|small|base|large)_patch\d+_\d+", "vit_pe_core_base_patch16_224",
    cls_token=True,
  ),
  _pe(
    "PE-Core gigantic", r"vit_pe_core_gigantic_patch14_448", "vit_pe_core_gigantic_patch14_448",
    cls_token=False,
  ),
  _aimv2(),
)  # fmt: skip
