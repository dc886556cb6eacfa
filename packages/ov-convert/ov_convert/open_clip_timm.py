"""open_clip models whose image tower is one of timm: SigLIP, SigLIP 2 and PE-Core.

The library creates the tower from the name of a published architecture, so only towers of published
sizes can be written.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

from ov_convert import fields, open_clip_config, open_clip_text, timm_families
from ov_convert.name_map import TRANSPOSE, Dropped, Entry, Flat, NameMap, Params
from ov_convert.release import Release
import ov_models

_TRUNK = "visual.trunk."
_HEAD = ("head.weight", "head.bias")
# Published architectures by prefix: (width, depth, patch size): middle of the name; image sizes.
_PUBLISHED: dict[str, dict[tuple[int, int, int], tuple[str, tuple[int, ...]]]] = {
  "vit_pe_core_": {
    (192, 12, 16): ("tiny_patch16_", (384,)),
    (384, 12, 16): ("small_patch16_", (384,)),
    (768, 12, 16): ("base_patch16_", (224,)),
    (1024, 24, 14): ("large_patch14_", (336,)),
    (1536, 50, 14): ("gigantic_patch14_", (448,)),
  },
  "vit_": {
    (768, 12, 32): ("base_patch32_siglip_", (256,)),
    (768, 12, 16): ("base_patch16_siglip_", (224, 256, 384, 512)),
    (1024, 24, 16): ("large_patch16_siglip_", (256, 384, 512)),
    (1152, 27, 14): ("so400m_patch14_siglip_", (224, 378, 384)),
    (1152, 27, 16): ("so400m_patch16_siglip_", (256, 384, 512)),
    (1536, 40, 16): ("giantopt_patch16_siglip_", (256, 384)),
  },
}


def applies(model: Mapping[str, Any]) -> bool:
  """Return whether the image tower of a model_cfg is one of timm."""
  vision = model.get("vision_cfg")
  return isinstance(vision, Mapping) and vision.get("timm_model_name") is not None


def architecture(config: ov_models.ViTConfig) -> str | None:
  """Return the published architecture of a config, or None."""
  tower = timm_families.of_config(config)
  if tower is None:
    return None
  prefix = "vit_pe_core_" if "pe_core" in tower.base else "vit_" if "siglip" in tower.base else ""
  sizes = (config.width, config.depth, config.patch_size)
  middle, sides = _PUBLISHED.get(prefix, {}).get(sizes, ("", ()))
  name = f"{prefix}{middle}{config.image_size}"
  named = timm_families.of_architecture(name) if config.image_size in sides else None
  if named is None or config.num_heads != named.heads.get(sizes[:2]):
    return None
  # The library sets no arguments, so the activation must be that of the architecture.
  activation = named.family.problems(config)
  default = next((f.default for f in named.family.sections[0].fields if f.theirs == "act_layer"), 0)
  return None if activation or (default and default != config.activation) else name


def problems(release: Release) -> list[str] | None:
  """Return what the library does not support; None if the tower is not a published one of timm."""
  config = release.config
  if not isinstance(config, ov_models.VisionLanguageConfig) or config.text is None:
    return None
  if architecture(config.encoder) is None:
    return None
  found = []
  text = config.text
  if text.pool not in ("last", "argmax") or text.padding != "attend":
    found.append(f"text.pool={text.pool!r}, text.padding={text.padding!r}")
  if config.decoder is not None:
    found.append("decoder: open_clip has no caption decoder of this kind")
  return found


def read(
  where: str, model: Mapping[str, Any], flat: Flat
) -> tuple[ov_models.VisionLanguageConfig, Params, list[str]]:
  """Return config, parameters and notes of a model of two towers.

  Args:
    where: file of the configuration, for messages.
    model: model_cfg.
    flat: tensors by name.

  Raises:
    ValueError: if a field or a tensor has no counterpart; names all of them.
  """
  vision = model["vision_cfg"]
  name = vision["timm_model_name"]
  tower = timm_families.of_architecture(name)
  found = [] if tower else [f"vision_cfg.timm_model_name={fields.shown(name)} (unknown)"]
  proj = vision.get("timm_proj", "linear")
  if proj not in (None, "", "none"):
    found.append(f"vision_cfg.timm_proj={fields.shown(proj)} (supported: null or 'none')")
  found += open_clip_config.text_mismatches(model)
  if found or tower is None:
    raise ValueError(f"{where} is not a supported model: {'; '.join(found)}.")
  trunk = {n.removeprefix(_TRUNK): t for n, t in flat.items() if n.startswith(_TRUNK)}
  head = {n: trunk.pop(n) for n in _HEAD if n in trunk}
  content = {"architecture": name, "global_pool": vision.get("timm_pool", "avg")}
  encoder, params, notes = timm_families.read(where, content, trunk, tower)
  text = open_clip_config.read_text(model)
  sizes = {"width": text.width, "vocab_size": text.vocab_size}
  fields.check_against_weights(flat, text.depth, sizes, f"{where}: text_cfg")
  config = ov_models.VisionLanguageConfig(
    encoder=encoder,
    text=text,
    embed_dim=fields.integer(model, "embed_dim", None, fields.MAX_WIDTH, where),
    image_head=proj != "none",
    text_head_bias=bool(model["text_cfg"].get("proj_bias", False)),
    bias_init=0.0 if "logit_bias" in flat else None,
  )
  rest = {n: tensor for n, tensor in flat.items() if not n.startswith(_TRUNK)}
  if config.image_head:
    bias = head.get("head.bias", np.zeros(1))
    if "head.weight" not in head or np.any(bias):
      raise ValueError(f"{where}: visual.trunk.head needs a weight, and a bias of zeros.")
    rest["head.weight"] = head["head.weight"]
  return config, {"encoder": params, **name_map(config).to_ours(rest, config)}, notes


def write(release: Release) -> tuple[Flat, dict[str, Any]]:
  """Return tensors and vision_cfg of a release without `problems`."""
  config = release.config
  assert isinstance(config, ov_models.VisionLanguageConfig)
  alone = dataclasses.replace(release, config=config.encoder, params=release.image_params)
  tower = timm_families.of_config(config.encoder)
  assert tower is not None
  flat, _ = timm_families.write(alone, tower)
  found = {f"{_TRUNK}{name}": tensor for name, tensor in flat.items()}
  rest = name_map(config).to_theirs(release.params, config)
  if config.image_head:
    found[f"{_TRUNK}head.weight"] = rest.pop("head.weight")
    found[f"{_TRUNK}head.bias"] = np.zeros(config.embed_dim, np.float32)
  vision = {
    "image_size": config.encoder.image_size,
    "timm_model_name": architecture(config.encoder),
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": None if config.image_head else "none",
  }
  return found | rest, vision


def name_map(config: ov_models.VisionLanguageConfig) -> NameMap:
  """Return the name map of the text tower and the heads."""
  return NameMap("open_clip", tuple(_text(config)), (), (Dropped("encoder/", "in visual.trunk"),))


def _text(config: ov_models.VisionLanguageConfig) -> Iterator[Entry]:
  assert config.text is not None
  for entry in open_clip_text.entries(config.text):
    if entry.theirs != "text_projection" or not config.text_head_bias:
      yield dataclasses.replace(entry, theirs=f"text.{entry.theirs}")
  if config.text_head_bias:
    yield Entry("text.text_projection.weight", ("text_head/kernel",), TRANSPOSE)
    yield Entry("text.text_projection.bias", ("text_head/bias",))
  if config.image_head:
    yield Entry("head.weight", ("image_head/kernel",), TRANSPOSE)
  yield Entry("logit_scale", ("log_scale",))
  if config.bias_init is not None:
    yield Entry("logit_bias", ("bias",))
