"""Trains a captioner (OpenVision 2), evaluates it on held-out pictures, writes report.html.

  bazel run //apps:caption_train -- --config=apps/configs/caption_demo.py --workdir=/tmp/ov-demo
  ... --config=apps/configs/openvision2.py:img=Ti/16,res=160 --config.input.data_dir=/data/shards

The same command goes on where a stopped run ended. `--check` says what a run would be.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from apps.trainer.errors import UserError, run_app, user_errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report.")
_CHECK = flags.DEFINE_bool("check", False, "Resolve everything, read one batch, and stop.")


def main() -> None:
  config = _CONFIG.value
  if config is None or not _WORKDIR.value:
    raise UserError("give --config=apps/configs/NAME.py and --workdir=DIRECTORY")
  with user_errors():
    config.lock()  # where the file could not be loaded, this says so
  if "://" in _WORKDIR.value:
    raise UserError(
      f"--workdir={_WORKDIR.value}: the workdir is local; checkpoints alone can go to a bucket: "
      "--config.checkpoint.dir=gs://..."
    )
  # Heavy imports wait until the flags are known to be right.
  import jax

  from apps import caption_data
  from apps.caption_eval import CaptionEvaluator
  from apps.caption_task import CaptionTask
  from apps.trainer.check import check_run
  from apps.trainer.loop import App, run_training
  from apps.trainer.progress import Terminal
  import ov_sharding

  workdir = Path(_WORKDIR.value).expanduser()
  ov_sharding.initialize()
  if config.compile_cache:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
  terminal = Terminal(active=jax.process_index() == 0)
  app = App(
    CaptionTask.from_config,
    lambda config, task, tokenizer, mesh: (
      CaptionEvaluator(config, task, tokenizer, mesh) if config.input.eval_data_dir else None
    ),
  )
  caption_data.prepare(config, workdir, terminal)
  (check_run if _CHECK.value else run_training)(config, workdir, app, terminal)


if __name__ == "__main__":
  run_app(main)
