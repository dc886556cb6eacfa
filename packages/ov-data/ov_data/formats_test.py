"""Registration of a custom data format in `FORMATS`."""

import hashlib
import io
import json
from pathlib import Path

import chex
import numpy as np
from PIL import Image
import pytest

from ov_data import formats
from ov_data.example import FeatureError
from ov_data.loader import Loader
from ov_data.record_source import Record, RecordSource
from ov_data.request import Request
from ov_data.sources import Dataset, Source
from ov_data.writer import ShardWriter


class Album(RecordSource):
  """JSON list of [image as hex digits, caption, class]."""

  class_names = ("dark", "light")

  def __init__(self, request: Request):
    self._path = request.source.paths[0]
    self._text = Path(self._path).read_text()
    rows = json.loads(self._text)
    self._rows = [rows[n] for n in request.split.range(len(rows))]
    self._source = request.source

  def __len__(self):
    return len(self._rows)

  @property
  def fingerprint(self):
    return hashlib.sha256(self._text.encode()).hexdigest()[:16]

  def locate(self, record):
    return self._path, record

  def read(self, record, keys=None):
    image, caption, label = self._rows[record]
    if image is None:
      raise FeatureError("torn page")
    texts = dict.fromkeys(self._source.caption_keys, [caption.encode()])
    return Record(bytes.fromhex(image), texts, {"label": np.array([label])}, {})


def open_album(request: Request) -> RecordSource | None:
  return Album(request) if (request.path or "").endswith(".album") else None


class FakeTokenizer:
  """Fake tokenizer; the token id is the number of characters."""

  pad_id = 0

  def encode_batch(self, texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    ids[:, 0] = [len(text) for text in texts]
    return ids, ids != 0


def _image(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (9, 9), (value, value, value)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  """Twenty dark and light images; the fifth is truncated."""
  monkeypatch.setattr(formats, "FORMATS", {"album": open_album, **formats.FORMATS})
  rows = [[_image(50 + 9 * n).hex(), "x" * (n + 1), int(n > 9)] for n in range(20)]
  rows[5][0] = None
  (tmp_path / "a.album").write_text(json.dumps(rows))
  return f"{tmp_path}/a.album"


def _loader(*sources: Source, **arguments) -> Loader:
  shared = dict(
    image_size=4, batch_size=8, tokenizer=FakeTokenizer(), text_len=2, extra_keys=("label",)
  )
  return Loader(sources, **{**shared, **arguments})


def test_a_new_format_is_opened_split_and_located(album: str):
  dataset = Dataset(Source(album, "[10:]"))
  assert len(dataset) == 10 and dataset.class_names == ("dark", "light")
  assert dataset.present_keys == {"jpg", "txt", "label"}
  assert not dataset.skips and not dataset.indexes
  assert dataset.locate(3) == (album, 3)
  assert dataset.read(0).texts == {"txt": [b"x" * 11]}
  with pytest.raises(ValueError, match=r"split='\[30:\]' selects none of the records"):
    Dataset(Source(album, "[30:]"))


def test_a_new_format_can_be_used_for_training(album: str):
  """Gradient descent on batches separates dark and light images."""
  weight = bias = 0.0
  with _loader(Source(album)) as batches:
    for _, batch in zip(range(200), batches):
      valid = batch["valid"]
      x = batch["image"][valid].mean((1, 2, 3)) / 128 - 1
      y = np.array([label for label in batch["label"] if label is not None])
      error = 1 / (1 + np.exp(-(weight * x + bias))) - y
      weight, bias = weight - np.mean(error * x), bias - np.mean(error)
    assert set(batches.skipped) == {"torn page"}
    state = batches.state()
  values = (50 + 9 * np.arange(20)) / 128 - 1
  assert np.mean((weight * values + bias > 0) == (np.arange(20) > 9)) >= 0.9
  with _loader(Source(album), position=1600) as plain, _loader(Source(album)) as resumed:
    resumed.restore(state)
    chex.assert_trees_all_equal(next(resumed), next(plain))


def test_a_new_format_is_mixed_with_shards(album: str, tmp_path: Path):
  with ShardWriter(tmp_path / "a.tfrecord") as shard:
    for n in range(6):
      shard.write({"jpg": _image(n), "txt": "x" * (50 + n), "label": 7})
  shards = Source(f"{tmp_path}/a.tfrecord", weight=3)
  with _loader(Source(album), shards, shuffle="none") as batches:
    labels = [label for _, batch in zip(range(2), batches) for label in batch["label"]]
  assert labels.count(7) == 12 and labels.count(0) == 4


def test_every_path_has_one_format(tmp_path: Path):
  assert [*formats.FORMATS] == [
    "tfds", "benchmark_list", "benchmark_tars", "karpathy", "images", "tfrecord", "tar", "parquet",
    "array_record",
  ]  # fmt: skip
  with pytest.raises(ValueError, match="no such file or directory"):
    Dataset(Source(f"{tmp_path}/a.album"))  # raised if no format accepts it
