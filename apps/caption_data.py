"""The demo's data: drawn scenes, written as record shards into the workdir."""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any, Final

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from apps.trainer.errors import user_errors
from apps.trainer.progress import Terminal
from ov_data import scenes, writer

_LABEL: Final = "shape"  # what pictures of one object are classified by


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
  config.input.update(
    data_dir=str(folder), split="train", eval_data_dir=str(folder), eval_split="heldout"
  )
  config.eval.update(
    truth_key="truth",
    zero_shot_dir=str(folder / "zero_shot"),
    zero_shot_classes=str(folder / "classes.json"),
    zero_shot_label_key=_LABEL,
  )


def _make(config: ConfigDict, folder: Path, terminal: Terminal) -> None:
  """Scenes of both splits, pictures of one object to classify, and the classes' prompts."""
  demo = config.input.demo
  sizes = {"train": demo.train_examples, "heldout": demo.eval_examples}
  with terminal.count("drawing scenes", sum(sizes.values())) as advance:
    summary = writer.make_scenes_dataset(
      folder, sizes, seed=config.seed, image_size=demo.image_size, progress=advance
    )
  terminal.phase(str(summary))
  writer.write_dataset(
    folder / "zero_shot",
    {"heldout": 1},
    lambda split, number: _single_objects(config.seed, demo.zero_shot_examples, demo.image_size),
    {"kind": "single objects", "seed": config.seed, **demo.to_dict()},
    workers=0,
  )
  (folder / "classes.json").write_text(json.dumps(scenes.class_prompts(_LABEL), indent=1))


def _single_objects(seed: int, count: int, image_size: int) -> Iterator[dict[str, Any]]:
  for i in range(count):
    scene = scenes.sample_scene(seed, i, "heldout", num_objects=1)
    yield {**scenes.scene_example(scene, image_size), _LABEL: scene.objects[0].shape}
