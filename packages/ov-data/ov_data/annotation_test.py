import io
import os
import pathlib
import signal
import time

import numpy as np
from PIL import Image
import pytest

from ov_data import annotation, annotations, decode, keep_list
from ov_data.annotation import annotate
from ov_data.annotations import Annotations
from ov_data.bad_records import TooManyBadRecords
from ov_data.sources import Dataset, Source
from ov_data.writer import ShardWriter

COUNTS = (11, 0, 7, 13)
NO_CAPTION, BAD = 4, (5, 12)
COLORS = ("red", "lime", "blue")


class ColorModel:
  """Fake model: the embedding of an image is its mean color, that of a text the named color."""

  fingerprint = "c0105"
  dim = 3
  can_embed_text = True
  can_caption = True

  def __init__(self):
    self.images = 0

  def decode(self, data, limits=decode.DEFAULT_LIMITS):
    return decode.whole(data, 8, "squash", limits)

  def embed_images(self, images):
    self.images += len(images)
    means = images.mean((1, 2)).astype(np.float32) + 1
    return means / np.linalg.norm(means, axis=1, keepdims=True)

  def embed_texts(self, texts):
    return np.eye(3, dtype=np.float32)[[COLORS.index(text.split()[0]) for text in texts]]

  def caption_log_likelihood(self, images, texts):
    return -np.float32([image[0, 0].sum() + len(text) for image, text in zip(images, texts)])


def _png(number):
  file = io.BytesIO()
  Image.new("RGB", (20 + number, 30), COLORS[number % 3]).save(file, "PNG")
  return file.getvalue()


@pytest.fixture
def data(tmp_path):
  number = 0
  (tmp_path / "d").mkdir()
  for shard, count in enumerate(COUNTS):
    with ShardWriter(str(tmp_path / "d" / f"{shard}.tfrecord")) as writer:
      for _ in range(count):
        image = b"no image" if number in BAD else _png(number)
        text = " " if number == NO_CAPTION else f"{COLORS[number % 3]} square"
        writer.write({"jpg": image, "txt": text})
        number += 1
  return Dataset(Source(str(tmp_path / "d")))


def _content(folder):
  return {file.name: file.read_bytes() for file in pathlib.Path(folder).glob("*.parquet")}


def _all(found, name):
  return [value for shard in range(len(COUNTS)) for value in found.read(shard, [name])[name]]


def test_rows_describe_the_records(data, tmp_path):
  summary = annotate(data, tmp_path / "a", model=ColorModel(), batch_size=4)
  assert (summary.records, summary.annotated, summary.damaged) == (31, 31, 0)
  assert summary.bad == {"unknown format": 2}
  assert list(summary.first_bad.values()) == [data.location(BAD[0])]
  found = Annotations.open(str(tmp_path / "a"))
  assert found.info.rows == COUNTS and found.info.source == keep_list.identity(data)
  assert _all(found, "record") == list(range(31))
  locations = _all(found, "location")
  assert {n: locations[n] for n in range(31) if locations[n]} == {n: data.location(n) for n in BAD}
  good = [n for n in range(31) if n not in BAD]
  for name in ("width", "height", "content_hash", "perceptual_hash", "similarity"):
    values = _all(found, name)
    missing = {n for n, value in enumerate(values) if value is None or value is np.ma.masked}
    assert missing == ({*BAD, NO_CAPTION} if name == "similarity" else {*BAD}), name
  assert [_all(found, "width")[n] for n in good] == [20 + n for n in good]
  hashes = _all(found, "content_hash")
  assert len({hashes[n] for n in good}) == len(good)
  images = np.stack(_all(found, "image_embedding"))
  assert images.dtype == np.float16 and not images[[*BAD]].any()
  model = ColorModel()
  expected = model.embed_images(np.stack([model.decode(_png(n)) for n in good]))
  np.testing.assert_array_equal(images[good], expected.astype(np.float16))
  similarity = _all(found, "similarity")
  # The red, green or blue part of a color (256, 1, 1) / 256.004, in float32.
  assert all(similarity[n] == pytest.approx(0.99998, abs=1e-5) for n in good if n != NO_CAPTION)


