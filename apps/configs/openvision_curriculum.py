"""OpenVision from the first stage to the last in one run, arXiv 2505.04601; for clip_train.

  --config=apps/configs/openvision_curriculum.py:model=B/8,vocab_path=/data/vocab.txt

Pixels, batches, rates and lengths are those of the published script and models; so is bfloat16.
"""

from ml_collections import ConfigDict

from apps.configs import openvision
from apps.configs.curriculum import Family, make_curriculum

_SMALL, _LARGE = (160, 224, 384), (84, 224, 336)
FAMILY = Family(
  openvision.resolve,
  {**openvision.DEFAULTS, "dtype": "bfloat16"},
  openvision.ALIASES,
  openvision.IGNORED,
  openvision.REFUSED,
  openvision.VALUES,
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
  """All stages of one model; `model` is given by the files that are named after one."""
  return make_curriculum(FAMILY, arg, model)
