"""Demo data: synthetic scenes, written as record shards into the workdir.

data            scenes of one or two objects; splits train and heldout
data/labelled   images with a class, of one object or two; splits train and heldout
data/classes.json   {class: [prompt, ...]} of those labels
"""

import json
from pathlib import Path

import jax

from apps.demo import scene_shards, scenes
from apps.trainer.errors import user_errors
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.workdir import Workdir
from ov_data import fs


def prepare(config: RunConfig, workdir: Workdir, terminal: Terminal) -> RunConfig:
  """Create the workdir and, if `config.input.demo` sets examples, the data.

  Returns:
    The configuration with the paths of the data.

  Raises:
    UserError: the workdir cannot be written, or contains demo data with other settings.
  """
  with user_errors():
    workdir.path.mkdir(parents=True, exist_ok=True)
    if not config.input.demo.train_examples:
      return config
    folder = workdir.path / "data"
    if jax.process_index() == 0 or not workdir.is_shared:  # identical on every machine
      _make(config, folder, terminal)
    workdir.share("demo data written")
  labelled = str(folder / "labelled")
  settings = {
    "input.data_dir": str(folder),
    "input.split": "train",
    "input.eval_data_dir": str(folder),
    "input.eval_split": "heldout",
    "eval.truth_key": "truth",
    "eval.zero_shot.dir": labelled,
    "eval.zero_shot.split": "heldout",
    "eval.zero_shot.classes": str(folder / "classes.json"),
    "eval.zero_shot.label_key": "label",
  }
  if config.input.demo.probe_examples:
    settings |= {
      "eval.features.train_dir": labelled,
      "eval.features.train_split": "train",
      "eval.features.dir": labelled,
      "eval.features.split": "heldout",
      "eval.features.label_key": "label",
    }
  return config.with_settings(settings)


def _make(config: RunConfig, folder: Path, terminal: Terminal) -> None:
  """Write scenes of both splits, labeled images, and the prompts of their classes."""
  demo = config.input.demo
  sizes = {"train": demo.train_examples, "heldout": demo.eval_examples}
  with terminal.count("drawing scenes", sum(sizes.values())) as advance:
    summary = scene_shards.make_scenes_dataset(
      folder, sizes, seed=config.seed, image_size=demo.image_size, progress=advance
    )
  terminal.phase(str(summary))
  sizes = {"heldout": demo.zero_shot_examples}
  if demo.probe_examples:
    sizes["train"] = demo.probe_examples
  scene_shards.make_scenes_dataset(
    folder / "labelled",
    sizes,
    seed=config.seed,
    image_size=demo.image_size,
    num_objects=2 if demo.classes == "colours" else 1,
    label=demo.classes,
    workers=0,
  )
  prompts = json.dumps(scenes.class_prompts(demo.classes), indent=1)
  fs.write_atomic(str(folder / "classes.json"), prompts.encode())