def test_without_model(data, tmp_path):
  annotate(data, tmp_path / "a")
  found = Annotations.open(str(tmp_path / "a"))
  assert "perceptual_hash" in found.info.columns and "similarity" not in found.info.columns
  with pytest.raises(ValueError, match=r"no column 'similarity'; .* Annotate with --model"):
    found.read(0, ["similarity"])


@pytest.mark.parametrize("has_tower", [True, False])
def test_likelihoods_and_heads(data, tmp_path, has_tower):
  model = ColorModel()
  model.can_embed_text = has_tower
  weight = np.array([1.5, -2.0, 0.25], np.float32)
  heads = {"aesthetics": annotation.LinearHead(weight, 0.5)}
  options = {"likelihood": True, "heads": heads, "texts": True, "batch_size": 4}
  annotate(data, tmp_path / "a", model=model, **options)
  found = Annotations.open(str(tmp_path / "a"))
  want = [None if n in BAD else [f"{COLORS[n % 3]} square"] for n in range(31)]
  want[NO_CAPTION] = []
  assert _all(found, "texts") == want
  assert found.info.columns[-2:] == ("caption_log_likelihood", "aesthetics")
  assert ("similarity" in found.info.columns) == has_tower
  scores, likelihoods = _all(found, "aesthetics"), _all(found, "caption_log_likelihood")
  for n in range(31):
    pixels = None if n in BAD else model.decode(_png(n))
    if pixels is None or n == NO_CAPTION:
      assert likelihoods[n] is np.ma.masked
    else:
      text = f"{COLORS[n % 3]} square"
      assert likelihoods[n] == model.caption_log_likelihood([pixels], [text])[0]
    want = np.ma.masked if pixels is None else model.embed_images(pixels[None])[0] @ weight + 0.5
    # The order of three float32 products.
    assert scores[n] is want or scores[n] == pytest.approx(want, abs=1e-6)
  changed = {"aesthetics": annotation.LinearHead(weight, 0.75)}
  with pytest.raises(ValueError, match="was written for other data, another model or other setti"):
    annotate(data, tmp_path / "a", model=model, **(options | {"heads": changed}))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"model": None, "likelihood": True}, "require a model; give one"),
    ({"can_caption": False, "likelihood": True}, "the model no caption decoder: expected both"),
    ({"heads": {"similarity": [1, 2, 3]}}, "head 'similarity': expected a new column name"),
    ({"heads": {"a-b": [1, 2, 3]}}, "head 'a-b': expected a new column name"),
    ({"heads": {"or": [1, 2, 3]}}, "head 'or': expected a new column name"),
    ({"heads": {"x": [1, 2]}}, "head 'x' has 2 weights, and embeddings of the model have 3"),
  ],
)
def test_columns_that_the_model_cannot_compute(data, tmp_path, options, message):
  model = ColorModel()
  model.can_caption = options.pop("can_caption", True)
  options["heads"] = {
    name: annotation.LinearHead(np.float32(weight))
    for name, weight in options.get("heads", {}).items()
  }
  with pytest.raises(ValueError, match=message):
    annotate(data, tmp_path / "a", **{"model": model, **options})
  with pytest.raises(ValueError, match="expected a vector without NaN"):
    annotation.LinearHead(np.float32([np.nan]))


def test_completed_shards_are_not_computed_again(data, tmp_path):
  annotate(data, tmp_path / "a", model=ColorModel(), batch_size=4)
  expected = _content(tmp_path / "a")
  os.unlink(tmp_path / "a" / "00002.parquet")
  model = ColorModel()
  summary = annotate(data, tmp_path / "a", model=model, batch_size=4, threads=1)
  assert summary.annotated == COUNTS[2] and model.images == COUNTS[2] - 1
  assert sum(summary.bad.values()) == 2
  assert _content(tmp_path / "a") == expected


