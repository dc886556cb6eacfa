"""Encoded images of every kind that training accepts, for tests of model cards."""

import io
import struct
from typing import Any
import zlib

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 90, 61
_ORIENTATION = 0x0112
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


def every_kind() -> dict[str, bytes]:
  """Return encoded images by kind; kinds that start with "jpeg" are lossy."""
  rgb = _drawn(_WIDTH, _HEIGHT)
  alpha = Image.fromarray(np.linspace(0, 255, _WIDTH * _HEIGHT).astype(np.uint8).reshape(61, 90))
  rgba, la = rgb.copy(), rgb.convert("L").convert("LA")
  rgba.putalpha(alpha)
  la.putalpha(alpha)
  gray16 = Image.fromarray(
    np.linspace(0, 65535, _WIDTH * _HEIGHT).astype(np.uint16).reshape(61, 90)
  )
  palette, gray = rgb.quantize(32), rgb.convert("L")
  other = _drawn(_WIDTH, _HEIGHT, seed=1)
  kinds = {
    "jpeg": _encoded(rgb, "JPEG", quality=95),
    "jpeg subsampled": _encoded(rgb, "JPEG", quality=90, subsampling=2),
    "jpeg progressive": _encoded(rgb, "JPEG", quality=95, progressive=True),
    "jpeg gray": _encoded(gray, "JPEG", quality=95),
    "jpeg cmyk": _encoded(rgb.convert("CMYK"), "JPEG", quality=95),
    "jpeg wide": _encoded(_drawn(600, 24), "JPEG", quality=95),
    "jpeg tall": _encoded(_drawn(17, 500), "JPEG", quality=95),
    "jpeg xmp orientation": _encoded(rgb, "JPEG", quality=95, xmp=_XMP),
    "jpeg damaged exif": _encoded(rgb, "JPEG", quality=95, exif=b"Exif\0\0none"),
    "png": _encoded(rgb, "PNG"),
    "png wide": _encoded(_drawn(901, 33), "PNG"),
    "png small": _encoded(_drawn(5, 3), "PNG"),
    "png rgba": _encoded(rgba, "PNG"),
    "png gray and alpha": _encoded(la, "PNG"),
    "png gray": _encoded(gray, "PNG"),
    "png 1 bit": _encoded(gray.convert("1"), "PNG"),
    "png palette": _encoded(palette, "PNG"),
    "png palette, transparent": _encoded(palette, "PNG", transparency=3),
    "png palette, alphas": _encoded(palette, "PNG", transparency=bytes(range(0, 256, 8))),
    "png rgb, transparent": _encoded(rgb, "PNG", transparency=rgb.getpixel((7, 9))),
    "png gray, transparent": _encoded(gray, "PNG", transparency=128),
    "png 16-bit gray": _encoded(gray16, "PNG"),
    "png 16-bit gray and alpha": _png16(4),
    "png 16-bit rgb": _png16(2),
    "png 16-bit rgba": _png16(6),
    "png rgba, turned": _encoded(rgba, "PNG", exif=_exif(6)),
    "webp": _encoded(rgb, "WEBP", quality=90),
    "webp rgba": _encoded(rgba, "WEBP", lossless=True),
    "webp, turned": _encoded(rgb, "WEBP", lossless=True, exif=_exif(5)),
    "webp animated": _encoded(rgb, "WEBP", save_all=True, append_images=[other], lossless=True),
    "gif": _encoded(palette, "GIF"),
    "gif transparent": _encoded(palette, "GIF", transparency=3),
    "gif animated": _encoded(palette, "GIF", save_all=True, append_images=[other.quantize(32)]),
    "bmp": _encoded(rgb, "BMP"),
    "bmp palette": _encoded(palette, "BMP"),
    "bmp 1 bit": _encoded(gray.convert("1"), "BMP"),
    "bmp rgba": _encoded(rgba, "BMP"),
  }
  for turned in range(1, 9):
    kinds[f"jpeg orientation {turned}"] = _encoded(rgb, "JPEG", quality=95, exif=_exif(turned))
  return kinds


def _drawn(width: int, height: int, seed: int = 0) -> Image.Image:
  """Return an image of gradients and color patches, different in every corner."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[0:height, 0:width]
  pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 64 * 4], -1)
  for _ in range(6):
    left, top = rng.integers(0, max(1, width - 4)), rng.integers(0, max(1, height - 4))
    size = rng.integers(2, max(3, min(width, height)))
    pixels[top : top + size, left : left + size] = rng.integers(0, 256, 3)
  return Image.fromarray(pixels.astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def _exif(orientation: int) -> Image.Exif:
  exif = Image.Exif()
  exif[_ORIENTATION] = orientation
  return exif


def _png16(color: int) -> bytes:
  """Return a PNG with 16 bits per sample, which Pillow cannot write, of color type `color`."""
  channels = {2: 3, 4: 2, 6: 4}[color]
  samples = np.random.default_rng(color).integers(0, 1 << 16, (_HEIGHT, _WIDTH, channels))
  rows = [b"\0" + row.astype(">u2").tobytes() for row in samples]

  def chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

  header = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 16, color, 0, 0, 0)
  parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
