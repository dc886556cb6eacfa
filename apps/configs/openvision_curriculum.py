"""OpenVision curriculum: all stages in one run of clip_train, arXiv 2505.04601.

  --config=apps/configs/openvision_curriculum.py:model=B/8,vocab_path=/data/vocab.txt

Image sizes, batch sizes, rates, lengths and bfloat16 are those of the published script and models.
"""

from ml_collections import ConfigDict

from apps.configs import openvision
from apps.configs.curriculum import Family, make_curriculum

_SMALL, _LARGE = (160, 224, 384), (84, 224, 336)
FAMILY = Family(
  openvision.resolve,
  {**openvision.DEFAULTS, "dtype": "bfloat16"},
  openvision.PUBLISHED,
  ("txt_name", "txt_decoder_name"),
  {
    "Ti/16": _SMALL,
    "Ti/8": _SMALL,
    "S/16": _SMALL,
    "S/8": _SMALL,
    "B/16": _SMALL,
    "B/8": _SMALL,
    "L/14": _LARGE,
    "So400m/14": (84, 224, 384),
    "H/14": (84, 224),
  },
)


def get_config(arg: str | None = None, model: str = "") -> ConfigDict:
  """Return all stages of one model; the files named after a model pass `model`."""
  return make_curriculum(FAMILY, arg, model)
