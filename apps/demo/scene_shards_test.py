"""Tests of the record shards of the demo scenes."""

import json
from pathlib import Path

import pytest

from apps.demo import scene_shards, scenes
import ov_data


def _read(path: Path, split: str) -> list[dict[str, ov_data.example.Feature]]:
  data = ov_data.Dataset(ov_data.Source(str(path), split))
  return [data.features(i) for i in range(len(data))]


def test_scenes_data_set(tmp_path: Path):
  sizes = {"train": 30, "heldout": 5, "val": 5}
  summary = scene_shards.make_scenes_dataset(tmp_path, sizes, seed=3, image_size=32, workers=0)
  assert summary.examples == sizes
  row = _read(tmp_path, "heldout")[4]
  scene = scenes.sample_scene(3, 4, "heldout")
  assert row["txt"] == [scene.caption.encode()]
  assert json.loads(row["truth"][0]) == scene.truth
  assert row["jpg"] == [scenes.scene_example(scene, 32)["jpg"]]


def test_single_object_scenes_have_labels(tmp_path: Path):
  scene_shards.make_scenes_dataset(
    tmp_path, {"heldout": 20}, image_size=32, num_objects=1, label="colour_shape", workers=0
  )
  prompts = scenes.class_prompts("colour_shape")
  for row in _read(tmp_path, "heldout"):
    [label], [caption] = row["label"], row["txt"]
    assert caption.decode() in prompts[label.decode()]


@pytest.mark.parametrize("sizes", [{}, {"train": 0}, {"train": 10**24}, {"test": 1}])
def test_invalid_sizes_fail_early(tmp_path: Path, sizes: dict[str, int]):
  with pytest.raises(ValueError, match=r"sizes=.*: expected 1 to 1,000,000,000 of train, heldout"):
    scene_shards.make_scenes_dataset(tmp_path / "out", sizes, workers=0)
  assert not (tmp_path / "out").exists()
