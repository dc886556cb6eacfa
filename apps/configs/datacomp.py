"""DataComp, filtering track: a fixed CLIP recipe for any subset of a pool, arXiv 2304.14108.

  bazel run //apps:clip_train -- --config=apps/configs/datacomp.py:scale=small,imagenet=/data/in1k
      --config.input.data_dir=/data/commonpool_small --workdir=/runs/datacomp_small

The scales small and medium use ViT-B/32. The settings are those of the released code,
mlfoundations/datacomp and the defaults of open_clip; docs/references.md has the published numbers.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.clip_protocol import ARGUMENTS, clip_protocol

# Examples of a run, which equal the size of the pool.
SCALES = {"small": 12_800_000, "medium": 128_000_000}


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration of a scale.

  Raises:
    ValueError: the scale is unknown.
  """
  a = parse_arguments(arg, {"scale": "small", **ARGUMENTS})
  if a.scale not in SCALES:
    raise ValueError(f"scale={a.scale!r}: expected one of {', '.join(SCALES)}")
  config = clip_protocol(a, "B/32", {"pre_norm": True, "norm_eps": 1e-5}, "gelu")
  config.total_steps = SCALES[a.scale] // config.batch_size
  config.optimizer.schedule.warmup_steps = 500
  # Biases, norms, the temperature and the cls token do not decay.
  config.optimizer.update(
    eps=1e-6, weight_decay=0.2, decay_regex=r"(^|/)(kernel|embedding|position_embedding)$"
  )
  config.input.area_min = 0.9
  config.eval.zero_shot.templates = "openai_80"
  return config
