"""OpenVision 2 curriculum: all stages in one run of caption_train, arXiv 2509.01644.

  --config=apps/configs/openvision2_curriculum.py:model=H/14,res=84+224+448,vocab_path=/data/vocab.txt

The stages at 84 and 224 px are those of the published script. The published models at 336, 384 and
448 px come without the settings of their last stage; those of OpenVision are used.
"""

from ml_collections import ConfigDict

from apps.configs import openvision2
from apps.configs.curriculum import Family, make_curriculum

# The decoder has the variant of the encoder. The released code has no decoder variants So400m and
# g: the size of So400m matches the published FLOPs to 1%, as for L; g is that of OpenVision.
FAMILY = Family(
  openvision2.resolve,
  openvision2.DEFAULTS,
  openvision2.PUBLISHED,
  ("txt_decoder_name",),
  {
    "L/14": (84, 224, 336),
    "So400m/14": (84, 224, 384),
    "H/14": (84, 224, 336),  # also 448, fine-tuned from 224
    "g/14": (84, 224),
  },
)


def get_config(arg: str | None = None, model: str = "") -> ConfigDict:
  """Return all stages of one model; the files named after a model pass `model`."""
  return make_curriculum(FAMILY, arg, model)
