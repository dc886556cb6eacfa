"""The demo's data: drawn scenes, written as record shards into the workdir."""

import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from ov_data import scenes, writer

from apps.trainer.errors import user_errors
from apps.trainer.progress import Terminal


def prepare(config: ConfigDict, workdir: Path, terminal: Terminal) -> None:
  """Makes the workdir and, where `config.input.demo` asks for it, data; points `config` at them.

  Raises:
    UserError: the workdir cannot be written, or holds demo data of other settings.
  """
  with user_errors():
    workdir.mkdir(parents=True, exist_ok=True)
    if not config.input.demo.train_examples:
      return
    folder = workdir / "data"
    if jax.process_index() == 0:
      _make(config, folder, terminal)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("demo data written")
  config.input.data_dir = str(folder / "train")
  config.input.eval_data_dir = str(folder / "heldout")
  config.eval.truth_key = "truth"
  config.eval.zero_shot_dir = str(folder / "zero_shot")
  config.eval.zero_shot_classes = str(folder / "classes.json")


def _make(config: ConfigDict, folder: Path, terminal: Terminal) -> None:
  raise NotImplementedError