def _annotate_until(data, out, complete):
  """Annotate, and hang before the file number `complete` is written."""
  write = annotations.Writer.write

  def stop_before(self, shard, rows):
    if shard == complete:
      time.sleep(60)
    write(self, shard, rows)

  annotations.Writer.write = stop_before
  annotate(data, out, model=ColorModel(), batch_size=4)


def test_a_killed_run_resumes(data, tmp_path):
  """Kill -9 during a shard; the repeated command computes the rest and gives the same bytes."""
  annotate(data, tmp_path / "whole", model=ColorModel(), batch_size=4)
  for complete in (0, 2, 3):
    out = tmp_path / f"killed-{complete}"
    if (pid := os.fork()) == 0:
      _annotate_until(data, out, complete)
      os._exit(1)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.parquet"))) < complete and time.monotonic() < deadline:
      time.sleep(0.05)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with pytest.raises(ValueError, match="repeat that command"):
      Annotations.open(str(out))
    summary = annotate(data, out, model=ColorModel(), batch_size=4)
    assert summary.annotated == sum(COUNTS[complete:])
    assert _content(out) == _content(tmp_path / "whole")


def test_damaged_files_are_set_aside(data, tmp_path):
  annotate(data, tmp_path / "a", model=ColorModel())
  expected = _content(tmp_path / "a")
  file = tmp_path / "a" / "00003.parquet"
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r"00003.parquet is not usable .*; repeat the command"):
    Annotations.open(str(tmp_path / "a")).read(3, ["width"])
  summary = annotate(data, tmp_path / "a", model=ColorModel())
  assert (summary.damaged, summary.annotated) == (1, COUNTS[3])
  assert _content(tmp_path / "a") == expected
  assert (tmp_path / "a" / "00003.parquet.damaged-0").exists()


def test_changed_bytes_are_found_or_change_nothing(data, tmp_path):
  """Every 7th byte of a file is changed; bytes that no reader uses are not covered."""
  annotate(data, tmp_path / "a", model=ColorModel())
  file = tmp_path / "a" / "00000.parquet"
  good = file.read_bytes()
  found = Annotations.open(str(tmp_path / "a"))
  names = found.info.columns
  expected = {name: repr(value) for name, value in found.read(0, names).items()}
  refused = 0
  for at in range(0, len(good), 7):
    changed = bytearray(good)
    changed[at] ^= 4
    file.write_bytes(changed)
    try:
      values = found.read(0, names)
    except ValueError:
      refused += 1
    else:
      assert {name: repr(value) for name, value in values.items()} == expected, at
  assert refused > len(good) / 7 / 4


def test_mistakes(data, tmp_path):
  annotate(data, tmp_path / "a")
  with pytest.raises(ValueError, match="was written for other data, another model or other setti"):
    annotate(data, tmp_path / "a", model=ColorModel())
  keep = np.ones(31, bool)
  keep_list.KeepList(keep_list.identity(data), keep, {}).write(str(tmp_path / "keep"))
  kept = Dataset(Source(data.source.path, keep_list=str(tmp_path / "keep")))
  with pytest.raises(ValueError, match="omit the keep-list"):
    annotate(kept, tmp_path / "b")
  with pytest.raises(TooManyBadRecords):
    bad = tmp_path / "bad"
    bad.mkdir()
    with ShardWriter(str(bad / "0.tfrecord")) as writer:
      for _ in range(30):
        writer.write({"jpg": b"no image", "txt": "red"})
    annotate(Dataset(Source(str(bad))), tmp_path / "c")
  model = ColorModel()
  model.embed_images = lambda images: np.full((len(images), 3), np.nan, np.float32)
  with pytest.raises(ValueError, match="NaN or Inf"):
    annotate(data, tmp_path / "d2", model=model)


def test_images_without_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(annotation, "_SHARD", 3)
  for number in range(8):
    folder = tmp_path / "photos" / COLORS[number % 2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.png").write_bytes(_png(number))
  data = Dataset(Source(str(tmp_path / "photos"), caption_keys=()))
  annotate(data, tmp_path / "a", model=ColorModel())
  found = Annotations.open(str(tmp_path / "a"))
  assert found.info.rows == (3, 3, 2) and "text_embedding" not in found.info.columns
