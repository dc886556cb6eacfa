"""Published behavior of whole models, as fields to set over the defaults of the configs.

The sizes of a model are a name per part ("L/14", "L", "L"); a preset is how its parts compute.
"""

from typing import Any, NamedTuple

# E of the published pairs, by the variant of the image tower; elsewhere the width of that tower.
EMBED_DIMS = {"Ti": 192, "S": 384, "B": 512, "L": 768, "So400m": 1152, "H": 1024, "g": 1024}


class Preset(NamedTuple):
  """Fields that a preset sets.

  Attributes:
    model: of VisionLanguageConfig.
    text: of TextConfig.
    decoder: of DecoderConfig; a decoder with learned queries has nothing to set.
  """

  model: dict[str, Any] = {}  # noqa: RUF012, never changed
  text: dict[str, Any] = {}  # noqa: RUF012
  decoder: dict[str, Any] = {}  # noqa: RUF012


PRESETS = {
  # Ours: padding is masked; kept image tokens stay in image order; the decoder has a prefix mask
  # and learned text positions.
  "default": Preset(),
  # As the released code computes https://arxiv.org/abs/2505.04601: padding takes part in attention.
  "openvision_released": Preset(text={"padding": "attend"}),
  # As the released code computes https://arxiv.org/abs/2509.01644: causal over image and text, kept
  # tokens in random order, no positions in the decoder.
  "openvision2_released": Preset(
    model={"keep_order": "random"}, decoder={"mask": "causal", "position": "none"}
  ),
  # The text tower of https://arxiv.org/abs/2103.00020: causal, pooled at the largest id.
  "clip": Preset(text={"mask": "causal", "padding": "attend", "pool": "argmax"}),
}
