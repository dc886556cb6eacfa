"""Image decoding, cropping and resizing to uint8 [size, size, 3] RGB.

Training decodes a JPEG at 1/2, 1/4 or 1/8 (in the DCT domain) if the crop keeps at least `size`
pixels, followed by one antialiased bilinear resize of the crop. (At 3/8, 5/8, 6/8 and 7/8
libjpeg-turbo has no SIMD code and takes at least as long as a full decode.) Evaluation decodes at
full size and resizes in float, as in the evaluation of the published models. All expensive work
runs in compiled code that releases the GIL.

JPEGs are decoded with the fast integer DCT, which is TensorFlow's default: the pixels equal those
on which the published models were trained and evaluated.

The EXIF orientation is applied; other metadata is ignored. Transparent pixels are composited on
white. The first frame of an animation is used. 16-bit samples keep their upper 8 bits. A PNG with a
wrong checksum in a chunk that affects pixels is rejected; other formats have no checksums.
"""

import contextlib
import dataclasses
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
import simplejpeg

from ov_data import png_chunks, resample
from ov_data.hashing import Uniforms
from ov_data.image_header import FORMATS as FORMATS
from ov_data.image_header import JPEG_END, DecodeError, Header, read_header
from ov_data.resample import Box

Pixels = NDArray[np.uint8]  # [h, w, 3]

# Minimum ratio of crop to target size for decoding at 1/8, 1/4 and 1/2. The first two keep little
# of an 8 x 8 block, so they require 25% more pixels than the target has.
_SCALES = ((10, 8), (5, 4), (2, 2))
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of an encoded image, checked before decoding.

  Attributes:
    max_bytes: maximum size of the encoded image.
    max_pixels: maximum width x height, for example 8000 x 8000.
    max_side: maximum length of the longer side in pixels.
    max_aspect: maximum ratio of longer to shorter side.
    max_scans: maximum number of scans of a JPEG. A scan takes time even if it has few bytes.
    max_scan_pixels: maximum of scans x width x height; 10 ns each.
  """

  max_bytes: int = 64 << 20
  max_pixels: int = 64_000_000
  max_side: int = 65_535
  max_aspect: float = 1000.0
  max_scans: int = 100
  max_scan_pixels: int = 1_000_000_000

  def check(self, header: Header) -> None:
    """Raise DecodeError if the image exceeds a limit."""
    width, height, scans = header.width, header.height, header.scans
    size = f"{width} x {height}"
    if width * height > self.max_pixels:
      raise DecodeError("too many pixels", f"{size} > {self.max_pixels}")
    if max(width, height) > self.max_side:
      raise DecodeError("too long a side", f"{size}, at most {self.max_side}")
    if max(width, height) > self.max_aspect * min(width, height):
      raise DecodeError("too extreme an aspect ratio", f"{size}, at most {self.max_aspect:g} to 1")
    if scans > self.max_scans or scans > 1 and scans * width * height > self.max_scan_pixels:
      raise DecodeError("too many scans", f"{scans} of {size} pixels")


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Crop:
  """Inception-style random crop, resized to a square afterwards.

  Samples aspect ratio and height until the box fits, like TensorFlow's
  sample_distorted_bounding_box: the aspect ratio is uniform in its range, the height is uniform
  among those that keep the box inside the image and the area in its range.
  Paper: Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 6.
  """

  area: tuple[float, float] = (0.4, 1.0)  # fraction of the image
  aspect: tuple[float, float] = (0.75, 1.33)  # width / height
  attempts: int = 100  # after which the full image is used

  def __post_init__(self) -> None:
    if not 0 < self.area[0] <= self.area[1] <= 1:
      raise ValueError(f"area={self.area}: expected 0 < smallest <= largest <= 1")
    if not 0 < self.aspect[0] <= self.aspect[1]:
      raise ValueError(f"aspect={self.aspect}: expected 0 < smallest <= largest")

  def box(self, width: int, height: int, uniforms: Uniforms) -> Box:
    """Return a box inside width x height pixels, with integer borders."""
    smallest, largest = (fraction * width * height for fraction in self.area)
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
  """Return a random crop of the encoded image, as uint8 [size, size, 3].

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  pixels, box = scaled(data, size, uniforms, crop, limits)
  return resample.triangle(pixels, box, size)


