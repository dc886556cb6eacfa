"""Encoded image -> uint8 [size, size, 3]: bounded, always RGB, cropped and resized in one step.

Training decodes no more than it needs: a JPEG is decoded at 1/2, 1/4 or 1/8 (in the DCT domain)
as long as the crop still has at least `size` pixels, and what remains is one antialiased bilinear
resize of the crop. (At 3/8, 5/8, 6/8 and 7/8 libjpeg-turbo has no SIMD code and takes as long as
for the whole picture, or longer.) Evaluation decodes in full with Pillow and resizes in float, as
the published models were evaluated. All heavy work happens in compiled code with the interpreter
lock released.

Transparent pixels are laid over white, as a browser shows them; of an animation the first frame is
used; 16-bit samples keep their upper 8 bits; EXIF orientation is applied.
"""

import contextlib
import dataclasses
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
import simplejpeg

from ov_data import resample
from ov_data.hashing import Uniforms
from ov_data.resample import Box

Pixels = NDArray[np.uint8]  # [h, w, 3]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_JPEGS = ("JPEG", "MPO")  # the second is a JPEG with others behind it, of which the first counts
# From which factor between crop and target on a JPEG is decoded at 1/8, 1/4, 1/2. Of an 8 x 8 block
# the first two keep so little that they are given a quarter more pixels than the crop needs.
_SCALES = ((10, 8), (5, 4), (2, 2))
_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height


