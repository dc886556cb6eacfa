"""What the input benchmarks read: made pictures with captions, as shards, written when first used.

The pictures are noise with the spectrum of photos, at about the bytes per pixel that photos of the
web have. A few of them stand in many records.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
  import ov_data

BATCH, TEXT_LEN = 64, 128
VOCABULARY = 3000
LARGE_RECORDS, LARGE_SHARDS = 8192, 8  # 0.4 GB
TINY_PIXELS, TINY_TEXT_LEN = 8, 16
TINY_RECORDS = 100_000  # of one shard
_WEBP_QUALITY = 80
_TEXTS = 512  # different captions; all of their words are in the first few


@dataclasses.dataclass(frozen=True)
class Kind:
  """Pictures of one size and format.

  Attributes:
    size: width and height, pixels.
    format: as Pillow writes it.
    records: of a pass; a multiple of BATCH.
    distinct: different pictures among them.
  """

  size: tuple[int, int]
  format: Literal["JPEG", "WebP", "PNG"]
  records: int
  distinct: int

  @property
  def name(self) -> str:
    """For rows and folders."""
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
  """The distinct pictures of a kind, the same in every process."""
  import numpy as np

  from ov_data import throughput_report

  rng = np.random.default_rng(0)
  pixels = kind.size[0] * kind.size[1]
  small = throughput_report.SIZE[0] * throughput_report.SIZE[1]
  found = []
  for _ in range(kind.distinct):
    image = throughput_report.photo_like_noise(rng, kind.size)
    if kind.format == "JPEG":
      found.append(throughput_report.encode(image, throughput_report.BYTES * pixels // small))
    else:
      buffer = io.BytesIO()
      quality = {"quality": _WEBP_QUALITY} if kind.format == "WebP" else {}
      image.save(buffer, kind.format, **quality)
      found.append(buffer.getvalue())
  return found


class Data:
  """Folders of shards below a folder, each made when it is first asked for."""

  def __init__(self, scratch: Path):
    self._scratch = scratch

  @functools.cached_property
  def tokenizer(self) -> Path:
    """A folder with the tokenizer of the captions."""
    import ov_data

    folder = self._scratch / "tokenizer"
    ov_data.Tokenizer.train(self._texts, VOCABULARY).save(folder)
    return folder

  @functools.cached_property
  def _texts(self) -> list[str]:
    from ov_data import throughput_report

    return throughput_report.captions(_TEXTS)

  def of(self, kind: Kind) -> Path:
    """One shard with the records of a pass over a kind."""
    return self._make(kind.name, encoded(kind), kind.records)

  @functools.cached_property
  def large(self) -> Path:
    """Shards that an index takes a moment for."""
    return self._make("large", encoded(SMALL), LARGE_RECORDS, LARGE_SHARDS)

  def tiny(self, shards: int) -> Path:
    """Tiny records, 100,000 in each of many shards; all shards but the first are links to it."""
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

  def _make(self, name: str, pictures: Sequence[bytes], records: int, shards: int = 1) -> Path:
    import ov_data

    folder = self._scratch / name
    if not folder.exists():
      folder.mkdir()
      for shard in range(shards):
        path = folder / f"train-{shard:05}-of-{shards:05}.tfrecord"
        with ov_data.ShardWriter(path) as writer:
          for number in range(shard, records, shards):
            picture, text = pictures[number % len(pictures)], self._texts[number % _TEXTS]
            writer.write({"jpg": picture, "txt": text})
    return folder


def open_loader(folder: Path | str, tokenizer: Path | str, **arguments: Any) -> "ov_data.Loader":
  """The loader of a folder, with the batch size and text length of these benchmarks.

  Args:
    folder: of shards.
    tokenizer: its folder.
    **arguments: `image_size`, and whatever is not as usual.
  """
  import ov_data

  defaults = {"batch_size": BATCH, "text_len": TEXT_LEN}
  return ov_data.Loader(
    ov_data.Source(str(folder)),
    tokenizer=ov_data.Tokenizer.load(tokenizer),
    **{**defaults, **arguments},
  )
