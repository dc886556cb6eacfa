"""Trains a captioner (OpenVision 2), evaluates it on held-out pictures, writes report.html.

  bazel run //apps:caption_train -- --config=apps/configs/caption_demo.py --workdir=/tmp/ov-demo
  ... --config=apps/configs/openvision2.py:img=Ti/16,res=160 --config.input.data_dir=/data/shards

The same command goes on where a stopped run ended. `--check` says what a run would be;
`--compile` compiles its train steps ahead.
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

_BASE = "caption_config"  # of apps/configs/base.py


def main() -> None:
  launch.launch(_app, _BASE, "apps/configs/caption_demo.py or openvision2.py")


def _app() -> "App":
  from apps.caption_task import CaptionTask
  from apps.evaluators import make_evaluators
  from apps.trainer.loop import App

  return App(CaptionTask.from_config, make_evaluators)


if __name__ == "__main__":
  run_app(main, explain=functools.partial(launch.explain_flags, _BASE))
