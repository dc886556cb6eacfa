"""Other ways to make the same batches, beside which the loader is measured.

  batches = pillow(folder, px, threads, tokenizer)    # opens
  for batch in batches(): ...                         # one pass, as often as wanted

`pillow` is what one writes first. `tf_data` follows the published OpenVision pipeline: pictures are
decoded in full, shuffled decoded, then cropped and resized in float, with its thread settings. Its
colour jitter is left out, for ours is on the device, and so is its tokenizer, a TensorFlow library
that has no release for this version: texts are encoded by ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import ov_data
from tools.bench.input_data import BATCH, TEXT_LEN

Batch = dict[str, Any]
Open = Callable[[Path, int, int, Path], Callable[[], Iterable[Batch]]]

# Of the published pipeline. Its shuffle held 250,000 decoded pictures; here the whole pass is less.
_BUFFER, _CALLS, _PREFETCH, _POOL = 512, 100, 2, 48
_AREA = (0.4, 1.0)


def has_tensorflow() -> bool:
  """Whether `tf_data` can be opened; TensorFlow has no release for the newest Python."""
  return importlib.util.find_spec("tensorflow") is not None


def full_decode(pictures: Sequence[bytes], count: int, threads: int) -> int:
  """Decodes `count` pictures to pixels and does nothing with them; returns `count`."""
  from PIL import Image

  def decode(number: int) -> None:
    Image.open(io.BytesIO(pictures[number % len(pictures)])).load()

  with futures.ThreadPoolExecutor(threads) as pool:
    return len(list(pool.map(decode, range(count))))


def pillow(folder: Path, px: int, threads: int, tokenizer: Path) -> Callable[[], Iterable[Batch]]:
  """Full decode, crop, antialiased resize in a pool of threads; the crops are those of ours."""
  import numpy as np
  from PIL import Image

  from ov_data import example, hashing

  dataset = ov_data.Dataset(ov_data.Source(str(folder)))
  text_encoder = ov_data.Tokenizer.load(tokenizer)

  def load(record: int) -> tuple[Any, Any]:
    features = example.parse(dataset.read(record))
    image = Image.open(io.BytesIO(features["jpg"][0])).convert("RGB")
    box = ov_data.Crop(_AREA).box(*image.size, hashing.Uniforms(record))
    pixels = np.asarray(image.crop(box).resize((px, px), Image.Resampling.BILINEAR))
    return pixels, features["txt"][0]

  def batches() -> Iterator[Batch]:
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    with futures.ThreadPoolExecutor(threads) as pool:
      for first in range(0, len(order), BATCH):
        pixels, texts = zip(*pool.map(load, order[first : first + BATCH]), strict=True)
        ids, mask = text_encoder.encode_batch(texts, TEXT_LEN)
        yield {"image": np.stack(pixels), "ids": ids, "mask": mask}

  return batches


def tf_data(folder: Path, px: int, threads: int, tokenizer: Path) -> Callable[[], Iterable[Batch]]:
  """The published pipeline; it has a pool of its own size."""
  del threads
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it greets on stderr
  import tensorflow as tf

  text_encoder = ov_data.Tokenizer.load(tokenizer)
  features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("jpg", "txt")}

  def parse(record: Any) -> tuple[Any, Any]:
    example = tf.io.parse_single_example(record, features)
    return tf.io.decode_jpeg(example["jpg"], channels=3), example["txt"]

  def crop(image: Any, text: Any) -> tuple[Any, Any]:
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.shape(image),
      tf.zeros([0, 0, 4]),
      min_object_covered=0.0,
      area_range=_AREA,
      use_image_if_no_bounding_boxes=True,
    )
    cut = tf.slice(image, begin, size)
    return tf.cast(tf.image.resize(cut, (px, px), antialias=True), tf.uint8), text

  options = tf.data.Options()
  options.threading.private_threadpool_size = _POOL
  options.threading.max_intra_op_parallelism = 1
  shards = sorted(map(str, folder.glob("*.tfrecord")))
  data = tf.data.TFRecordDataset(shards).map(parse, tf.data.AUTOTUNE).shuffle(_BUFFER)
  data = data.map(crop, _CALLS).ignore_errors()
  data = data.batch(BATCH, drop_remainder=True).prefetch(_PREFETCH).with_options(options)

  def batches() -> Iterator[Batch]:
    for image, texts in data.as_numpy_iterator():
      ids, mask = text_encoder.encode_batch(texts.tolist(), TEXT_LEN)
      yield {"image": image, "ids": ids, "mask": mask}

  return batches
