"""Procedural demo data: images of one or two objects with exact captions.

A scene is a pure function of (seed, index, split). Its short caption names every attribute in an
order that the image determines (the left object first), so that a captioner can be scored per
attribute with `score` (in scene_words).

The split "heldout" tests compositional generalisation: each of its scenes shows two objects whose
(colour, shape) pair is in `HELD_OUT`, an eighth of all such pairs, and no scene of "train" does,
although every single object occurs in it. Single objects are not held out: a model would learn from
the absence of red circles that red excludes circle. "val" contains other scenes with the
distribution of "train".
"""

from collections.abc import Iterable
import colorsys
import dataclasses
import hashlib
import itertools
import json
import math
import textwrap
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from apps.demo import scene_draw
from apps.demo.scene_words import (
  ATTRIBUTE_WORDS,
  COLOURS,
  OF_TWO_OBJECTS,
  RELATIONS,
  SHAPES,
  SIZES,
  TEXTURES,
  AttributeScore,
  ClassKind,
  class_name,
  class_prompts,
  parse_caption,
  score,
)

__all__ = [
  "ATTRIBUTE_WORDS",
  "COLOURS",
  "HELD_OUT",
  "RELATIONS",
  "SHAPES",
  "SIZES",
  "SPLITS",
  "TEXTURES",
  "AttributeScore",
  "ClassKind",
  "Scene",
  "SceneObject",
  "Split",
  "class_prompts",
  "contact_sheet",
  "parse_caption",
  "sample_scene",
  "scene_example",
  "score",
]

SPLITS = ("train", "heldout", "val")
Split = Literal["train", "heldout", "val"]

# Hue (degrees), saturation, value. Neighbours differ by at least 24 degrees or clearly in value.
_HSV = {
  "red": (358, 0.92, 0.86),
  "orange": (27, 0.95, 0.98),
  "yellow": (54, 0.92, 0.98),
  "green": (125, 0.80, 0.66),
  "cyan": (182, 0.80, 0.90),
  "blue": (224, 0.88, 0.86),
  "purple": (276, 0.70, 0.78),
  "pink": (324, 0.52, 0.98),
}


Kind = tuple[str, str]  # colour and shape


def _is_held_out(first: Kind, second: Kind) -> bool:
  """Return whether a pair is in the held-out eighth; depends on a fixed hash, not on the order."""
  words = " ".join(" ".join(kind) for kind in sorted((first, second)))
  return hashlib.blake2b(words.encode(), digest_size=8).digest()[0] % 8 == 0


