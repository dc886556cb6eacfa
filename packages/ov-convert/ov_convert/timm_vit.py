"""timm format: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

The image tower of any model becomes a timm VisionTransformer: pool "gap" is global_pool "avg",
"tok" is "token", and "map" is "map" over all tokens including cls. With two towers the image
projection becomes the head, so the logits are the unnormalised embedding.

`forward_features(x)[:, 1:]` returns patch features: before any norm for pool "gap", normalised for
"tok" and "map". `forward_head(..., pre_logits=True)` returns the pooled vector.
"""

from collections.abc import Iterator, Mapping
import os
import pathlib
import re
from typing import Any

import numpy as np

from ov_convert import fields, reading, timm_families, vision
from ov_convert.name_map import (
  CONV,
  LEAD_1,
  LEAD_1_1,
  SAME,
  TRANSPOSE,
  Dropped,
  Entry,
  Fixed,
  Flat,
  NameMap,
  Transform,
)
from ov_convert.open_clip_config import filter_of
from ov_convert.release import (
  Config,
  Fit,
  Imported,
  Preprocess,
  Release,
  encoder_of,
  option_problems,
)
from ov_convert.writing import write_json, write_weights
import ov_models

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")
_ARCHITECTURE = "vit_base_patch16_224"  # any plain ViT; model_args override its sizes
_POOLS: dict[Any, str] = {"gap": "avg", "tok": "token", "map": "map"}
# Tuples of theirs, ours, transform.
_Lines = tuple[tuple[str, tuple[str, ...], Transform], ...]


def _dense(theirs: str, *ours: str) -> _Lines:
  """Return the map of a dense layer; our layers are concatenated along the output axis."""
  return (
    (f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), TRANSPOSE),
    (f"{theirs}.bias", tuple(f"{path}/bias" for path in ours), SAME),
  )


def _norm(theirs: str, ours: str) -> _Lines:
  return (
    (f"{theirs}.weight", (f"{ours}/scale",), SAME),
    (f"{theirs}.bias", (f"{ours}/bias",), SAME),
  )


_BLOCK: _Lines = (
  *_norm("norm1", "norm1"),
  *_dense("attn.qkv", "attn/query", "attn/key", "attn/value"),
  *_dense("attn.proj", "attn/out"),
  *_norm("norm2", "norm2"),
  *_dense("mlp.fc1", "mlp/up"),
  *_dense("mlp.fc2", "mlp/down"),
)
_MAP_POOL: _Lines = (
  ("latent", ("probe",), LEAD_1_1),
  *_dense("q", "attn/query"),
  *_dense("kv", "attn/key", "attn/value"),
  *_dense("proj", "attn/out"),
  *_norm("norm", "norm"),
  *_dense("mlp.fc1", "mlp/up"),
  *_dense("mlp.fc2", "mlp/down"),
)
_RANKS = {
  "cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2,
}  # fmt: skip  # ranks of tensors that determine sizes; 1 for others
# Arguments of VisionTransformer with required values, and those that are read or have no effect.
_WANTED: dict[str, Any] = {
  "in_chans": 3,
  "qkv_bias": True,
  "qk_norm": False,
  "scale_attn_norm": False,
  "scale_mlp_norm": False,
  "proj_bias": True,
  "init_values": None,
  "class_token": True,
  "pos_embed": "learn",
  "no_embed_class": False,
  "reg_tokens": 0,
  "pre_norm": False,
  "final_norm": True,
}
_READ = {
  "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool",
  "num_classes", "fc_norm", "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad",
  "strict_img_size", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
  "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init",
}  # fmt: skip


def name_map(config: Config) -> NameMap:
  """Return the name map of the image tower of `config`."""
  alone = isinstance(config, ov_models.ViTConfig)
  lines = list(_tower(encoder_of(config), "" if alone else "encoder/"))
  dropped: tuple[str, ...] = ()
  if isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None:
    bias = np.zeros(config.embed_dim, np.float32)
    lines.append(Entry("head.weight", ("image_head/kernel",), TRANSPOSE))
    lines.append(Fixed("head.bias", bias, "the projection into the shared space has no bias"))
    dropped = ("text/", "text_head/", "log_scale", "bias")
  if not alone:
    dropped = (*dropped, "decoder/")
  return NameMap(
    "timm",
    entries=tuple(line for line in lines if isinstance(line, Entry)),
    fixed=tuple(line for line in lines if isinstance(line, Fixed)),
    dropped=tuple(Dropped(path, "timm supports only the image tower") for path in dropped),
  )


