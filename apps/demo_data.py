"""Data of the demo: drawn scenes, written as record shards into the workdir.

data            scenes of one or two objects; splits train and heldout
data/labelled   images with a class, of one object or two; splits train and heldout
data/classes.json   {class: [prompt, ...]} of those labels
"""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from apps.trainer.errors import user_errors
from apps.trainer.progress import Terminal
from apps.trainer.workdir import Workdir
from ov_data import fs, scenes, writer


def prepare(config: ConfigDict, workdir: Workdir, terminal: Terminal) -> None:
  """Create the workdir and, if `config.input.demo` sets examples, data; point `config` at them.

  Raises:
    UserError: the workdir cannot be written, or holds demo data of other settings.
  """
  with user_errors():
    workdir.path.mkdir(parents=True, exist_ok=True)
    if not config.input.demo.train_examples:
      return
    folder = workdir.path / "data"
    if jax.process_index() == 0 or not workdir.common:  # the same on every machine
      _make(config, folder, terminal)
    workdir.share("demo data written")
  config.input.update(
    data_dir=str(folder), split="train", eval_data_dir=str(folder), eval_split="heldout"
  )
  config.eval.truth_key = "truth"
  labelled = str(folder / "labelled")
  config.eval.zero_shot.update(
    dir=labelled, split="heldout", classes=str(folder / "classes.json"), label_key="label"
  )
  if config.input.demo.probe_examples:
    config.eval.features.update(
      train_dir=labelled, train_split="train", dir=labelled, split="heldout", label_key="label"
    )


def _make(config: ConfigDict, folder: Path, terminal: Terminal) -> None:
  """Write scenes of both splits, labelled images, and the prompts of their classes."""
  demo = config.input.demo
  sizes = {"train": demo.train_examples, "heldout": demo.eval_examples}
  with terminal.count("drawing scenes", sum(sizes.values())) as advance:
    summary = writer.make_scenes_dataset(
      folder, sizes, seed=config.seed, image_size=demo.image_size, progress=advance
    )
  terminal.phase(str(summary))
  sizes = {"heldout": demo.zero_shot_examples}
  if demo.probe_examples:
    sizes["train"] = demo.probe_examples
  writer.make_scenes_dataset(
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