_KINDS = list(itertools.product(COLOURS, SHAPES))
_COMBINATIONS: dict[str, list[tuple[Kind, Kind]]] = {
  "train": [(a, b) for a in _KINDS for b in _KINDS if not _is_held_out(a, b)],
  "heldout": [(a, b) for a in _KINDS for b in _KINDS if _is_held_out(a, b)],
}
_COMBINATIONS["val"] = _COMBINATIONS["train"]
HELD_OUT = frozenset(_COMBINATIONS["heldout"])


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """Words of one object, and how it is drawn (fractions of the image side)."""

  size: str
  colour: str
  texture: str
  shape: str
  sprite: scene_draw.Sprite

  @property
  def phrase(self) -> str:
    return f"a {self.size} {self.colour} {self.texture} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """One or two objects in canonical order, and the relation of the first to the second."""

  objects: tuple[SceneObject, ...]
  relation: str | None  # None with one object
  light: bool  # whether the background is light
  backdrop: scene_draw.Backdrop
  seed: int
  index: int
  split: str

  @property
  def caption(self) -> str:
    """Return the short caption: "a large red striped circle above a small blue solid square"."""
    if self.relation is None:
      return self.objects[0].phrase
    return f"{self.objects[0].phrase} {self.relation} {self.objects[1].phrase}"

  @property
  def description(self) -> str:
    """Return the long caption in sentences: the short caption and the background."""
    ground = "light" if self.light else "dark"
    if self.relation is None:
      return (
        f"There is one object on a {ground} background. The object is {self.objects[0].phrase}."
      )
    return (
      f"There are two objects on a {ground} background. The first is {self.objects[0].phrase}. "
      f"The second is {self.objects[1].phrase}. The first is {self.relation} the second."
    )

  @property
  def alt_text(self) -> str:
    """Return an incomplete caption such as the alt text "a striped circle above an object".

    It never names a colour, and omits every other word of the caption with probability 1/4, drawn
    per scene. Without colours, which distinguish most scenes, a model that matches these texts has
    to recognise sizes, textures, shapes and positions.
    """
    rng = _Random(self.seed, self.index, len(SPLITS) + SPLITS.index(self.split))
    first, *second = [_partial_phrase(o, rng) for o in self.objects]
    if not second:
      return first
    return f"{first} {self.relation if rng.below(4) else 'and'} {second[0]}"

  @property
  def truth(self) -> dict[str, Any]:
    """Return the ground truth as JSON values; x, y, radius in fractions of the image side."""
    return {
      "objects": [
        {
          "size": o.size,
          "colour": o.colour,
          "texture": o.texture,
          "shape": o.shape,
          "x": round(o.sprite.x, 4),
          "y": round(o.sprite.y, 4),
          "radius": round(o.sprite.radius, 4),
        }
        for o in self.objects
      ],
      "relation": self.relation,
      "background": "light" if self.light else "dark",
      "seed": self.seed,
      "index": self.index,
      "split": self.split,
    }

  def draw(self, image_size: int = 64) -> Image.Image:
    """Return the RGB image of image_size x image_size, 32 to 256 px."""
    if not 32 <= image_size <= 256:
      raise ValueError(f"image_size={image_size}: scenes are drawn at 32 to 256 px.")
    return scene_draw.draw(self.backdrop, tuple(o.sprite for o in self.objects), image_size)


class _Random:
  """Counter-based uniform numbers, identical on every NumPy version and platform."""

  def __init__(self, seed: int, index: int, stream: int):
    words = np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]).random_raw(96)
    self._numbers = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())
    self.word = int(words[-1])

  def uniform(self, low: float, high: float) -> float:
    return low + (high - low) * next(self._numbers)

  def below(self, n: int) -> int:
    return int(next(self._numbers) * n)

  def choice(self, values: Any) -> Any:
    return values[self.below(len(values))]


def sample_scene(
  seed: int, index: int, split: Split = "train", num_objects: int | None = None
) -> Scene:
  """Return the scene with this number.

  Args:
    seed: 0 to 2**63 - 1; different seeds give unrelated scenes.
    index: number of the scene, in the same range.
    split: "train", "val" or "heldout" (see the module docstring).
    num_objects: 1 or 2; None draws two in two of three scenes, and in all held-out ones.

  Raises:
    ValueError: the split or the number of objects is unknown, or a number is out of range.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
  if num_objects not in (None, 1, 2):
    raise ValueError(f"num_objects={num_objects}: a scene has 1 or 2 objects.")
  if not (0 <= seed < 2**63 and 0 <= index < 2**63):
    raise ValueError(f"seed={seed}, index={index}: each must be in [0, 2**63).")
  rng = _Random(seed, index, SPLITS.index(split))
  two = split == "heldout" or rng.below(3) > 0 if num_objects is None else num_objects == 2
  light, backdrop = _backdrop(rng)

  kinds = rng.choice(_COMBINATIONS[split]) if two else (rng.choice(_KINDS),)
  words = [_words(rng, kind) for kind in kinds]
  radii = [
    rng.uniform(0.195, 0.230) if size == "large" else rng.uniform(0.130, 0.150)
    for size, *_ in words
  ]
  if two:
    centres = _two_centres(rng, radii)
  else:
    centres = [(_inside(rng, radii[0]), _inside(rng, radii[0]))]
  objects = [
    SceneObject(*word, _sprite(rng, word, centre, radius, light))
    for word, centre, radius in zip(words, centres, radii, strict=True)
  ]
  relation = None
  if two:  # the left object comes first
    relation = "above" if centres[0][1] < centres[1][1] else "below"
  return Scene(tuple(objects), relation, light, backdrop, seed, index, split)


def scene_example(
  scene: Scene, image_size: int = 64, label: ClassKind = "shape"
) -> dict[str, bytes | str]:
  """Return the features of a record: jpg, txt (caption), description, alt, truth (JSON), key.

  Scenes with one object, or with two and label="colours", also have `label`: their class in
  `class_prompts(label)`.
  """
  example: dict[str, bytes | str] = {
    "jpg": scene_draw.encode_jpeg(scene.draw(image_size)),
    "txt": scene.caption,
    "description": scene.description,
    "alt": scene.alt_text,
    "truth": json.dumps(scene.truth, separators=(",", ":")),
    "key": f"{scene.split}-{scene.seed}-{scene.index}",
  }
  if (len(scene.objects) == 2) == (label == OF_TWO_OBJECTS):
    example["label"] = class_name([(o.colour, o.shape) for o in scene.objects], label)
  return example


