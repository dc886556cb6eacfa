"""Batches on disk that both sides read: drawn scenes with captions and labels."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from apps.demo import scenes
import ov_data

IMAGE_SIZE, TEXT_LEN, CAPTION_LEN = 32, 15, 13
MOST_ROWS = 500 * 32  # of all steps of a training
TRAIN, HELD_OUT = 4096, 512


@dataclasses.dataclass(frozen=True)
class Batches:
  """Arrays of a folder written by `write`; PyTorch reads the same files.

  Attributes:
    folder: folder of the .npy files.
  """

  folder: Path

  def array(self, name: str) -> np.ndarray:
    """Return an array: image, text, caption, label, each also as held_out_NAME, or rows."""
    return _load(self.folder / f"{name}.npy")

  def rows(self, step: int, size: int, order: int) -> np.ndarray:
    """Return the examples int [size] of a step. Orders differ in the permutation within a step."""
    return permuted(self.array("rows")[step * size : (step + 1) * size], step, order)

  def tokenizer(self) -> ov_data.Tokenizer:
    """Return the tokenizer of the captions."""
    return ov_data.Tokenizer.load(self.folder / "tokenizer")


def permuted(rows: np.ndarray, step: int, order: int) -> np.ndarray:
  """Return the rows of a step in summation order `order`; order 0 is the original one."""
  if order == 0:
    return rows
  return rows[np.random.default_rng([order, step]).permutation(len(rows))]


def write(folder: Path) -> Batches:
  """Draw the scenes unless the folder is complete; the same scenes on every machine."""
  done = folder / "complete.json"
  if not done.exists():
    folder.mkdir(parents=True, exist_ok=True)
    train = [scenes.sample_scene(0, i, "train") for i in range(TRAIN)]
    held_out = [scenes.sample_scene(0, i, "val", num_objects=2) for i in range(HELD_OUT)]
    tokenizer = ov_data.Tokenizer.train([s.caption for s in train], 4096, kind="words")
    tokenizer.save(folder / "tokenizer")
    for prefix, some in (("", train), ("held_out_", held_out)):
      for name, array in _arrays(some, tokenizer).items():
        np.save(folder / f"{prefix}{name}.npy", array)
    rng = np.random.default_rng(0)
    epochs = -(-MOST_ROWS // TRAIN)
    np.save(folder / "rows.npy", np.concatenate([rng.permutation(TRAIN) for _ in range(epochs)]))
    done.write_text(json.dumps({"train": TRAIN, "held_out": HELD_OUT}), "utf-8")
  return Batches(folder)


def _arrays(some: list[scenes.Scene], tokenizer: ov_data.Tokenizer) -> dict[str, np.ndarray]:
  """Return images, texts that end with [CLS], captions without it, and the first colour."""
  captions = [scene.caption for scene in some]
  return {
    "image": np.stack([np.asarray(scene.draw(IMAGE_SIZE)) for scene in some]),
    "text": tokenizer.encode_batch(captions, TEXT_LEN, True)[0],
    "caption": tokenizer.encode_batch(captions, CAPTION_LEN, False)[0],
    "label": np.array([scenes.COLOURS.index(s.objects[0].colour) for s in some], np.int32),
  }


@functools.lru_cache(maxsize=64)
def _load(path: Path) -> np.ndarray:
  return np.load(path, allow_pickle=False)
