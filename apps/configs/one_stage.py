"""Arguments of one stage that openvision.py and openvision2.py share, and their settings."""

import os

from ml_collections import ConfigDict

from apps.configs.arguments import check_published
from apps.trainer.schedules import (
  batch_size_from_factor,
  scaled_learning_rate,
  virtual_epoch_steps,
)

ARGUMENTS = {
  "res": 112,  # pixels
  "img": "L/16",
  "txt_decoder_name": "L",
  "batch_factor": 2.0,  # batch = 16,384 * batch_factor
  "batch_size": 0,  # new: sets the batch size directly; the learning rate follows
  "base_lr": 8e-6,  # per 256 examples
  "imagenet_epoch": 2000.0,
  "virtual_warmup_epoch": 20.0,
  "vocab_size": 32000,
  "vocab_path": "",
  "mask_ratio": 0.0,
  "dtype": "float32",
  "remat": "full",
  "color_jitter": True,
  "data_parallelism": -1,
  "fsdp_parallelism": 1,
  "tensor_parallelism": 1,
  "init": "",  # workdir or checkpoint of the initial parameters
  "use_openclip_tokenizer": False,
  "runlocal": False,  # smoke test: one step on little data
}


def set_stage(config: ConfigDict, a: ConfigDict) -> None:
  """Set what the shared arguments, `preset` and `token_len` determine.

  Args:
    config: defaults of an app, which are changed.
    a: arguments of the recipe.

  Raises:
    ValueError: a value of the released code has no counterpart here.
  """
  check_published(a)
  config.batch_size = a.batch_size or batch_size_from_factor(a.batch_factor)
  config.total_steps = virtual_epoch_steps(a.imagenet_epoch, config.batch_size)
  config.model.update(
    encoder=a.img,
    decoder=a.txt_decoder_name,
    image_size=a.res,
    token_len=a.token_len,
    vocab_size=a.vocab_size,
    preset=a.preset,
    dtype=a.dtype,
    remat=a.remat,
  )
  if a.mask_ratio:
    config.model.encoder_options = ConfigDict({"mask_ratio": a.mask_ratio})
  config.optimizer.learning_rate = scaled_learning_rate(a.base_lr, config.batch_size)
  config.optimizer.schedule.warmup_steps = virtual_epoch_steps(
    a.virtual_warmup_epoch, config.batch_size
  )
  config.input.color_jitter = a.color_jitter
  config.tokenizer.path = os.path.expanduser(a.vocab_path)
  config.mesh.update(data=a.data_parallelism, fsdp=a.fsdp_parallelism, tensor=a.tensor_parallelism)
  config.init_from.path = a.init
  if a.runlocal:
    config.total_steps, config.optimizer.schedule.warmup_steps = 1, 0
