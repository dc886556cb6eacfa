"""Record shards of the demo scenes."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import os
from typing import cast

from apps.demo import scenes
from ov_data.writer import Features, Summary, write_dataset

_SCENES_IN_SHARD = 2500  # about 6 MB at 64 px
_MAX_SCENES = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class _Scenes:
  sizes: dict[str, int]  # scenes of each split
  seed: int
  image_size: int
  num_objects: int | None
  label: scenes.ClassKind

  def __call__(self, split: str, number: int) -> Iterator[Features]:
    start = number * _SCENES_IN_SHARD
    for i in range(start, min(start + _SCENES_IN_SHARD, self.sizes[split])):
      scene = scenes.sample_scene(self.seed, i, cast(scenes.Split, split), self.num_objects)
      yield scenes.scene_example(scene, self.image_size, self.label)


def make_scenes_dataset(
  directory: str | os.PathLike[str],
  sizes: Mapping[str, int],
  *,
  seed: int = 0,
  image_size: int = 64,
  num_objects: int | None = None,
  label: scenes.ClassKind = "shape",
  workers: int | None = None,
  progress: Callable[[int], None] = lambda n: None,
  overwrite: bool = False,
) -> Summary:
  """Write the demo data set: scenes with jpg, txt, description, alt, truth.

  Args:
    directory: output directory; see `write_dataset`, also for workers, progress, overwrite.
    sizes: number of scenes per split, for instance {"train": 60_000, "heldout": 1_000}.
    seed: seed of all scenes.
    image_size: 32 to 256 px.
    num_objects: 1 or 2 for all scenes; None mixes them.
    label: kind of class in the feature `label`, if a scene has one; see `scenes.class_prompts`.

  Raises:
    ValueError: a split, class or size is invalid, there are no scenes, or the directory contains
      other data; see also `write_dataset`.
  """
  if (
    not sizes
    or not set(sizes) <= set(scenes.SPLITS)
    or not all(1 <= size <= _MAX_SCENES for size in sizes.values())
  ):
    raise ValueError(
      f"sizes={dict(sizes)}: expected 1 to {_MAX_SCENES:,} of {', '.join(scenes.SPLITS)}."
    )
  for split in sizes:  # raise errors here instead of in a worker
    scene = scenes.sample_scene(seed, 0, cast(scenes.Split, split), num_objects)
    scenes.scene_example(scene, image_size)
  scenes.class_prompts(label)
  job = _Scenes(dict(sizes), seed, image_size, num_objects, label)
  return write_dataset(
    directory,
    {split: -(-size // _SCENES_IN_SHARD) for split, size in sizes.items()},
    job,
    {"kind": "scenes", "version": 5, **dataclasses.asdict(job)},
    workers=workers,
    progress=progress,
    overwrite=overwrite,
  )
