"""Procedural demo data: pictures of one or two objects with captions that are exactly right.

A scene is a pure function of (seed, index, split). Its short caption names every attribute, in an
order that the picture alone decides (the left object first), so that a captioner can be
scored attribute by attribute: `score` (in scene_words).

The split "heldout" is about composition: each of its scenes shows two objects whose (colour,
shape) stand together in one of `HELD_OUT`, an eighth of all such combinations, and no scene of
"train" does, though every single object occurs in it. What is right on held-out scenes was
composed, not remembered. Kinds of objects are not held out: a model learns from the absence of red
circles that red excludes circle, which is no matter of composition. "val" are other scenes like
those of "train".
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

from ov_data import scene_draw
from ov_data.scene_words import (
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

# Hue (degrees), saturation, value. Neighbours are at least 24 degrees or a clear value apart.
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
  """One combination in eight, in either order, chosen by a hash: fixed for ever."""
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
  """What one object is called, and how it is drawn (fractions of the image side)."""

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
  """One or two objects in canonical order; relation is that of the first to the second."""

  objects: tuple[SceneObject, ...]
  relation: str | None  # None with one object
  light: bool  # of the background
  backdrop: scene_draw.Backdrop
  seed: int
  index: int
  split: str

  @property
  def caption(self) -> str:
    """Short: "a large red striped circle above a small blue solid square"."""
    if self.relation is None:
      return self.objects[0].phrase
    return f"{self.objects[0].phrase} {self.relation} {self.objects[1].phrase}"

  @property
  def description(self) -> str:
    """Longer, in sentences; says everything the caption says, and the background."""
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
    """Incomplete, as texts beside pictures are: "a striped circle above an object".

    It never says a colour, and leaves out each other word of the caption one time in four, by a
    chance that belongs to the scene. Without colours, which tell most scenes apart at a glance,
    a model that matches these texts has to see sizes, textures, shapes and places.
    """
    dice = _Dice(self.seed, self.index, len(SPLITS) + SPLITS.index(self.split))
    first, *second = [_loosely(o, dice) for o in self.objects]
    if not second:
      return first
    return f"{first} {self.relation if dice.below(4) else 'and'} {second[0]}"

  @property
  def truth(self) -> dict[str, Any]:
    """Ground truth as plain JSON values; x, y, radius in fractions of the image side."""
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
    """RGB picture of image_size x image_size, 32 to 256 px."""
    if not 32 <= image_size <= 256:
      raise ValueError(f"image_size={image_size}: scenes are drawn at 32 to 256 px.")
    return scene_draw.draw(self.backdrop, tuple(o.sprite for o in self.objects), image_size)


class _Dice:
  """Uniform numbers from a counter-based generator: the same on every NumPy and platform."""

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
  """The scene with this number.

  Args:
    seed: 0 to 2**63 - 1; another seed gives unrelated scenes.
    index: number of the scene, in the same range.
    split: "train", "val" or "heldout" (see the module).
    num_objects: 1 or 2; None draws two in two scenes of three, and in all held-out ones.

  Raises:
    ValueError: for an unknown split or number of objects, or numbers out of range.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
  if num_objects not in (None, 1, 2):
    raise ValueError(f"num_objects={num_objects}: a scene has 1 or 2 objects.")
  if not (0 <= seed < 2**63 and 0 <= index < 2**63):
    raise ValueError(f"seed={seed}, index={index}: each must lie in [0, 2**63).")
  dice = _Dice(seed, index, SPLITS.index(split))
  two = split == "heldout" or dice.below(3) > 0 if num_objects is None else num_objects == 2
  light, backdrop = _backdrop(dice)

  kinds = dice.choice(_COMBINATIONS[split]) if two else (dice.choice(_KINDS),)
  words = [_words(dice, kind) for kind in kinds]
  radii = [
    dice.uniform(0.195, 0.230) if size == "large" else dice.uniform(0.130, 0.150)
    for size, *_ in words
  ]
  if two:
    centres = _two_centres(dice, radii)
  else:
    centres = [(_inside(dice, radii[0]), _inside(dice, radii[0]))]
  objects = [
    SceneObject(*word, _sprite(dice, word, centre, radius, light))
    for word, centre, radius in zip(words, centres, radii, strict=True)
  ]
  relation = None
  if two:  # the left object comes first
    relation = "above" if centres[0][1] < centres[1][1] else "below"
  return Scene(tuple(objects), relation, light, backdrop, seed, index, split)