def scaled(
  data: bytes, size: int, uniforms: Uniforms, crop: Crop, limits: Limits = DEFAULT_LIMITS
) -> tuple[Pixels, Box]:
  """Sample the crop of `random_crop` and decode the image, a JPEG at the smallest usable scale.

  Returns:
    The uncropped image as uint8 [h, w, 3], and the crop in its pixels.

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  header = _checked_header(data, limits)
  width, height = _upright_size(header)
  left, top, right, bottom = crop.box(width, height, uniforms)
  keep = min((right - left) / size, (bottom - top) / size)
  pixels = _decoded(data, header, next((scale for least, scale in _SCALES if keep >= least), 1))
  down, across = pixels.shape[0] / height, pixels.shape[1] / width  # below 1 if scaled
  return pixels, (left * across, top * down, right * across, bottom * down)


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def whole(
  data: bytes,
  size: int,
  fit: Literal["center", "squash"] = "center",
  limits: Limits = DEFAULT_LIMITS,
  interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Pixels:
  """Return the encoded image for evaluation, as uint8 [size, size, 3].

  "center" resizes the shorter side to `size` and crops the center; "squash" ignores the aspect
  ratio. Pixel values are truncated, not rounded, as in the evaluation of the published models.

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  header = _checked_header(data, limits)
  width, height = _upright_size(header)
  pixels = _decoded(data, header)
  box = (0.0, 0.0, float(width), float(height))
  if fit == "center":
    # Round in float32 like the published preprocessing; otherwise some sides differ by 1 pixel.
    ratio = np.float32(size) / np.float32(min(width, height))
    across = width / int(np.round(np.float32(width) * ratio))
    down = height / int(np.round(np.float32(height) * ratio))
    left = (round(width / across) - size) // 2
    top = (round(height / down) - size) // 2
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
  elif fit != "squash":
    raise ValueError(f"fit={fit!r}: expected 'center' or 'squash'")
  if interpolation not in _FILTERS:
    raise ValueError(f"interpolation={interpolation!r}: expected 'bilinear' or 'bicubic'")
  channels = [
    Image.fromarray(pixels[..., channel].astype(np.float32)).resize(
      (size, size), _FILTERS[interpolation], box
    )
    for channel in range(3)
  ]
  resized = np.stack([np.asarray(c) for c in channels], axis=-1)
  if interpolation == "bicubic":  # its weights are partly negative
    resized = resized.clip(0, 255)
  return resized.astype(np.uint8)


def thumbnail(data: bytes, size: int, limits: Limits = DEFAULT_LIMITS) -> tuple[Pixels, int, int]:
  """Return a small copy of an image that ignores its aspect ratio, and the size of the image.

  A JPEG is decoded at the smallest usable scale.

  Returns:
    The copy as uint8 [size, size, 3], and width and height of the upright image in pixels.

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  header = _checked_header(data, limits)
  width, height = _upright_size(header)
  keep = min(width, height) / size
  pixels = _decoded(data, header, next((scale for least, scale in _SCALES if keep >= least), 1))
  box = (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))
  return resample.triangle(pixels, box, size), width, height


def full(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
  """Decode an image at full size, upright, as RGB, to verify or re-encode it.

  Args:
    data: encoded image.
    limits: limits of the encoded image.

  Returns:
    The image. JPEGs are decoded with the accurate DCT.

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  return Image.fromarray(_decoded(data, _checked_header(data, limits), fast=False))


def _checked_header(data: bytes, limits: Limits) -> Header:
  if len(data) > limits.max_bytes:
    raise DecodeError("too many bytes", f"{len(data)} > {limits.max_bytes}")
  header = read_header(data)
  limits.check(header)
  return header


def _upright_size(header: Header) -> tuple[int, int]:
  """Return width and height after the EXIF orientation is applied."""
  if header.orientation in _ROTATED:
    return header.height, header.width
  return header.width, header.height


def _decoded(data: bytes, header: Header, scale: int = 1, fast: bool = True) -> Pixels:
  """Decode to upright RGB, uint8 [h, w, 3].

  simplejpeg decodes valid JPEGs. Pillow decodes everything else and reports the reason of a
  failure. Both use libjpeg-turbo.

  Args:
    data: encoded image.
    header: header of `data`, within the limits.
    scale: 1, 2, 4 or 8; a JPEG may be returned smaller by up to this factor.
    fast: whether to decode a JPEG with the fast DCT.

  Raises:
    DecodeError: if the bytes are not a supported image.
  """
  if header.format == "JPEG":
    height, width = -(-header.height // scale), -(-header.width // scale)
    with contextlib.suppress(ValueError):
      jpeg = data if header.has_end else data + JPEG_END
      # Ensure that the decoder allocates the size that was checked against the limits.
      if simplejpeg.decode_jpeg_header(jpeg)[:2] == (header.height, header.width):
        if header.components in (1, 3):
          pixels = simplejpeg.decode_jpeg(jpeg, fastdct=fast, min_height=height, min_width=width)
          return _upright(pixels, header.orientation)
        if not header.has_end:  # ValueError if pixels are missing, which Pillow ignores
          simplejpeg.decode_jpeg(jpeg, "CMYK")
          header = dataclasses.replace(header, has_end=True)
    if not header.has_end:
      raise DecodeError("truncated image", f"{len(data)} bytes")
  return _upright(_pillow(data, header, scale), header.orientation)


def _pillow(data: bytes, header: Header, scale: int) -> Pixels:
  """Decode to RGB with Pillow; a JPEG is decoded at 1/scale."""
  if header.format == "PNG" and (problem := png_chunks.problem(data)):
    raise DecodeError("broken image", problem)
  clean = header.without_metadata(data)
  try:
    image = Image.open(io.BytesIO(clean), formats=(header.format,))
    if image.size != (header.width, header.height):
      raise DecodeError("broken header", f"{image.size} is not {header.width} x {header.height}")
    if scale > 1:
      image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return np.asarray(_rgb(image))
  except (DecodeError, MemoryError):
    raise
  except Exception as error:  # OSError, SyntaxError, struct.error, ..., depending on the format
    # Remove the buffer address, which changes in every run.
    text = str(error).partition(" <_io.")[0] or type(error).__name__
    reason = "truncated image" if "truncated" in text.lower() else "broken image"
    raise DecodeError(reason, text) from None


def _upright(pixels: Pixels, orientation: int) -> Pixels:
  """Return a view with the EXIF orientation applied."""
  if orientation in _ROTATED:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  return pixels


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
