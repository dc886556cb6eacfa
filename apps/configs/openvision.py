"""OpenVision: contrastive and caption training of a ViT, arXiv 2505.04601.

  --config=apps/configs/openvision.py:img=L/14,txt_name=L,txt_decoder_name=L,res=224,batch_factor=1

The argument names are those of the released code. Schedules are counted in ImageNet epochs
(1,281,167 images) for any data set, and the learning rate is given per 256 examples.
"""

from ml_collections import ConfigDict

from apps.configs import one_stage, published
from apps.configs.arguments import parse_arguments
from apps.configs.base import clip_config
from apps.configs.objectives import use_objective

DEFAULTS = one_stage.ARGUMENTS | {
  "txt_name": "L/16",  # a patch size is accepted and ignored
  "loss": "openvision",  # new: openvision | clip | siglip | coca | cappa, see objectives.py
  "accumulate": 1,  # new: micro-batches; the contrastive gradient stays exact
  "token_len": 80,  # tokens per text of the text tower
  "output_token_len": 128,  # tokens per caption
  "txt_key1": "txt",  # the alt text
  "txt_key2": "llava_caption",  # the long caption
  "preset": "openvision_released",  # "default" masks text padding
  "use_sovit": False,  # embedding dimension of So400m, which So400m always has
  "img_head": True,
}
PUBLISHED = published.names("openvision")


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration of one stage; see the recipes in apps/configs/README.md."""
  return resolve(parse_arguments(arg, DEFAULTS, **PUBLISHED))


def resolve(a: ConfigDict) -> ConfigDict:
  """Return the configuration for arguments with the keys of DEFAULTS.

  Raises:
    ValueError: a value of the released code has no counterpart here.
  """
  config = clip_config()
  one_stage.set_stage(config, a)
  config.accumulate = a.accumulate
  config.model.update(text=a.txt_name.partition("/")[0], caption_len=a.output_token_len)
  if a.use_sovit:
    config.model.embed_dim = 1152
  config.input.update(
    alt_keys=tuple(a.txt_key1.split("+")), caption_keys=tuple(a.txt_key2.split("+"))
  )
  use_objective(config, a.loss)
  return config
