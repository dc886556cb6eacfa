"""OpenVision 2 from the first stage to the last in one run, arXiv 2509.01644; for caption_train.

  --config=apps/configs/openvision2_curriculum.py:model=H/14,res=84+224+448,vocab_path=/data/vocab.txt

The stages of 84 and 224 px are those of the published script. Models of 336, 384 and 448 px are
published without the settings of their last stage: these are ours, those of OpenVision.
"""

from ml_collections import ConfigDict

from apps.configs import openvision2
from apps.configs.curriculum import Family, make_curriculum

# The decoder has the name of the encoder. The published code has none called So400m or g: So400m is
# the size with which the published FLOPs agree to 1%, as they do for L; g is that of OpenVision.
FAMILY = Family(
  openvision2.resolve,
  openvision2.DEFAULTS,
  openvision2.ALIASES,
  openvision2.IGNORED,
  openvision2.REFUSED,
  openvision2.VALUES,
  ("txt_decoder_name",),
  {
    "L/14": (84, 224, 336),
    "So400m/14": (84, 224, 384),
    "H/14": (84, 224, 336),  # and, from 224 px too, one of 448
    "g/14": (84, 224),
  },
)


def get_config(arg: str | None = None, model: str = "") -> ConfigDict:
  """All stages of one model; `model` is given by the files that are named after one."""
  return make_curriculum(FAMILY, arg, model)