def scene_example(
  scene: Scene, image_size: int = 64, label: ClassKind = "shape"
) -> dict[str, bytes | str]:
  """Features of one record: jpg, txt (caption), description, alt (text), truth (JSON), key.

  Scenes of one object, or of two with label="colours", also have `label`: their class among
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


def _loosely(thing: SceneObject, dice: _Dice) -> str:
  words = [word for word in (thing.size, thing.texture) if dice.below(4)]
  words.append(thing.shape if dice.below(4) else "object")
  return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _words(dice: _Dice, kind: Kind) -> tuple[str, str, str, str]:
  colour, shape = kind
  return dice.choice(SIZES), colour, dice.choice(TEXTURES), shape


_MARGIN, _GAP = 0.02, 0.035  # free space at the border and between two objects
_STEP = 0.2  # least difference in height of two objects


def _inside(dice: _Dice, radius: float) -> float:
  return dice.uniform(_MARGIN + radius, 1 - _MARGIN - radius)


def _two_centres(dice: _Dice, radii: list[float]) -> list[tuple[float, float]]:
  """Centres apart from left to right, the second clearly higher or lower than the first."""
  first, second = radii
  slack = 1 - 2 * _MARGIN - 2 * first - 2 * second - _GAP
  cuts = sorted((dice.uniform(0, slack), dice.uniform(0, slack)))
  x = _MARGIN + first + cuts[0]
  distance = first + second + _GAP + cuts[1] - cuts[0]
  low, high = _MARGIN + max(radii), 1 - _MARGIN - max(radii)
  upper = dice.uniform(low, high - _STEP)
  lower = dice.uniform(upper + _STEP, high)
  heights = (upper, lower) if dice.below(2) else (lower, upper)
  return [(x, heights[0]), (x + distance, heights[1])]


def _rgb(hue: float, saturation: float, value: float) -> scene_draw.Rgb:
  r, g, b = colorsys.hsv_to_rgb((hue / 360) % 1, saturation, value)
  return round(255 * r), round(255 * g), round(255 * b)


def _sprite(
  dice: _Dice,
  words: tuple[str, str, str, str],
  centre: tuple[float, float],
  radius: float,
  light: bool,
) -> scene_draw.Sprite:
  _, colour, texture, shape = words
  usual_hue, saturation, value = _HSV[colour]
  hue = usual_hue + dice.uniform(-5, 5)
  saturation = min(1.0, saturation * dice.uniform(0.92, 1.06))
  value = min(1.0, value * dice.uniform(0.92, 1.06))
  # The texture's other colour contrasts with the background, so that it never eats the outline.
  second = (
    _rgb(hue, saturation, dice.uniform(0.15, 0.4) * value)
    if light
    else _rgb(hue, dice.uniform(0.03, 0.2) * saturation, 1.0)
  )
  return scene_draw.Sprite(
    shape=shape,
    texture=texture,
    x=centre[0],
    y=centre[1],
    radius=radius,
    angle=math.radians(dice.uniform(-16, 16)),
    texture_angle=math.radians(dice.uniform(0, 180)),
    texture_scale=dice.uniform(0.95, 1.15),
    ink=_rgb(hue, saturation, value),
    second_ink=second,
    shadow=0.25 + 0.1 * dice.below(3) if light and dice.below(2) else 0.0,
  )


def _backdrop(dice: _Dice) -> tuple[bool, scene_draw.Backdrop]:
  """Plain, gradient or clouds; light or dark; of a weak tint, so that objects stand out."""
  light = dice.below(2) == 0
  side = (1, 2, 5)[dice.below(3)]
  hue, saturation = dice.uniform(0, 360), dice.uniform(0.0, 0.22)
  value = dice.uniform(0.80, 1.0) if light else dice.uniform(0.10, 0.26)
  spread = 0.0 if side == 1 else (0.16 if light else 0.12)
  grid = bytearray()
  for _ in range(side * side):
    step = dice.uniform(-spread, spread)
    grid += bytes(_rgb(hue + 300 * step, saturation, min(1.0, max(0.06, value + step))))
  noise = (0, 8, 16)[dice.below(3)]
  return light, scene_draw.Backdrop(bytes(grid), side, noise, dice.word)


def contact_sheet(
  scenes: Iterable[Scene], columns: int = 4, image_size: int = 64, scale: int = 3
) -> Image.Image:
  """Scenes side by side, enlarged without smoothing, each with its caption below."""
  scenes = list(scenes)
  side, text_height = image_size * scale, 46
  rows = -(-len(scenes) // columns)
  sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text_height + 8) + 8), "white")
  pen = ImageDraw.Draw(sheet)
  for i, scene in enumerate(scenes):
    x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + text_height + 8)
    picture = scene.draw(image_size).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y))
    lines = textwrap.fill(scene.caption, width=max(8, side // 6))
    pen.text((x, y + side + 2), lines, fill="black", font_size=11)
  return sheet