def check(release: Release) -> None:
  """Raise ValueError for a model without an image tower, or with options that timm lacks."""
  encoder = encoder_of(release.config)
  if (found := option_problems(encoder)) and timm_families.of_config(encoder) is None:
    nearest = timm_families.nearest_problems(encoder)
    raise ValueError(f"timm has no architecture for {', '.join(found)}: {nearest}.")


def write(folder: pathlib.Path, release: Release) -> None:
  """Write config.json and model.safetensors.

  Raises:
    ValueError: see `check`.
  """
  check(release)
  folder.mkdir(parents=True, exist_ok=True)
  if option_problems(release.encoder) and (tower := timm_families.of_config(release.encoder)):
    flat, arguments = timm_families.write(release, tower)
    write_weights(folder / WEIGHTS_FILE, flat, release.dtype, ())
    classes = flat["head.weight"].shape[0] if "head.weight" in flat else 0
    write_json(folder / CONFIG_FILE, _config(release, classes, tower.base, arguments))
    return
  names = name_map(release.config)
  flat = names.to_theirs(release.params, release.config)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, names.fixed)
  classes = flat["head.weight"].shape[0] if "head.weight" in flat else 0
  write_json(
    folder / CONFIG_FILE, _config(release, classes, _ARCHITECTURE, _arguments(release.encoder))
  )


def read(folder: str | os.PathLike[str], python: str | os.PathLike[str] | None = None) -> Imported:
  """Read a timm folder with a compatible ViT.

  Args:
    folder: directory with config.json, and model.safetensors or pytorch_model.bin.
    python: interpreter with PyTorch for pytorch_model.bin; see `reading.read_tensors`.

  Returns:
    The image tower. Notes list what was changed or omitted, such as a head or a patch bias.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the model is incompatible; lists all differing fields or tensors.
  """
  root = pathlib.Path(folder)
  content = reading.read_json(root / CONFIG_FILE)
  if "architecture" not in content:
    raise ValueError(f"{root / CONFIG_FILE} names no architecture; expected a timm folder.")
  for name in ("model_args", "pretrained_cfg"):
    fields.section(content, name, f"{root / CONFIG_FILE}: ")
  flat = reading.read_tensors(root, _WEIGHTS_FILES, python)
  if (tower := timm_families.of_architecture(content["architecture"])) is not None:
    return timm_families.read_folder(root, content, flat, tower, _read_preprocess)
  if found := _mismatches(content, flat):
    raise ValueError(f"{root} is not a supported model:\n  " + "\n  ".join(found))
  notes = []
  if head := [name for name in flat if name.startswith("head.")]:
    notes.append(
      f"{', '.join(head)} not imported: the tower returns the pooled vector before its head"
    )
  flat = {name: tensor for name, tensor in flat.items() if name not in head}
  bias = flat.get("patch_embed.proj.bias", np.zeros(1, np.float32))
  if bias.any():
    # A patch bias is equivalent to an offset of the patch positions.
    if bias.shape != flat["pos_embed"].shape[-1:]:
      raise ValueError(
        f"{root}: patch_embed.proj.bias is {bias.shape}, but pos_embed {flat['pos_embed'].shape}"
      )
    flat["pos_embed"] = np.concatenate(
      [flat["pos_embed"][:, :1], flat["pos_embed"][:, 1:] + bias], 1
    )
    notes.append("patch_embed.proj.bias is added to the learned positions of the patches")
  flat["patch_embed.proj.bias"] = np.zeros_like(bias)
  config = _read_config(content, flat)
  preprocess, more = _read_preprocess(content, config.image_size)
  return Imported(config, name_map(config).to_ours(flat, config), preprocess, None, (*notes, *more))