class DecodeError(ValueError):
  """An image that cannot be used; `reason` is one of few short phrases, fit for counting."""

  def __init__(self, reason: str, detail: object = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
  """What an encoded image may cost; checked before a pixel is decoded."""

  max_bytes: int = 64 << 20
  max_pixels: int = 64_000_000  # width x height, for instance 8000 x 8000


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Crop:
  """A random crop of a share of the area, its shape stretched to a square afterwards.

  Draws aspect and height until the box fits, as TensorFlow's sample_distorted_bounding_box does:
  aspect uniform in its range, then height uniform among those that keep box and area allowed.
  Paper: Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 6.
  """

  area: tuple[float, float] = (0.4, 1.0)  # share of the image
  aspect: tuple[float, float] = (0.75, 1.33)  # width / height
  attempts: int = 100  # then the whole image

  def __post_init__(self) -> None:
    if not 0 < self.area[0] <= self.area[1] <= 1:
      raise ValueError(f"area={self.area}: expected 0 < smallest <= largest <= 1")
    if not 0 < self.aspect[0] <= self.aspect[1]:
      raise ValueError(f"aspect={self.aspect}: expected 0 < smallest <= largest")

  def box(self, width: int, height: int, uniforms: Uniforms) -> Box:
    """A box inside width x height pixels, in whole pixels."""
    smallest, largest = (share * width * height for share in self.area)
    for _ in range(self.attempts):
      aspect = self.aspect[0] + (self.aspect[1] - self.aspect[0]) * uniforms()
      low = round((smallest / aspect) ** 0.5)
      high = min(round((largest / aspect) ** 0.5), height, int((width + 0.5) / aspect))
      h = low + uniforms.below(high - low + 1) if low < high else high
      w = round(h * aspect)
      if 0 < w <= width and 0 < h <= height and smallest <= w * h <= largest:
        left = uniforms.below(width - w + 1)
        top = uniforms.below(height - h + 1)
        return left, top, left + w, top + h
    return 0, 0, width, height


def random_crop(
  data: bytes, size: int, uniforms: Uniforms, crop: Crop, limits: Limits = DEFAULT_LIMITS
) -> Pixels:
  """A random crop of the encoded image, as uint8 [size, size, 3].

  Raises:
    DecodeError: the bytes are no usable image.
  """
  image, width, height = _open(data, limits)
  left, top, right, bottom = crop.box(width, height, uniforms)
  pixels = _scaled(data, image, keep=min((right - left) / size, (bottom - top) / size))
  down, across = pixels.shape[0] / height, pixels.shape[1] / width  # 1, or less where scaled
  box = (left * across, top * down, right * across, bottom * down)
  return resample.triangle(pixels, box, size)


def whole(
  data: bytes,
  size: int,
  fit: Literal["center", "squash"] = "center",
  limits: Limits = DEFAULT_LIMITS,
) -> Pixels:
  """The encoded image for evaluation, as uint8 [size, size, 3].

  "center" brings the shorter side to `size` and keeps the middle; "squash" stretches the whole
  image. Fractions are cut off, not rounded, as in the evaluation of the published models.

  Raises:
    DecodeError: the bytes are no usable image.
  """
  image, width, height = _open(data, limits)
  image = _pixels(image)
  box = (0.0, 0.0, float(width), float(height))
  if fit == "center":
    # The published preprocessing rounds in float32; so do we, or some sides would be 1 pixel off.
    ratio = np.float32(size) / np.float32(min(width, height))
    across = width / int(np.round(np.float32(width) * ratio))
    down = height / int(np.round(np.float32(height) * ratio))
    left = (round(width / across) - size) // 2
    top = (round(height / down) - size) // 2
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
  elif fit != "squash":
    raise ValueError(f"fit={fit!r}: expected 'center' or 'squash'")
  channels = [
    np.asarray(channel.convert("F").resize((size, size), Image.Resampling.BILINEAR, box))
    for channel in image.split()
  ]
  return np.stack(channels, axis=-1).astype(np.uint8)


def full(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
  """The encoded image at its own size, upright, as RGB: to check it or to store it anew.

  Raises:
    DecodeError: the bytes are no usable image.
  """
  return _pixels(_open(data, limits)[0])


def _open(data: bytes, limits: Limits) -> tuple[Image.Image, int, int]:
  """The image before decoding, and its width and height as a viewer sees them."""
  if len(data) > limits.max_bytes:
    raise DecodeError("too many bytes", f"{len(data)} > {limits.max_bytes}")
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except UnidentifiedImageError:
    raise DecodeError("unknown format", f"{data[:8]!r} is none of {', '.join(FORMATS)}") from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise DecodeError("too many pixels", error) from None
  except Exception as error:  # Pillow's parsers raise many kinds on broken headers
    raise DecodeError(_reason(error, "broken header"), error) from None
  if image.width * image.height > limits.max_pixels:
    raise DecodeError("too many pixels", f"{image.width} x {image.height}")
  sideways = _orientation(image) in _SIDEWAYS
  return image, *((image.height, image.width) if sideways else image.size)


def _scaled(data: bytes, image: Image.Image, keep: float) -> Pixels:
  """Decodes to upright RGB, uint8 [h, w, 3]. A JPEG may be smaller, by up to a factor `keep`.

  Pillow decodes what is no JPEG, has other colours than grey and RGB, or is not flawless: then it
  also says why. simplejpeg calls the same libjpeg-turbo, without copies on the way; its pixels are
  equal.
  """
  scale = next((scale for least, scale in _SCALES if keep >= least), 1)
  if image.format in _JPEGS and image.mode in ("RGB", "L"):
    height, width = -(-image.height // scale), -(-image.width // scale)
    with contextlib.suppress(ValueError):
      # What was checked against the limits is what will be allocated.
      if simplejpeg.decode_jpeg_header(data)[:2] == (image.height, image.width):
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        return _upright(pixels, _orientation(image))
  return np.asarray(_pixels(image, scale))


def _pixels(image: Image.Image, scale: int = 1) -> Image.Image:
  """Decodes to upright RGB with Pillow, a JPEG at 1/scale."""
  orientation = _orientation(image)
  try:
    if image.format in _JPEGS and scale > 1:
      image.draft(None, (image.width // scale, image.height // scale))
    image.load()
  except Exception as error:  # OSError, SyntaxError, struct.error ... of the many formats
    raise DecodeError(_reason(error, "broken image"), error) from None
  if orientation != 1:
    image = ImageOps.exif_transpose(image)
  return _rgb(image)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
  """What `ImageOps.exif_transpose` does, as a view."""
  if orientation in _SIDEWAYS:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  return pixels


def _reason(error: Exception, otherwise: str) -> str:
  return "truncated image" if "truncated" in str(error).lower() else otherwise


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode.startswith("I"):  # 16-bit grey
    image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
  """1 (upright) to 8; anything unreadable counts as upright."""
  if "exif" not in image.info:  # and reading on for one would decode a PNG
    return 1
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # broken EXIF must not cost the picture
    return 1