def _partial_phrase(thing: SceneObject, rng: _Random) -> str:
  words = [word for word in (thing.size, thing.texture) if rng.below(4)]
  words.append(thing.shape if rng.below(4) else "object")
  return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _words(rng: _Random, kind: Kind) -> tuple[str, str, str, str]:
  colour, shape = kind
  return rng.choice(SIZES), colour, rng.choice(TEXTURES), shape


_MARGIN, _GAP = 0.02, 0.035  # free space at the border and between two objects
_STEP = 0.2  # minimum vertical distance of two objects


def _inside(rng: _Random, radius: float) -> float:
  return rng.uniform(_MARGIN + radius, 1 - _MARGIN - radius)


def _two_centres(rng: _Random, radii: list[float]) -> list[tuple[float, float]]:
  """Return two separate centres from left to right with clearly different heights."""
  first, second = radii
  slack = 1 - 2 * _MARGIN - 2 * first - 2 * second - _GAP
  cuts = sorted((rng.uniform(0, slack), rng.uniform(0, slack)))
  x = _MARGIN + first + cuts[0]
  distance = first + second + _GAP + cuts[1] - cuts[0]
  low, high = _MARGIN + max(radii), 1 - _MARGIN - max(radii)
  upper = rng.uniform(low, high - _STEP)
  lower = rng.uniform(upper + _STEP, high)
  heights = (upper, lower) if rng.below(2) else (lower, upper)
  return [(x, heights[0]), (x + distance, heights[1])]


def _rgb(hue: float, saturation: float, value: float) -> scene_draw.Rgb:
  r, g, b = colorsys.hsv_to_rgb((hue / 360) % 1, saturation, value)
  return round(255 * r), round(255 * g), round(255 * b)


def _sprite(
  rng: _Random,
  words: tuple[str, str, str, str],
  centre: tuple[float, float],
  radius: float,
  light: bool,
) -> scene_draw.Sprite:
  _, colour, texture, shape = words
  usual_hue, saturation, value = _HSV[colour]
  hue = usual_hue + rng.uniform(-5, 5)
  saturation = min(1.0, saturation * rng.uniform(0.92, 1.06))
  value = min(1.0, value * rng.uniform(0.92, 1.06))
  # The second texture colour contrasts with the background, so that the outline stays visible.
  second = (
    _rgb(hue, saturation, rng.uniform(0.15, 0.4) * value)
    if light
    else _rgb(hue, rng.uniform(0.03, 0.2) * saturation, 1.0)
  )
  return scene_draw.Sprite(
    shape=shape,
    texture=texture,
    x=centre[0],
    y=centre[1],
    radius=radius,
    angle=math.radians(rng.uniform(-16, 16)),
    texture_angle=math.radians(rng.uniform(0, 180)),
    texture_scale=rng.uniform(0.95, 1.15),
    ink=_rgb(hue, saturation, value),
    second_ink=second,
    shadow=0.25 + 0.1 * rng.below(3) if light and rng.below(2) else 0.0,
  )


def _backdrop(rng: _Random) -> tuple[bool, scene_draw.Backdrop]:
  """Return a plain, gradient or cloudy background, light or dark, with a weak tint."""
  light = rng.below(2) == 0
  side = (1, 2, 5)[rng.below(3)]
  hue, saturation = rng.uniform(0, 360), rng.uniform(0.0, 0.22)
  value = rng.uniform(0.80, 1.0) if light else rng.uniform(0.10, 0.26)
  spread = 0.0 if side == 1 else (0.16 if light else 0.12)
  grid = bytearray()
  for _ in range(side * side):
    step = rng.uniform(-spread, spread)
    grid += bytes(_rgb(hue + 300 * step, saturation, min(1.0, max(0.06, value + step))))
  noise = (0, 8, 16)[rng.below(3)]
  return light, scene_draw.Backdrop(bytes(grid), side, noise, rng.word)


def contact_sheet(
  scenes: Iterable[Scene], columns: int = 4, image_size: int = 64, scale: int = 3
) -> Image.Image:
  """Arrange scenes in a grid, enlarged without smoothing, each with its caption below."""
  scenes = list(scenes)
  side, text_height = image_size * scale, 46
  rows = -(-len(scenes) // columns)
  sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text_height + 8) + 8), "white")
  pen = ImageDraw.Draw(sheet)
  for i, scene in enumerate(scenes):
    x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + text_height + 8)
    image = scene.draw(image_size).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(image, (x, y))
    lines = textwrap.fill(scene.caption, width=max(8, side // 6))
    pen.text((x, y + side + 2), lines, fill="black", font_size=11)
  return sheet
