"""Perceptual hash of an image: similar images have hashes with few different bits.

The hash is that of pHash (Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf): the
signs of the low frequencies of a small gray copy, relative to their median. It changes little with
compression, size and brightness, and much with crops, rotation and reflection.
"""

import numpy as np
from numpy.typing import NDArray

SIDE = 32  # side of the gray copy
_KEPT = 8  # frequencies in each direction
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG

# Rows of the orthonormal DCT-II.
_FREQUENCIES = np.arange(_KEPT)[:, None]
_DCT = np.cos(np.pi * (np.arange(SIDE) + 0.5) * _FREQUENCIES / SIDE) * np.sqrt(2 / SIDE)
_DCT[0] /= np.sqrt(2)


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
  """Return the hash of a small copy of an image.

  Args:
    pixels: the image, squashed to uint8 [32, 32, 3], see `ov_data.decode.thumbnail`.

  Returns:
    64 bits; bit 0 is always 0, because the mean brightness is not part of the hash.
  """
  gray = pixels @ _LUMA
  low = (_DCT @ gray @ _DCT.T).ravel()
  bits = low > np.median(low[1:])
  bits[0] = False
  return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
