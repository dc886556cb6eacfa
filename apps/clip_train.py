"""Trains OpenVision: two towers and a caption decoder; evaluates them, writes report.html.

  bazel run //apps:clip_train -- --config=apps/configs/clip_demo.py --workdir=/tmp/ov-clip
  ... --config=apps/configs/openvision.py:img=Ti/16,txt_name=Ti,txt_decoder_name=Ti,res=160
      --config.input.data_dir=/data/shards

The same command goes on where a stopped run ended. `--check` says what a run would be,
`--compile` compiles its train steps ahead; `--config.eval_only=True` evaluates its newest
checkpoint.
"""

import functools
from typing import TYPE_CHECKING

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before the imports that take time

from absl import flags

from apps import launch
from apps.trainer.errors import run_app

if TYPE_CHECKING:
  from apps.trainer.loop import App

flags.adopt_module_key_flags(launch)  # --help lists them

_BASE = "clip_config"  # of apps/configs/base.py


def main() -> None:
  launch.launch(_app, _BASE, "apps/configs/clip_demo.py or openvision.py")


def _app() -> "App":
  from apps.clip_task import ClipTask
  from apps.evaluators import make_evaluators
  from apps.trainer.loop import App

  return App(ClipTask.from_config, make_evaluators)


if __name__ == "__main__":
  run_app(main, explain=functools.partial(launch.explain_flags, _BASE))
