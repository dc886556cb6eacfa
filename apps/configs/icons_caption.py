"""Captioner on real icons with their names, as in OpenVision 2; minutes on a laptop.

  bazel run //tools/data:icons -- --output=/tmp/icons
  bazel run //apps:caption_train -- --workdir=/tmp/ov-names \\
    --config=apps/configs/icons_caption.py:data=/tmp/icons

Names icons of five sets of other designers by the likelihood of 200 common names, and writes names.
"""

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.base import caption_config
from apps.configs.icons_clip import use_icons


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration; `runlocal` shortens it to a smoke test."""
  a = parse_arguments(arg, {"data": "/tmp/icons", "runlocal": False})
  config = caption_config()
  config.model.update(token_len=12, keep_ratio=0.5)
  use_icons(config, a.data, a.runlocal)
  return config
