"""OpenVision: contrastive and caption training of a ViT, arXiv 2505.04601.

  --config=apps/configs/openvision.py:img=L/14,txt_name=L,txt_decoder_name=L,res=224,batch_factor=1

The argument names are those of the published code. Schedules are counted in epochs of ImageNet
(1,281,167 images) whatever the data, and the learning rate is given per 256 examples.
"""

import os

from ml_collections import ConfigDict

from apps.configs import published
from apps.configs.arguments import check_published, parse_arguments
from apps.configs.base import clip_config
from apps.configs.objectives import use_objective
from apps.trainer.schedules import (
  batch_size_from_factor,
  scaled_learning_rate,
  virtual_epoch_steps,
)

DEFAULTS = {
  "res": 112,  # pixels
  "img": "L/16",
  "txt_name": "L/16",  # a patch size is accepted and dropped
  "txt_decoder_name": "L",
  "loss": "openvision",  # our own: openvision | clip | siglip | coca | cappa, see objectives.py
  "batch_factor": 2.0,  # batch = 16,384 * batch_factor
  "batch_size": 0,  # our own: sets the batch directly; the learning rate follows it
  "accumulate": 1,  # our own: micro-batches; the contrastive gradient stays exact
  "base_lr": 8e-6,  # per 256 examples
  "imagenet_epoch": 2000.0,
  "virtual_warmup_epoch": 20.0,
  "token_len": 80,  # of the text tower
  "output_token_len": 128,  # of the caption
  "txt_key1": "txt",  # the alt text
  "txt_key2": "llava_caption",  # the long caption
  "vocab_size": 32000,
  "vocab_path": "",
  "mask_ratio": 0.0,
  "preset": "openvision_released",  # default: text padding is masked
  "dtype": "float32",
  "remat": "full",
  "color_jitter": True,
  "data_parallelism": -1,
  "fsdp_parallelism": 1,
  "tensor_parallelism": 1,
  "init": "",  # workdir or checkpoint whose params start this run
  "use_sovit": False,  # the shared space of So400m; So400m itself has it anyway
  "img_head": True,
  "use_openclip_tokenizer": False,
  "runlocal": False,  # one step on little data
}
ALIASES = published.arguments("openvision", "renamed")
IGNORED = published.arguments("openvision", "ignored")
REFUSED = published.arguments("openvision", "refused")
VALUES = {"remat": published.REMAT}


def get_config(arg: str | None = None) -> ConfigDict:
  """The configuration of one stage; see the scripts' recipes in apps/configs/README.md."""
  return resolve(
    parse_arguments(arg, DEFAULTS, aliases=ALIASES, ignored=IGNORED, refused=REFUSED, values=VALUES)
  )


def resolve(a: ConfigDict) -> ConfigDict:
  """The configuration that arguments with the keys of DEFAULTS stand for.

  Raises:
    ValueError: a value that the published code takes, and that has no counterpart here.
  """
  check_published(a)
  config = clip_config()
  config.batch_size = a.batch_size or batch_size_from_factor(a.batch_factor)
  config.accumulate = a.accumulate
  config.total_steps = virtual_epoch_steps(a.imagenet_epoch, config.batch_size)
  config.model.update(
    encoder=a.img,
    text=a.txt_name.partition("/")[0],
    decoder=a.txt_decoder_name,
    image_size=a.res,
    token_len=a.token_len,
    caption_len=a.output_token_len,
    vocab_size=a.vocab_size,
    preset=a.preset,
    dtype=a.dtype,
    remat=a.remat,
  )
  if a.use_sovit:
    config.model.embed_dim = 1152
  if a.mask_ratio:
    config.model.encoder_options = ConfigDict({"mask_ratio": a.mask_ratio})
  config.optimizer.learning_rate = scaled_learning_rate(a.base_lr, config.batch_size)
  config.optimizer.schedule.warmup_steps = virtual_epoch_steps(
    a.virtual_warmup_epoch, config.batch_size
  )
  config.input.update(
    alt_keys=tuple(a.txt_key1.split("+")),
    caption_keys=tuple(a.txt_key2.split("+")),
    color_jitter=a.color_jitter,
  )
  use_objective(config, a.loss)
  config.tokenizer.path = os.path.expanduser(a.vocab_path)
  config.mesh.update(data=a.data_parallelism, fsdp=a.fsdp_parallelism, tensor=a.tensor_parallelism)
  config.init_from.path = a.init
  if a.runlocal:
    config.total_steps, config.optimizer.schedule.warmup_steps = 1, 0
  return config
