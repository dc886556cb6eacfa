"""Demo of OpenVision 2: a small captioner on synthetic scenes, minutes on a laptop CPU.

  bazel run //apps:caption_train -- --config=apps/configs/caption_demo.py --workdir=/tmp/ov-demo

Held-out scenes combine colours and shapes that no training scene combines; generated captions are
scored per attribute.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.base import caption_config


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the demo configuration; `runlocal` shortens it to a one-minute smoke test."""
  a = parse_arguments(arg, {"runlocal": False})
  config = caption_config()
  config.batch_size = 64
  config.total_steps = 2800
  config.model.update(
    encoder="Ti/12",
    decoder="Ti",
    image_size=48,
    token_len=14,  # 13 positions: [bos], 11 words of the longest caption, [eos]
    vocab_size=0,  # size of the tokenizer
    keep_ratio=1.0,  # there are only 16 image tokens
  )
  config.model.encoder_options = ConfigDict(
    {"width": 128, "depth": 2, "mlp_dim": 512, "num_heads": 4, "scan": False}
  )
  config.model.decoder_options = ConfigDict(
    {"width": 128, "depth": 2, "mlp_dim": 512, "num_heads": 4, "scan": False}
  )
  config.tokenizer.train_kind = "words"
  config.input.update(fit="squash", color_jitter=False)  # keeps colours and positions
  config.input.demo.update(train_examples=60_000, image_size=48)
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.05, grad_clip_norm=1.0)
  config.optimizer.schedule.warmup_steps = 200
  config.checkpoint.every = 500
  config.eval.update(every=1000, batch_size=128, caption_examples=256)
  config.log_every = 25
  if a.runlocal:
    config.total_steps, config.optimizer.schedule.warmup_steps = 40, 4
    config.input.demo.update(train_examples=2_000, eval_examples=128, zero_shot_examples=16)
    config.eval.update(every=20, caption_examples=64)
    config.checkpoint.every = 10
    config.log_every = 5
  return config
