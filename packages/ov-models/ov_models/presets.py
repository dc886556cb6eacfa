"""Presets: config fields that reproduce the behavior of published models.

Variant names ("L/14", "L", "L") set the sizes of a model, presets its masks, pooling and positions.
"""

from typing import Any, NamedTuple

# E of the published models by image variant. Other variants use the width of the image tower.
EMBED_DIMS = {"Ti": 192, "S": 384, "B": 512, "L": 768, "So400m": 1152, "H": 1024, "g": 1024}


class Preset(NamedTuple):
  """Config fields that a preset sets.

  Attributes:
    model: fields of VisionLanguageConfig.
    text: fields of TextConfig.
    decoder: fields of DecoderConfig; presets do not affect QueryDecoderConfig.
  """

  model: dict[str, Any] = {}  # noqa: RUF012, never changed
  text: dict[str, Any] = {}  # noqa: RUF012
  decoder: dict[str, Any] = {}  # noqa: RUF012


PRESETS = {
  # Padding is masked, kept image tokens stay in image order, and the decoder has a prefix mask and
  # learned text positions.
  "default": Preset(),
  # Released code of https://arxiv.org/abs/2505.04601: padding is not masked.
  "openvision_released": Preset(text={"padding": "attend"}),
  # Released code of https://arxiv.org/abs/2509.01644: causal mask over image and text, kept tokens
  # in random order, no positions in the decoder.
  "openvision2_released": Preset(
    model={"keep_order": "random"}, decoder={"mask": "causal", "position": "none"}
  ),
  # Text tower of https://arxiv.org/abs/2103.00020: causal mask, pooled at the largest id.
  "clip": Preset(text={"mask": "causal", "padding": "attend", "pool": "argmax"}),
}
