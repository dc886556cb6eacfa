"""Rendering of procedural scenes with Pillow: antialiased sprites on a backdrop.

Each sprite is drawn as two masks (outline and texture) on a small canvas at several times the
resolution and box-filtered down, so the cost depends on the area of the sprites. All positions and
lengths are fractions of the image side; `apps.demo.scenes` decides what to draw.
"""

import cmath
from collections.abc import Callable
import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Rgb = tuple[int, int, int]
_Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sprite:
  """Object to draw; x, y, radius in fractions of the image side, angles in radians."""

  shape: str
  texture: str
  x: float
  y: float
  radius: float
  angle: float
  texture_angle: float
  texture_scale: float  # 1 is the default period
  ink: Rgb  # the named colour of the object
  second_ink: Rgb  # second colour of the texture
  shadow: float  # 0 (none) to 1 (black)


@dataclasses.dataclass(frozen=True)
class Backdrop:
  """Background: a coarse, smoothly interpolated grid of colours, and pixel noise."""

  grid: bytes  # side * side RGB triples; side 1 is plain, 2 a gradient, more are clouds
  grid_side: int
  noise: int  # 0, or a power of two: amplitude of the noise in 8-bit steps
  noise_key: int


def draw(backdrop: Backdrop, sprites: tuple[Sprite, ...], image_size: int) -> Image.Image:
  """Draw the sprites in order on the backdrop; return an RGB image of image_size x image_size."""
  side = backdrop.grid_side
  canvas = Image.frombytes("RGB", (side, side), backdrop.grid)
  canvas = canvas.resize((image_size, image_size), Image.Resampling.BICUBIC)
  for sprite in sprites:
    _draw_sprite(canvas, sprite, image_size)
  if backdrop.noise:
    words = np.random.Philox(key=backdrop.noise_key).random_raw(
      -(-image_size * image_size * 3 // 8)
    )
    noise = (words.view(np.uint8) & (backdrop.noise - 1)).tobytes()[: image_size * image_size * 3]
    noise_image = Image.frombytes("RGB", (image_size, image_size), noise)
    canvas = ImageChops.add(canvas, noise_image, 1, -(backdrop.noise // 2))
  return canvas


def encode_jpeg(image: Image.Image, quality: int = 92) -> bytes:
  """Encode as JPEG without chroma subsampling, which preserves the colour of thin stripes."""
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=quality, subsampling=0)
  return buffer.getvalue()


def _draw_sprite(canvas: Image.Image, sprite: Sprite, image_size: int) -> None:
  zoom = 4 if image_size <= 96 else 2
  radius = sprite.radius * image_size
  # Align the patch to pixels of the canvas; the centre keeps its fractional position.
  left = math.floor(sprite.x * image_size - radius) - 1
  top = math.floor(sprite.y * image_size - radius) - 1
  patch = math.ceil(2 * radius) + 3
  centre = complex(sprite.x * image_size - left, sprite.y * image_size - top) * zoom
  mask = Image.new("L", (patch * zoom, patch * zoom))
  _OUTLINES[sprite.shape](ImageDraw.Draw(mask), centre, radius * zoom, sprite.angle)
  mask = mask.reduce(zoom)
  if sprite.shadow:
    offset = max(1, round(image_size / 48))
    shade = ImageChops.add(mask, mask, scale=2 / sprite.shadow)  # mask * shadow, in C
    canvas.paste((0, 0, 0), (left + offset, top + offset), shade)
  body = Image.new("RGB", mask.size, sprite.ink)
  if sprite.texture != "solid":
    pattern = Image.new("L", (patch * zoom, patch * zoom))
    period = _period(radius) * sprite.texture_scale * zoom
    turn = cmath.rect(1.0, sprite.texture_angle)
    _TEXTURES[sprite.texture](ImageDraw.Draw(pattern), centre, radius * zoom, period, turn)
    body.paste(sprite.second_ink, (0, 0), pattern.reduce(zoom))
  canvas.paste(body, (left, top), mask)


def _period(radius: float) -> float:
  """Return the texture period in pixels, at least 4.6, so that it is visible at 64 px."""
  return max(4.6, 0.46 * radius)


def _place(points: list[complex], centre: complex, radius: float, angle: float) -> list[_Point]:
  turn = cmath.rect(radius, angle)
  return [(z.real, z.imag) for z in (centre + p * turn for p in points)]


# Outlines of unit radius: x to the right, y down.
_SQUARE = [complex(x, y) * 0.8 for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
_TRIANGLE = [cmath.rect(1.08, math.radians(a)) + 0.16j for a in (-90, 30, 150)]
_ARM = 0.34  # half the width of a bar of the cross
_CROSS = [
  complex(x, y)
  for x, y in (
    *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
    *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
  )
]
_Outline = Callable[[ImageDraw.ImageDraw, complex, float, float], None]


def _polygon(points: list[complex]) -> _Outline:
  def outline(pen: ImageDraw.ImageDraw, centre: complex, radius: float, angle: float) -> None:
    pen.polygon(_place(points, centre, radius, angle), fill=255)

  return outline


def _disc(pen: ImageDraw.ImageDraw, centre: complex, radius: float) -> None:
  x, y = centre.real, centre.imag
  pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _circle(pen: ImageDraw.ImageDraw, centre: complex, radius: float, angle: float) -> None:
  del angle
  _disc(pen, centre, 0.95 * radius)


_OUTLINES: dict[str, _Outline] = {
  "circle": _circle,
  "square": _polygon(_SQUARE),
  "triangle": _polygon(_TRIANGLE),
  "cross": _polygon(_CROSS),
}


def _stripes(
  pen: ImageDraw.ImageDraw, centre: complex, radius: float, period: float, turn: complex
) -> None:
  reach, half = 1.2 * radius, 0.23 * period
  count = math.ceil(reach / period)
  for i in range(-count, count + 1):
    bar = (
      complex(-reach, i * period - half),
      complex(reach, i * period - half),
      complex(reach, i * period + half),
      complex(-reach, i * period + half),
    )
    pen.polygon(_place(list(bar), centre, 1.0, cmath.phase(turn)), fill=255)


def _dots(
  pen: ImageDraw.ImageDraw, centre: complex, radius: float, period: float, turn: complex
) -> None:
  count = math.ceil(1.1 * radius / period)
  limit = radius + period
  for row in range(-count, count + 1):
    for column in range(-count, count + 1):
      at = complex((column + 0.5 * (row & 1)) * period, row * period * 0.87)
      if abs(at) < limit:
        _disc(pen, centre + at * turn, 0.29 * period)


_TEXTURES: dict[str, Callable[[ImageDraw.ImageDraw, complex, float, float, complex], None]] = {
  "striped": _stripes,
  "dotted": _dots,
}