def _tower(config: ov_models.ViTConfig, ours: str) -> Iterator[Entry | Fixed]:
  yield Entry("cls_token", (f"{ours}cls",), LEAD_1_1)
  yield vision.position("pos_embed", config, ours, LEAD_1)
  yield Entry("patch_embed.proj.weight", (f"{ours}patch_embed/kernel",), CONV)
  no_bias = np.zeros(config.width, np.float32)
  yield Fixed("patch_embed.proj.bias", no_bias, "patches have no bias")
  for layer in range(config.depth):
    for name, paths, transform in _BLOCK:
      blocks = tuple(f"{ours}blocks/{path}" for path in paths)
      yield Entry(f"blocks.{layer}.{name}", blocks, transform, layer)
  for name, paths, transform in _norm("fc_norm" if config.pool == "gap" else "norm", "norm"):
    yield Entry(name, tuple(f"{ours}{path}" for path in paths), transform)
  if config.pool == "map":
    for name, paths, transform in _MAP_POOL:
      yield Entry(f"attn_pool.{name}", tuple(f"{ours}pool/{path}" for path in paths), transform)


def _arguments(encoder: ov_models.ViTConfig) -> dict[str, Any]:
  """Return the arguments of a tower without options."""
  arguments: dict[str, Any] = {
    "img_size": encoder.image_size,
    "patch_size": encoder.patch_size,
    "embed_dim": encoder.width,
    "depth": encoder.depth,
    "num_heads": encoder.num_heads,
    "mlp_ratio": vision.mlp_ratio(encoder.width, encoder.mlp_dim),
    "global_pool": _POOLS[encoder.pool],
  }
  if encoder.pool == "map":
    arguments["pool_include_prefix"] = True
  return arguments


def _config(
  release: Release, classes: int, architecture: str, arguments: dict[str, Any]
) -> dict[str, Any]:
  """Return the content of config.json."""
  encoder, preprocess = release.encoder, release.preprocess
  # num_classes must not be in model_args, because transformers would pass it twice.
  return {
    "architecture": architecture,
    "num_classes": classes,
    "num_features": encoder.width,
    "global_pool": arguments["global_pool"],
    "model_args": arguments,
    "pretrained_cfg": {
      "input_size": [3, encoder.image_size, encoder.image_size],
      "fixed_input_size": True,
      "interpolation": preprocess.interpolation,
      "crop_pct": 1.0,
      "crop_mode": preprocess.fit,
      "mean": list(preprocess.mean),
      "std": list(preprocess.std),
      "num_classes": classes,
      "pool_size": None,
      "first_conv": "patch_embed.proj",
      "classifier": "head",
    },
  }


