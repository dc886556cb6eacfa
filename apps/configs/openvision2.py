"""OpenVision 2: caption-only training of a ViT, arXiv 2509.01644.

  --config=apps/configs/openvision2.py:img=L/14,txt_decoder_name=L,res=224,batch_factor=1

The argument names are those of the released code. Schedules are counted in ImageNet epochs
(1,281,167 images) for any data set, and the learning rate is given per 256 examples.
"""

from ml_collections import ConfigDict

from apps.configs import one_stage, published
from apps.configs.arguments import parse_arguments
from apps.configs.base import caption_config

DEFAULTS = one_stage.ARGUMENTS | {
  "token_len": 128,
  "txt_key": "llava_llama3_condition_True_dense_weighted_topk",
  "keep_ratio": 0.35,
  "preset": "default",  # openvision2_released: mask, order and positions of the released code
}
PUBLISHED = published.names("openvision2")


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration of one stage; see the recipes in apps/configs/README.md."""
  return resolve(parse_arguments(arg, DEFAULTS, **PUBLISHED))


def resolve(a: ConfigDict) -> ConfigDict:
  """Return the configuration for arguments with the keys of DEFAULTS.

  Raises:
    ValueError: a value of the released code has no counterpart here.
  """
  config = caption_config()
  one_stage.set_stage(config, a)
  config.model.keep_ratio = a.keep_ratio
  config.loss.caption = 2.0
  config.input.caption_keys = tuple(a.txt_key.split("+"))
  return config
