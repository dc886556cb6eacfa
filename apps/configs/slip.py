"""CLIP baselines of SLIP on public data sets, arXiv 2112.12750.

  bazel run //apps:clip_train -- --config=apps/configs/slip.py:data=cc3m,imagenet=/data/in1k
      --config.input.data_dir=/data/cc3m --workdir=/runs/cc3m_b16

The settings are those of the released code, facebookresearch/SLIP; docs/references.md has the
published numbers.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.clip_protocol import ARGUMENTS, clip_protocol

# Epochs, and the pairs of the published list, which are more than can still be downloaded.
DATA = {"cc3m": (40, 3_318_333), "cc12m": (35, 12_423_374), "yfcc15m": (25, 14_829_396)}
# Options of the image encoders; S/16 is that of MoCo v3.
_ENCODERS = {"B/16": {}, "S/16": {"num_heads": 12}}


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration of a data set and an encoder.

  Raises:
    ValueError: the data set or the encoder is unknown, or there are fewer pairs than a batch.
  """
  a = parse_arguments(arg, {"data": "cc3m", "img": "B/16", "pairs": 0, **ARGUMENTS})
  if a.data not in DATA:
    raise ValueError(f"data={a.data!r}: expected one of {', '.join(DATA)}")
  if a.img not in _ENCODERS:
    raise ValueError(f"img={a.img!r}: expected one of {', '.join(_ENCODERS)}")
  config = clip_protocol(a, a.img, {"patch_bias": True, **_ENCODERS[a.img]}, "quick_gelu")
  epochs, published = DATA[a.data]
  steps = (a.pairs or published) // config.batch_size  # of an epoch, which drops the rest
  if steps < 1:
    raise ValueError(f"pairs={a.pairs}: expected at least one batch of {config.batch_size:,}")
  config.total_steps = epochs * steps
  config.optimizer.schedule.update(warmup_steps=steps, min_multiplier=0.02)
  # Biases, norms and the temperature do not decay.
  config.optimizer.update(
    weight_decay=0.5, decay_regex=r"(^|/)(kernel|embedding|position_embedding|cls)$"
  )
  config.input.area_min = 0.5
  config.eval.zero_shot.templates = "openai_best"
  return config
