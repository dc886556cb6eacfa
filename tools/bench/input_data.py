"""Data of the input benchmark: shards of random images with captions, written on first use.

The images are noise with the spectrum of photos, and have about as many bytes per pixel as photos
on the web. Many records share a few distinct images.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
  import numpy as np
  from PIL import Image

  import ov_data

BATCH, TEXT_LEN = 64, 128
VOCABULARY = 3000
LARGE_RECORDS, LARGE_SHARDS = 8192, 8  # 0.4 GB
TINY_PIXELS, TINY_TEXT_LEN = 8, 16
TINY_RECORDS = 100_000  # records per shard
_SMALL_BYTES = 50_000  # bytes of a JPEG of SMALL
_WEBP_QUALITY = 80
_WORDS = 60  # words per text, from a vocabulary of a thousand
_TEXTS = 512  # distinct captions; the first few contain the whole vocabulary


@dataclasses.dataclass(frozen=True)
class Kind:
  """Images of one size and format.

  Attributes:
    size: width and height in pixels.
    format: name of the format in Pillow.
    records: number of records of a pass, a multiple of BATCH.
    distinct: number of distinct images among them.
  """

  size: tuple[int, int]
  format: Literal["JPEG", "WebP", "PNG"]
  records: int
  distinct: int

  @property
  def name(self) -> str:
    """Return the name for rows and folders."""
    return f"{self.size[0]}x{self.size[1]} {self.format}"


SMALL = Kind((512, 384), "JPEG", 512, 64)
LARGE = Kind((1600, 1200), "JPEG", 128, 8)
KINDS = (
  SMALL,
  LARGE,
  Kind((512, 384), "WebP", 256, 32),
  Kind((512, 384), "PNG", 256, 32),
)


@functools.cache
def encoded(kind: Kind) -> list[bytes]:
  """Return the distinct images of a kind; they are the same in every process."""
  import numpy as np

  rng = np.random.default_rng(0)
  pixels, small = math.prod(kind.size), math.prod(SMALL.size)
  found = []
  for _ in range(kind.distinct):
    image = photo_like_noise(rng, kind.size)
    if kind.format == "JPEG":
      found.append(encode(image, _SMALL_BYTES * pixels // small))
    else:
      buffer = io.BytesIO()
      quality = {"quality": _WEBP_QUALITY} if kind.format == "WebP" else {}
      image.save(buffer, kind.format, **quality)
      found.append(buffer.getvalue())
  return found


def photo_like_noise(rng: "np.random.Generator", size: tuple[int, int]) -> "Image.Image":
  """Return noise with amplitude 1 / frequency and correlated channels, as in photos.

  Args:
    rng: random number generator.
    size: width and height in pixels.
  """
  import numpy as np
  from PIL import Image

  width, height = size
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  frequency[0, 0] = 1
  spectrum = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
  gray, *color = np.fft.irfft2(spectrum / frequency, s=(height, width))
  planes = np.stack([gray + 0.4 * plane for plane in color], -1)
  planes = 128 + 55 * planes / planes.std()
  return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def encode(image: "Image.Image", wanted: int) -> bytes:
  """Encode an image as JPEG at the quality whose size is closest to `wanted` bytes."""

  def at(quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()

  low, high = 10, 97
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if len(at(middle)) < wanted else (low, middle)
  return at(low)


class Data:
  """Folders of shards, each created on first use."""

  def __init__(self, scratch: Path):
    self._scratch = scratch

  @functools.cached_property
  def tokenizer(self) -> Path:
    """Return a folder with the tokenizer of the captions."""
    import ov_data

    folder = self._scratch / "tokenizer"
    ov_data.Tokenizer.train(self._texts, VOCABULARY).save(folder)
    return folder

  @functools.cached_property
  def _texts(self) -> list[str]:
    import numpy as np

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdegiklmnoprstu"), 6)) for _ in range(1000)]
    return [" ".join(rng.choice(words, _WORDS)) for _ in range(_TEXTS)]

  def of(self, kind: Kind, format: str = "tfrecord") -> Path:
    """Return a folder with one shard of a format, which holds a pass over a kind."""
    name = kind.name if format == "tfrecord" else f"{kind.name}, {format}"
    return self._make(name, encoded(kind), kind.records, format=format)

  @functools.cached_property
  def large(self) -> Path:
    """Return a folder with shards large enough for a measurable indexing time."""
    return self._make("large", encoded(SMALL), LARGE_RECORDS, LARGE_SHARDS)

  def tiny(self, shards: int) -> Path:
    """Return a folder with many shards of 100,000 tiny records; all but the first are links."""
    folder = self._scratch / f"tiny {shards}"
    if not folder.exists():
      first = self._tiny_shard
      folder.mkdir()
      for number in range(shards):
        link = folder / f"train-{number:05}-of-{shards:05}.tfrecord"
        link.symlink_to(first)
        Path(f"{link}.ovidx").symlink_to(f"{first}.ovidx")
    return folder

  @functools.cached_property
  def _tiny_shard(self) -> Path:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (TINY_PIXELS, TINY_PIXELS), "grey").save(buffer, "JPEG")
    folder = self._make("tiny", [buffer.getvalue()], TINY_RECORDS)
    return next(folder.glob("*.tfrecord"))

  def _make(
    self,
    name: str,
    pictures: Sequence[bytes],
    records: int,
    shards: int = 1,
    format: str = "tfrecord",
  ) -> Path:
    from ov_data.testing.shards import WRITERS

    folder = self._scratch / name
    if not folder.exists():
      folder.mkdir()
      for shard in range(shards):
        rows: list[dict[str, bytes | str | int]] = [
          {"jpg": pictures[number % len(pictures)], "txt": self._texts[number % _TEXTS]}
          for number in range(shard, records, shards)
        ]
        WRITERS[format](folder / f"train-{shard:05}-of-{shards:05}.{format}", rows)
    return folder


def open_loader(folder: Path | str, tokenizer: Path | str, **arguments: Any) -> "ov_data.Loader":
  """Return the loader of a folder, with the batch size and text length of this benchmark.

  Args:
    folder: folder of shards.
    tokenizer: folder of the tokenizer.
    **arguments: `image_size`, and overrides of the default arguments.
  """
  import ov_data

  defaults = {"batch_size": BATCH, "text_len": TEXT_LEN}
  return ov_data.Loader(
    ov_data.Source(str(folder)),
    tokenizer=ov_data.Tokenizer.load(tokenizer),
    **{**defaults, **arguments},
  )
