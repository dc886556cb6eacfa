"""Two towers, or any other objective, on real icons with their names; minutes on a laptop.

  bazel run //tools/data:icons -- --output=/tmp/icons
  bazel run //apps:clip_train -- --workdir=/tmp/ov-icons \\
    --config=apps/configs/icons_clip.py:data=/tmp/icons

Evaluated on five sets of other designers: retrieval, in which every icon with a name is correct for
it, and naming among 200 common names. `loss=` selects another objective, see objectives.py.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.base import clip_config
from apps.configs.objectives import use_objective

HELD_OUT = "heldout/*.tfrecord"  # all held-out sets
ENCODER = {"width": 128, "depth": 4, "mlp_dim": 512, "num_heads": 4, "scan": False}
TEXT = {"width": 128, "depth": 2, "mlp_dim": 512, "num_heads": 4, "scan": False}
DECODER = TEXT


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration; `runlocal` shortens it to a smoke test."""
  a = parse_arguments(arg, {"data": "/tmp/icons", "loss": "clip", "runlocal": False})
  config = clip_config()
  config.model.update(text="Ti", embed_dim=128, token_len=12, caption_len=16, preset="default")
  config.model.text_options = ConfigDict(TEXT)
  # The decoder of OpenVision reads the name and adds the style; the others predict the name.
  config.input.alt_keys = ("txt",)
  config.input.caption_keys = ("description",) if a.loss == "openvision" else ("txt",)
  use_icons(config, a.data, a.runlocal)
  use_objective(config, a.loss)
  if a.loss == "openvision":
    config.input.sentence_positive = False
  config.loss.mask_duplicates = True  # sets share names
  return config


def use_icons(config: ConfigDict, data: str, runlocal: bool) -> None:
  """Set data, model size, optimizer and evaluation of the icon recipes."""
  config.batch_size = 256
  config.total_steps = 3600
  config.model.update(encoder="Ti/8", decoder="Ti", image_size=32, vocab_size=0)
  config.model.encoder_options = ConfigDict(ENCODER)
  config.model.decoder_options = ConfigDict(DECODER)
  config.tokenizer.train_vocab_size = 4096
  config.input.update(
    data_dir=f"{data}/train",
    split="train",
    fit="crop",
    area_min=0.6,
    color_jitter=False,  # colours are part of an icon
    eval_data_dir=f"{data}/{HELD_OUT}",
  )
  config.eval.retrieval.merge_equal_texts = True
  config.eval.zero_shot.update(
    dir=f"{data}/naming", split="naming", classes=f"{data}/names.json", label_key="label"
  )
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.1, grad_clip_norm=1.0)
  config.optimizer.schedule.warmup_steps = 200
  config.checkpoint.every = 500
  config.eval.update(batch_size=256, caption_examples=256)
  config.log_every = 50
  if runlocal:
    config.total_steps, config.optimizer.schedule.warmup_steps = 10, 2
    config.checkpoint.every = config.log_every = 5
    config.eval.update(examples=256, caption_examples=32)
    config.eval.retrieval.examples = config.eval.zero_shot.examples = 256
