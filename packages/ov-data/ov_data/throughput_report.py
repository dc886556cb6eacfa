"""How fast the Loader is, beside bare JPEG decoding of the same files, and how exact its pixels.

    python -m ov_data.throughput_report [--images DIR] [--threads 2]

Writes JPEGs of 512 x 384 pixels and about 50 kB (from photos in DIR, else from noise with the
spectrum of photos) as shards, then takes turns between decoding them in full and loading them as
training batches. Images per CPU-second are the figures to compare on a machine that others use.
The pixels of the same crops are compared with Pillow's full decode and antialiased resize.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from functools import partial
import io
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from PIL import Image, ImageOps
import simplejpeg

from ov_data import decode
from ov_data.hashing import Uniforms
from ov_data.loader import Loader
from ov_data.sources import Source
from ov_data.tokenizer import Tokenizer
from ov_data.writer import ShardWriter

SIZE = (512, 384)  # width, height
BYTES = 50_000
IMAGE_SIZES = (84, 224)  # whose speed is measured
COMPARED_SIZES = (84, 160, 224, 384)  # whose pixels are compared
TEXT_LEN = 128
_BATCH = 64
_WORDS = 60  # of a caption


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--images", help="directory of photos; noise where absent")
  parser.add_argument("--distinct", type=int, default=128, help="different images")
  parser.add_argument("--records", type=int, default=512, help="records in a pass")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--turns", type=int, default=5)
  options = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as directory:
    jpegs = [encode(image) for image in _pictures(options.images, options.distinct)]
    jpegs = [jpegs[number % len(jpegs)] for number in range(options.records)]
    tokenizer = _write(pathlib.Path(directory), jpegs)
    loaders = {
      size: Loader(
        Source(directory),
        image_size=size,
        batch_size=_BATCH,
        tokenizer=tokenizer,
        text_len=TEXT_LEN,
        passes=1,
        threads=options.threads,
      )
      for size in IMAGE_SIZES
    }
    with futures.ThreadPoolExecutor(options.threads) as pool:
      turns = [_turn(jpegs, loaders, pool) for _ in range(options.turns)]
    for loader in loaders.values():
      loader.close()
  _print(turns, jpegs, options.threads)
  for size in COMPARED_SIZES:
    mean, most, largest = difference(jpegs[: options.distinct], size)
    print(f"{size:3} px: mean difference {mean:.2f} of 255, 99.9% {most:.0f}, largest {largest}")


def encode(image: Image.Image, wanted: int = BYTES) -> bytes:
  """The JPEG of an image whose quality brings it nearest to `wanted` bytes."""

  def at(quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()

  low, high = 10, 97
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if len(at(middle)) < wanted else (low, middle)
  return at(low)


def photo_like_noise(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> Image.Image:
  """Noise with amplitude 1 / frequency, its channels correlated, as photos have it.

  Args:
    rng: draws it.
    size: width and height, pixels.
  """
  width, height = size
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  frequency[0, 0] = 1
  spectrum = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
  grey, *colour = np.fft.irfft2(spectrum / frequency, s=(height, width))
  planes = np.stack([grey + 0.4 * plane for plane in colour], -1)
  planes = 128 + 55 * planes / planes.std()
  return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def captions(count: int) -> list[str]:
  """Texts of 60 words out of a thousand."""
  rng = np.random.default_rng(0)
  words = ["".join(rng.choice(list("abdegiklmnoprstu"), 6)) for _ in range(1000)]
  return [" ".join(rng.choice(words, _WORDS)) for _ in range(count)]


def difference(jpegs: list[bytes], size: int) -> tuple[float, float, int]:
  """Return mean, 99.9% quantile and largest difference between training crops and the same crops
  from a full decode (fast DCT, as in training) and one resize by Pillow."""
  crop, differences = decode.Crop(), []
  for number, jpeg in enumerate(jpegs):
    image = Image.fromarray(simplejpeg.decode_jpeg(jpeg, fastdct=True))
    box = crop.box(image.width, image.height, Uniforms(number))
    want = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    got = decode.random_crop(jpeg, size, Uniforms(number), crop)
    differences.append(np.abs(got.astype(np.int16) - want))
  every = np.stack(differences)
  return float(every.mean()), float(np.quantile(every, 0.999)), int(every.max())


def _pictures(directory: str | None, count: int) -> Iterator[Image.Image]:
  if directory is None:
    rng = np.random.default_rng(0)
    for _ in range(count):
      yield photo_like_noise(rng)
    return
  files = sorted(p for p in pathlib.Path(directory).rglob("*") if p.suffix in (".jpg", ".png"))
  if not files:
    sys.exit(f"no .jpg or .png under {directory}")
  for file in files[:count]:
    yield ImageOps.fit(Image.open(file).convert("RGB"), SIZE)


def _write(directory: pathlib.Path, jpegs: list[bytes]) -> Tokenizer:
  texts = captions(len(jpegs))
  with ShardWriter(directory / "train-00000-of-00001.tfrecord") as shard:
    for jpeg, caption in zip(jpegs, texts):
      shard.write({"jpg": jpeg, "txt": caption})
  return Tokenizer.train(texts, 3000)


def _turn(
  jpegs: list[bytes], loaders: dict[int, Loader], pool: futures.Executor
) -> dict[str, tuple[float, float]]:
  """(wall seconds, CPU seconds) of one pass of each kind."""

  def decode_in_full(jpeg: bytes) -> None:
    Image.open(io.BytesIO(jpeg)).load()

  def decode_scaled(number: int, size: int) -> None:
    decode.scaled(jpegs[number], size, Uniforms(number), decode.Crop())

  turn = {"bare": _time(partial(pool.map, decode_in_full, jpegs))}
  for size, loader in loaders.items():
    crops = partial(pool.map, decode_scaled, range(len(jpegs)), [size] * len(jpegs))
    turn[f"scaled {size}"] = _time(crops)
    turn[f"loader {size}"] = _time(loader.__iter__)
  return turn


def _time(start: Callable[[], Iterable[object]]) -> tuple[float, float]:
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in start():
    pass
  return time.perf_counter() - wall, time.process_time() - cpu


def _print(turns: list[dict[str, tuple[float, float]]], jpegs: list[bytes], threads: int) -> None:
  def rate(name: str, clock: int) -> float:
    return len(jpegs) / statistics.median(turn[name][clock] for turn in turns)

  def cpu_ratio(above: str, below: str) -> float:
    return statistics.median(turn[above][1] / turn[below][1] for turn in turns)

  kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
  print(
    f"{len(jpegs)} JPEGs of {SIZE[0]} x {SIZE[1]} pixels and {kilobytes:.1f} kB, {threads} threads,"
    f" medians of {len(turns)} turns; Pillow {Image.__version__}"
  )
  print(f"{'':20}{'images/s':>10}{'images/CPU-s':>14}{'of bare':>9}{'share of decode':>17}")
  print(f"{'full JPEG decode':20}{rate('bare', 0):10.0f}{rate('bare', 1):14.0f}")
  for size in IMAGE_SIZES:
    name = f"loader {size}"
    bare, decoding = cpu_ratio("bare", name), cpu_ratio(f"scaled {size}", name)
    title = f"Loader, {size} px"
    print(f"{title:20}{rate(name, 0):10.0f}{rate(name, 1):14.0f}{bare:9.2f}{decoding:17.0%}")
  print("'of bare' and 'share of decode' compare CPU time; the latter is the scaled JPEG decoding")
  print("of the same crops, the rest is resizing, tokenising, reading and the interpreter.")


if __name__ == "__main__":
  main(sys.argv[1:])