def _pool(content: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> str:
  """Return global_pool from the config, or inferred from the tensors."""
  named = (content.get("model_args") or {}).get("global_pool") or content.get("global_pool")
  if named is not None:
    return named if isinstance(named, str) and len(named) < 20 else fields.shown(named)
  if any(name.startswith("attn_pool.") for name in flat):
    return "map"
  return "avg" if "fc_norm.weight" in flat else "token"


def _mismatches(content: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> list[str]:
  """Return messages for all incompatible fields and tensors."""
  found = []
  name, arguments = content["architecture"], content.get("model_args") or {}
  if not re.fullmatch(r"vit_[a-z0-9]+_patch\d+_\d+", str(name)):
    found.append(
      f"architecture={fields.shown(name)} (must be plain: vit_<size>_patch<patch>_<pixels>)"
    )
  found += vision.field_mismatches(arguments, _WANTED, _READ, "model_args.")
  if (pool := _pool(content, flat)) not in _POOLS.values():
    found.append(f"global_pool={pool!r} (must be {', '.join(_POOLS.values())})")
  elif (with_cls := arguments.get("pool_include_prefix", False)) != (pool == "map"):
    if pool != "token":  # for which the field has no effect
      found.append(f"model_args.pool_include_prefix={with_cls!r} (must be {pool == 'map'})")
  norm = "fc_norm" if pool == "avg" else "norm"
  for tensor, means in (
    ("cls_token", "no class token"),
    ("pos_embed", "no table of positions"),
    ("blocks.0.attn.qkv.bias", "no bias of queries, keys and values"),
    ("patch_embed.proj.weight", "no patches"),
    ("blocks.0.mlp.fc1.weight", "no blocks"),
    (f"{norm}.weight", f"global_pool={pool!r} without its norm"),
  ):
    if tensor not in flat:
      found.append(f"no tensor {tensor} ({means})")
    elif flat[tensor].ndim != _RANKS.get(tensor, 1) or not flat[tensor].size:
      found.append(
        f"tensor {tensor} is {flat[tensor].shape} (must have {_RANKS.get(tensor, 1)} axes)"
      )
  for part, means in (
    ("norm_pre.", "a norm before the blocks, as in CLIP"),
    ("reg_token", "register tokens"),
    ("ls1.gamma", "layer scale, as in DINOv2"),
    ("q_norm.", "norms of queries and keys"),
  ):
    if matching := sorted(tensor for tensor in flat if part in tensor):
      found.append(f"tensor {matching[0]} ({means})")
  if not found and _num_heads(content, flat) is None:
    found.append("model_args.num_heads is missing, and the sizes do not match a published ViT")
  return found


def _sizes(flat: Mapping[str, np.ndarray]) -> tuple[int, int, int]:
  """Return width, depth and MLP width."""
  layers = {int(found[1]) for name in flat if (found := re.match(r"blocks\.(\d+)\.", name))}
  width = flat["cls_token"].shape[-1]
  return width, len(layers), flat["blocks.0.mlp.fc1.weight"].shape[0]


def _num_heads(content: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> int | None:
  """Return the number of heads from the config, or of the published ViT of these sizes."""
  arguments = content.get("model_args") or {}
  if arguments.get("num_heads") is not None:
    return fields.integer(arguments, "num_heads", None, fields.MAX_WIDTH, "model_args.")
  known = {tuple(sizes): heads for *sizes, heads in ov_models.VIT_VARIANTS.values()}
  return known.get(_sizes(flat))


def _read_config(content: Mapping[str, Any], flat: Flat) -> ov_models.ViTConfig:
  width, depth, mlp_dim = _sizes(flat)
  patch = flat["patch_embed.proj.weight"].shape[-1]
  rows = flat["pos_embed"].shape[1]
  size = _image_size(content)
  grid = round((rows - 1) ** 0.5)
  image_size = size if size // patch == grid else grid * patch
  return ov_models.ViTConfig(
    width=width,
    depth=depth,
    mlp_dim=mlp_dim,
    num_heads=_num_heads(content, flat) or 1,
    patch_size=patch,
    image_size=image_size,
    position=vision.kind_of_positions(flat["pos_embed"][0], image_size, patch),
    pool={theirs: ours for ours, theirs in _POOLS.items()}[_pool(content, flat)],
  )


def _image_size(content: Mapping[str, Any]) -> int:
  """Return the image width stated in config.json."""
  settings = content.get("pretrained_cfg") or content
  size = (content.get("model_args") or {}).get("img_size") or settings.get("input_size") or 224
  if isinstance(size, list) and size:
    size = size[-1]
  return fields.integer({"image size": size}, "image size", None, fields.MAX_SIDE, "config.json: ")


def _read_preprocess(content: Mapping[str, Any], size: int) -> tuple[Preprocess, list[str]]:
  """Return preprocessing and notes on differences; defaults are those of timm."""
  given = content.get("pretrained_cfg") or content
  notes = []
  kind = given.get("interpolation") or "bicubic"
  if kind not in ("bilinear", "bicubic"):
    notes.append(f"preprocessing: interpolation={fields.shown(kind)}; OpenVision uses 'bilinear'")
  if (crop := given.get("crop_pct") or 0.875) != 1.0:
    notes.append(f"preprocessing: crop_pct={fields.shown(crop)}; OpenVision uses 1.0")
  mode = given.get("crop_mode") or "center"
  if mode not in ("center", "squash"):
    notes.append(f"preprocessing: crop_mode={fields.shown(mode)}; OpenVision uses 'center'")
  default = Preprocess(size)
  values = {
    name: fields.channel_values(given, name, getattr(default, name), "pretrained_cfg.")
    for name in ("mean", "std")
  }
  fit: Fit = "squash" if mode == "squash" else "center"
  return Preprocess(size, fit, values["mean"], values["std"], filter_of(kind)), notes
