import contextlib
import io
import itertools
import os

import numpy as np
from PIL import Image
import pytest

from ov_data import keep_list, recaptions
from ov_data.keep_list import KeepList
from ov_data.loader import Loader
from ov_data.recaptions import Recaptions
from ov_data.records import RecordError
from ov_data.sources import Dataset, Source
from ov_data.texts import TextSpec
from ov_data.tokenizer import Tokenizer
from ov_data.writer import ShardWriter

COUNTS = (5, 7)
CAPTIONS = [None if n == 3 else [f"new {n} é", f"other {n}"] for n in range(12)]


@pytest.fixture
def source(tmp_path):
  numbers = itertools.count()
  (tmp_path / "d").mkdir()
  for shard, count in enumerate(COUNTS):
    with ShardWriter(str(tmp_path / "d" / f"{shard}.tfrecord")) as writer:
      for number in itertools.islice(numbers, count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
        writer.write({"jpg": file.getvalue(), "txt": f"old {number}"})
  (tmp_path / "c").mkdir()
  plain = Source(str(tmp_path / "d"))
  recaptions.write(tmp_path / "c", keep_list.identity(Dataset(plain)), "f1", 12, CAPTIONS)
  return Source(plain.path, recaptions=str(tmp_path / "c"))


def _expected(record):
  return [text.encode() for text in CAPTIONS[record] or ()]


def test_captions_are_a_feature(source):
  dataset = Dataset(source)
  for record in range(12):
    texts = dataset.read(record).texts
    assert texts.get("recaption", []) == _expected(record)
    assert texts["txt"] == [f"old {record}".encode()]
  assert dataset.read(0, ("recaption",)).texts == {"recaption": _expected(0)}
  assert "recaption" not in dataset.read(0, ("txt",)).texts
  assert "recaption" in dataset.present_keys
  assert dataset.fingerprint != Dataset(Source(source.path)).fingerprint


def test_keep_lists_select_captions_by_record(source, tmp_path):
  plain = Dataset(Source(source.path))
  kept = np.isin(np.arange(12), (2, 6, 11))
  KeepList(keep_list.identity(plain), kept, {"x": 9}).write(str(tmp_path / "keep"))
  dataset = Dataset(Source(source.path, recaptions=source.recaptions,
                           keep_list=str(tmp_path / "keep")))  # fmt: skip
  found = [dataset.read(number).texts["recaption"] for number in range(3)]
  assert found == [_expected(record) for record in (2, 6, 11)]


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_training_reads_them(source, shuffle):
  tokenizer = Tokenizer.train([f"{word} {n}" for word in ("new", "old", "other") for n in range(12)]
                              * 3, 90)  # fmt: skip
  texts = {"long": TextSpec(("recaption",), 16, fallback=("txt",))}
  loader = Loader(source, image_size=8, batch_size=6, tokenizer=tokenizer, texts=texts, passes=1,
                  fit="squash", shuffle=shuffle)  # fmt: skip
  found = {}
  with loader:
    for batch in loader:
      words = tokenizer.decode_batch(batch["long"])
      found |= dict(zip(batch["image"][:, 0, 0, 0].tolist(), words, strict=True))
  assert found[3] == "old 3" and len(found) == 12
  for record in {*range(12)} - {3}:
    assert found[record] in [tokenizer.decode_batch(tokenizer.encode_batch([text], 16)[0])[0]
                             for text in CAPTIONS[record]]  # fmt: skip


def test_captions_of_other_sources_are_rejected(source, tmp_path):
  for change in ({"split": "[:9]"}, {"split": "[3:]"}):
    with pytest.raises(ValueError, match="write captions of this source and split"):
      Dataset(Source(source.path, recaptions=source.recaptions, **change))
  with pytest.raises(ValueError, match="a file is missing"):
    Dataset(Source(source.path, recaptions=str(tmp_path / "d")))


@pytest.mark.parametrize("name", ["recaptions.bin", "recaptions.offsets", "recaptions.json"])
def test_damage_is_found(source, name):
  path = os.path.join(source.recaptions, name)
  with open(path, "rb") as file:
    good = file.read()
  with open(path, "wb") as file:
    file.write(good[:-1])
  with pytest.raises(ValueError, match=r"is not usable .*repeat //tools/data:recaption"):
    Recaptions.open(source.recaptions)
  for at in range(0, len(good), 3):
    changed = bytearray(good)
    changed[at] ^= 1
    with open(path, "wb") as file:
      file.write(changed)
    try:
      found = Recaptions.open(source.recaptions)
    except ValueError:
      continue
    for record in range(12):
      with contextlib.suppress(RecordError):
        assert found[record] == _expected(record), at
  os.unlink(path)
  with pytest.raises(ValueError, match="a file is missing"):
    Recaptions.open(source.recaptions)


def test_existing_files_are_kept_and_others_replaced(source, tmp_path):
  identity = Recaptions.open(source.recaptions).source
  recaptions.write(tmp_path / "c", identity, "f1", 12, iter(()))  # complete
  recaptions.write(tmp_path / "c", identity, "f2", 12, [["x"]] * 12)
  assert Recaptions.open(source.recaptions)[3] == [b"x"]
  with pytest.raises(ValueError, match="captions of 2 records, expected 12"):
    recaptions.write(tmp_path / "c", identity, "f3", 12, [["x"]] * 2)
  with pytest.raises(ValueError, match="a file is missing"):
    Recaptions.open(source.recaptions)
