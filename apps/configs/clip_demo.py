"""Demo of OpenVision: two small towers and a decoder on synthetic scenes, minutes on a laptop.

  bazel run //apps:clip_train -- --config=apps/configs/clip_demo.py --workdir=/tmp/ov-clip

`loss=` selects another objective: openvision, clip, siglip, coca, cappa.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.base import clip_config
from apps.configs.objectives import use_objective

_IMAGE = {"width": 128, "depth": 2, "mlp_dim": 512, "num_heads": 4, "scan": False}
_TEXT = _IMAGE | {"depth": 1}
_DECODER = {"width": 64, "depth": 1, "mlp_dim": 256, "num_heads": 2, "scan": False}


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the demo configuration; `runlocal` shortens it to a one-minute smoke test."""
  a = parse_arguments(arg, {"loss": "openvision", "runlocal": False})
  config = clip_config()
  config.batch_size = 64
  config.total_steps = 2300
  config.model.update(
    encoder="Ti/8",
    text="Ti",
    decoder="Ti",
    image_size=48,
    token_len=15,  # [bos], 11 words of the longest caption, [eos], padding, [CLS]
    caption_len=13,
    vocab_size=0,  # size of the tokenizer
    preset="openvision_released",  # padding is not masked, so open_clip computes the same
    embed_dim=128,
  )
  config.model.encoder_options = ConfigDict(_IMAGE)
  config.model.text_options = ConfigDict(_TEXT)
  config.model.decoder_options = ConfigDict(_DECODER)
  config.tokenizer.train_kind = "words"
  config.input.update(
    # The decoder reads the alt text and has to add what it lacks. Other losses use one text.
    alt_keys=("alt",) if a.loss == "openvision" else ("txt",),
    caption_keys=("txt",),
    fit="squash",
    color_jitter=False,  # keeps colours
  )
  use_objective(config, a.loss)
  config.eval.retrieval.caption_keys = ("txt",)
  config.input.demo.update(
    train_examples=60_000,
    zero_shot_examples=640,
    probe_examples=1_440,
    classes="colours",
    image_size=48,
  )
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.05, grad_clip_norm=1.0)
  config.optimizer.schedule.warmup_steps = 200
  config.checkpoint.every = 500
  config.eval.update(every=1150, batch_size=128)
  config.log_every = 25
  if a.runlocal:
    config.total_steps, config.optimizer.schedule.warmup_steps = 40, 4
    config.input.demo.update(
      train_examples=2_000, eval_examples=128, zero_shot_examples=64, probe_examples=480
    )
    config.eval.update(every=20)
    config.checkpoint.every = 10
    config.log_every = 5
  return config
