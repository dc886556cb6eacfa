"""Small drawn data sets in the layouts of CLIP_benchmark.

The tars contain lossless images, so that the decoders of both sides give the same pixels.
"""

from collections.abc import Mapping, Sequence
import io
import json
from pathlib import Path
import tarfile
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SHAPES = ("circle", "square", "triangle")
TASKS = {
  "classification": "zeroshot_classification",
  "retrieval": "zeroshot_retrieval",
  "selection": "image_caption_selection",
}


def write_all(root: Path, size: int, seed: int = 0) -> list[dict[str, str]]:
  """Write every data set, and list.json with their names, folders and tasks; return the list."""
  rng = np.random.default_rng(seed)
  entries = [
    _colours(root / "wds_vtab-dtd", "vtab/dtd", size, rng),
    _two_classes(root / "wds_vtab-pcam_test", "vtab/pcam", size, rng),
    _multilabel(root / "wds_voc2007_multilabel", "voc2007_multilabel", size, rng),
    _retrieval(root / "wds_flickr8k", "flickr8k", size, rng),
    _sugar_crepe(root / "sugar_crepe", "swap_att", size, rng),
    _winoground(root / "winoground", size, rng),
  ]
  (root / "list.json").write_text(json.dumps(entries))
  return entries


def draw(size: int, objects: Sequence[tuple[str, str]], rng: np.random.Generator) -> Image.Image:
  """Return an image of (colour, shape) objects side by side on a noisy background."""
  noise = rng.integers(0, 60, (size, size, 3), np.uint8)
  image = Image.fromarray(noise)
  pen = ImageDraw.Draw(image)
  step = size // len(objects)
  for number, (colour, shape) in enumerate(objects):
    radius = int(rng.integers(step // 5, step // 2 - 1))
    x = number * step + int(rng.integers(radius, step - radius))
    y = int(rng.integers(radius, size - radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
      pen.ellipse(box, fill=colour)
    elif shape == "square":
      pen.rectangle(box, fill=colour)
    else:
      pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
  return image


def encode(image: Image.Image, suffix: str) -> bytes:
  """Return a lossless file of an image."""
  buffer = io.BytesIO()
  image.save(buffer, {"webp": "WEBP", "png": "PNG"}[suffix], lossless=True)
  return buffer.getvalue()


def write_tars(folder: Path, samples: Sequence[Mapping[str, bytes]], shards: int = 2) -> None:
  """Write the `test` split of a data set: consecutive samples in numbered tars, and their count."""
  test = folder / "test"
  test.mkdir(parents=True)
  (test / "nshards.txt").write_text(f"{shards}\n")
  for shard, rows in enumerate(np.array_split(np.arange(len(samples)), shards)):
    with tarfile.open(test / f"{shard}.tar", "w") as tar:
      for row in rows:
        for suffix, data in samples[row].items():
          info = tarfile.TarInfo(f"s{row:07}.{suffix}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))


def npy(values: Any) -> bytes:
  """Return a .npy file."""
  buffer = io.BytesIO()
  np.save(buffer, np.asarray(values))
  return buffer.getvalue()


def _lists(folder: Path, classes: Sequence[str], templates: Sequence[str]) -> None:
  (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
  (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


def _entry(folder: Path, name: str, task: str) -> dict[str, str]:
  return {"name": name, "folder": folder.name, "task": TASKS[task]}


def _colours(folder: Path, name: str, size: int, rng: np.random.Generator) -> dict[str, str]:
  samples = []
  for number in range(70):
    label = int(rng.integers(0, 6))  # the last class has no image
    image = draw(size, [(COLOURS[label], str(rng.choice(SHAPES)))], rng)
    suffix = "webp" if number % 2 else "png"
    samples.append({suffix: encode(image, suffix), "cls": str(label).encode()})
  write_tars(folder, samples)
  _lists(folder, COLOURS, ("a large {c} object.", "A photo of something {c}", "{c}"))
  return _entry(folder, name, "classification")


def _two_classes(folder: Path, name: str, size: int, rng: np.random.Generator) -> dict[str, str]:
  samples = []
  for _ in range(40):
    label = int(rng.integers(0, 2))
    # Both sides resize these images.
    image = draw(3 * size // 2, [(str(rng.choice(COLOURS)), SHAPES[label])], rng)
    samples.append({"png": encode(image, "png"), "cls": str(label).encode()})
  write_tars(folder, samples, 1)
  _lists(folder, SHAPES[:2], ("a {c}",))
  return _entry(folder, name, "classification")


def _multilabel(folder: Path, name: str, size: int, rng: np.random.Generator) -> dict[str, str]:
  samples = []
  for _ in range(50):
    some = rng.choice(6, 2, replace=False)
    image = draw(size, [(COLOURS[i], str(rng.choice(SHAPES))) for i in some], rng)
    labels = np.isin(np.arange(7), some).astype(np.int64)  # the last class has no image
    samples.append({"webp": encode(image, "webp"), "npy": npy(labels)})
  write_tars(folder, samples)
  _lists(folder, COLOURS, ("a photo of a {c} object.",))
  (folder / "dataset_type.txt").write_text("multilabel\n")
  return _entry(folder, name, "classification")


def _retrieval(folder: Path, name: str, size: int, rng: np.random.Generator) -> dict[str, str]:
  samples = []
  pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
  for colour, shape in pairs:
    image = draw(size, [(colour, shape)], rng)
    captions = [
      f"a {colour} {shape}",
      f"one {shape} that is {colour}",
      f"the large {colour} {shape} above",
      f"{shape}, {colour}",
      f"a small solid {shape} in {colour}",
    ][: int(rng.integers(1, 6))]
    samples.append({"png": encode(image, "png"), "txt": "\n".join(captions).encode()})
  write_tars(folder, samples)
  (folder / "dataset_type.txt").write_text("retrieval\n")
  return _entry(folder, name, "retrieval")


def _sugar_crepe(folder: Path, part: str, size: int, rng: np.random.Generator) -> dict[str, str]:
  (folder / "val2017").mkdir(parents=True)
  entries = {}
  for number in range(30):
    (one, two), (left, right) = rng.choice(COLOURS, 2, False), rng.choice(SHAPES, 2, False)
    image = draw(size, [(str(one), str(left)), (str(two), str(right))], rng)
    file = f"{number:012}.png"
    (folder / "val2017" / file).write_bytes(encode(image, "png"))
    entries[str(2 * number)] = {
      "filename": file,
      "caption": f"a {one} {left} next to a {two} {right}",
      "negative_caption": f"a {two} {left} next to a {one} {right}",
    }
  (folder / f"{part}.json").write_text(json.dumps(entries))
  return _entry(folder, f"sugar_crepe/{part}", "selection")


def _winoground(folder: Path, size: int, rng: np.random.Generator) -> dict[str, str]:
  (folder / "images").mkdir(parents=True)
  lines = []
  for number in range(20):
    (one, two), (left, right) = rng.choice(COLOURS, 2, False), rng.choice(SHAPES, 2, False)
    row: dict[str, Any] = {"id": number}
    for i, (a, b) in enumerate(((one, two), (two, one))):
      image = draw(size, [(str(a), str(left)), (str(b), str(right))], rng)
      row[f"image_{i}"] = f"ex_{number}_img_{i}"
      (folder / "images" / f"ex_{number}_img_{i}.png").write_bytes(encode(image, "png"))
      row[f"caption_{i}"] = f"a {a} {left} left of a {b} {right}"
    lines.append(json.dumps(row))
  (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
  return _entry(folder, "winoground", "selection")
