"""Trials of damaged data: one class for each kind of input.

A trial opens damaged bytes as a user would, and returns whether they were "used", "counted" or
"refused". It fails if data is lost without a count, or if an error is not one line that names the
file.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import io
import json
from pathlib import Path
import tarfile

import numpy as np
from PIL import Image

import ov_data
from ov_data import decode, example, layouts, records, writer
from ov_data.hashing import Uniforms
import ov_eval

Outcome = str


class Refused(Exception):
  """The input was rejected with a valid message."""


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
  """Convert errors that are shown to users into Refused.

  Args:
    path: the file; the message must contain its path or that of a parent folder.

  Raises:
    AssertionError: if the message has several lines, is too long, or does not name the file.
  """
  try:
    yield
  except (ValueError, OSError) as error:
    text = str(error)
    folders = (path.name, path.parent.name, path.parent.parent.name)
    assert any(name in text for name in folders), f"does not name {path}: {text}"
    assert "\n" not in text, f"several lines: {text}"
    assert len(text) < 2000, f"{len(text)} characters: {text[:200]} ..."
    raise Refused(text) from None


def _image(format: str = "JPEG", value: int = 0, mode: str = "RGB", **options: object) -> bytes:
  rng = np.random.default_rng(value)
  small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
  buffer = io.BytesIO()
  small.resize((40, 30)).convert(mode).save(buffer, format, **options)
  return buffer.getvalue()


class Images:
  """Encoded images of every format are decoded, or rejected with a reason."""

  def __init__(self, folder: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    self.seeds = [
      _image(), _image(progressive=True), _image(mode="L"), _image(mode="CMYK"),
      _image(exif=exif, comment=b"x" * 50), _image(restart_marker_blocks=2),
      _image("PNG"), _image("PNG", mode="RGBA", exif=exif), _image("PNG", mode="P"),
      _image("PNG", mode="1"),
      _image("WEBP"), _image("WEBP", mode="RGBA", lossless=True, exif=exif),
      _image("GIF", mode="P"), _image("BMP"), _image("BMP", mode="P"),
      _image("GIF", mode="P", save_all=True, append_images=[Image.new("P", (40, 30))]),
      _image("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    ]  # fmt: skip

  def check(self, data: bytes, original: bytes) -> Outcome:
    outcomes = set()
    for read in (
      lambda: decode.whole(data, 12),
      lambda: decode.random_crop(data, 12, Uniforms(len(data)), decode.Crop()),
      lambda: decode.full(data),
    ):
      try:
        read()
        outcomes.add("used")
      except ov_data.DecodeError as error:
        assert error.reason and "\n" not in str(error)
        outcomes.add("counted")
    # Scaled decoding may stop before damage that full decoding reaches, but not vice versa.
    return "counted" if "counted" in outcomes else "used"


class Examples:
  """Records with valid checksums whose content is a damaged `tf.train.Example`."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._good = example.serialise({"jpg": _image(), "txt": ["a dog", "two"], "label": 3})
    self.seeds = [self._good]
    self._tokenizer = ov_data.Tokenizer.train(["a dog two"], 20)

  def check(self, data: bytes, original: bytes) -> Outcome:
    shard = self._folder / "x.tfrecord"
    shard.write_bytes(records.frame(self._good) + records.frame(data))
    (self._folder / "x.tfrecord.ovidx").unlink(missing_ok=True)
    with ov_data.Loader.evaluation(
      ov_data.Source(str(shard)),
      image_size=8,
      batch_size=2,
      tokenizer=self._tokenizer,
      text_len=6,
      extra_keys=("label",),
      threads=1,
    ) as loader:
      (batch,) = loader
      assert batch["valid"][0]
      assert loader.skipped.total() == (not batch["valid"][1])
      unexpected = [reason for reason in loader.skipped if reason.startswith("unexpected")]
      assert not unexpected, loader.skipped
      return "used" if batch["valid"][1] else "counted"


class _DataSet:
  """A data set of 2 shards with manifest and sidecars."""

  def __init__(self, folder: Path, damaged: str):
    self._out = folder / "set"
    sizes = np.random.default_rng(0).integers(0, 4000, 12)
    self._rows = [
      {"jpg": np.random.default_rng(i).bytes(int(size)), "txt": str(i)}
      for i, size in enumerate(sizes)
    ]
    writer.write_dataset(self._out, {"train": 2}, self._make, {"kind": "fuzz"}, workers=0)
    self._files = {path: path.read_bytes() for path in self._out.iterdir()}
    self._path = self._out / damaged
    self._wanted = Counter(example.serialise(row) for row in self._rows)
    self.seeds = [self._files[self._path]]

  def _make(self, split: str, number: int) -> list[dict[str, object]]:
    return self._rows[number::2]

  def _restore(self) -> None:
    for path in self._out.iterdir():
      if path not in self._files:
        path.unlink()
    for path, data in self._files.items():
      path.write_bytes(data)

  def _read(self) -> tuple[Counter[bytes], int]:
    """Return the records, and the number counted as damaged or unreadable."""
    with refusing(self._path):
      dataset = ov_data.Dataset(ov_data.Source(str(self._out), "train"))
    found: Counter[bytes] = Counter()
    lost = len(dataset.skips)
    for record in range(len(dataset)):
      try:
        found[example.serialise(dataset.features(record))] += 1
      except ov_data.RecordError:
        lost += 1
    assert found.keys() <= self._wanted.keys(), "a record that was never written"
    return found, lost


class Shards(_DataSet):
  """A shard of a data set, with or without its sidecar."""

  def __init__(self, folder: Path):
    super().__init__(folder, "train-00000-of-00002.tfrecord")

  def check(self, data: bytes, original: bytes) -> Outcome:
    self._restore()
    self._path.write_bytes(data)
    if len(data) % 2:
      Path(f"{self._path}.ovidx").unlink()
    found, lost = self._read()
    missing = (self._wanted - found).total()
    assert not missing or lost, f"{missing} records are missing without a count"
    return "counted" if lost else "used"


class Sidecars(_DataSet):
  """Index files of shards: all records are read, regardless of the content of the index."""

  def __init__(self, folder: Path):
    super().__init__(folder, "train-00000-of-00002.tfrecord.ovidx")

  def check(self, data: bytes, original: bytes) -> Outcome:
    self._restore()
    self._path.write_bytes(data)
    assert self._read() == (self._wanted, 0)
    return "used"


class Manifests(_DataSet):
  """Manifests of data sets: all records are read, or the manifest is rejected."""

  def __init__(self, folder: Path):
    super().__init__(folder, writer.MANIFEST)

  def check(self, data: bytes, original: bytes) -> Outcome:
    self._restore()
    self._path.write_bytes(data)
    assert self._read() == (self._wanted, 0)
    return "used"


def _tar(members: list[tuple[str, bytes]], format: int) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


class Tars:
  """Tars of image-text pairs: every image is read, or its loss is counted."""

  def __init__(self, folder: Path):
    self._path = folder / "t.tar"
    members = []
    for i in range(4):
      members += [(f"{i}.jpg", _image(value=i)), (f"{i}.txt", f"caption {i}".encode())]
    members += [("x" * 150 + ".png", _image("PNG")), ("x" * 150 + ".json", b'{"caption": "c"}')]
    members += [("é.jpg", _image(value=9)), ("é.cls", b"3")]
    self.seeds = [_tar(members, format) for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    self._images = {data for name, data in members if name.endswith(("jpg", "png"))}

  def check(self, data: bytes, original: bytes) -> Outcome:
    self._path.write_bytes(data)
    with refusing(self._path):
      listing = layouts.read(str(self._path), "webdataset")
    str(listing.notes)
    layouts.describe(str(self._path), listing)
    found = [layouts.read_blob(item.image, 1 << 20) for item in listing.items]
    assert len({item.key for item in listing.items}) == len(found), "keys are not unique"
    missing = len(self._images) - len(found)
    # No checksum covers the content of members, so changed members count as found.
    assert missing <= 0 or listing.skips or listing.notes.counts, f"{missing} images are missing"
    return "counted" if listing.skips or listing.notes.counts else "used"


class Lists:
  """Lists of images and captions: entries are read or counted, or the list is rejected."""

  _NAMES = ("a.jpg", "b.png", "c d.jpg", "é.jpg")

  def __init__(self, folder: Path):
    for name in self._NAMES:
      (folder / name).write_bytes(_image())
    (folder / "train").mkdir()
    captions = [{"file": name, "captions": ["one", "zwei ü"]} for name in self._NAMES]
    labels = [{"file": name, "label": f"class {i % 2}"} for i, name in enumerate(self._NAMES)]
    metadata = [{"file_name": name, "text": "one"} for name in self._NAMES]
    coco = {
      "images": [{"id": i, "file_name": name} for i, name in enumerate(self._NAMES)],
      "annotations": [{"image_id": i, "caption": f"text {i}"} for i in range(4)],
    }
    karpathy = {
      "images": [
        {"filename": name, "split": "train", "sentences": [{"raw": "one", "tokens": ["one"]}]}
        for name in self._NAMES
      ]
    }
    csv = "file_name,text\n" + "".join(f'{name},"one, two"\n' for name in self._NAMES)
    self._files = {
      "captions.jsonl": ("jsonl", _lines(captions)),
      "labels.jsonl": ("jsonl", _lines(labels)),
      "metadata.jsonl": ("imagefolder", _lines(metadata)),
      "metadata.csv": ("imagefolder", csv.encode()),
      "captions_coco.json": ("coco", json.dumps(coco).encode()),
      "dataset_coco.json": ("karpathy", json.dumps(karpathy).encode()),
    }
    self._folder = folder
    self._by_seed = {data: (name, format) for name, (format, data) in self._files.items()}
    self.seeds = [*self._by_seed]

  def check(self, data: bytes, original: bytes) -> Outcome:
    name, format = self._by_seed[original]
    path = self._folder / name
    path.write_bytes(data)
    try:
      with refusing(path):
        listing = layouts.read(str(path), format, str(self._folder))
      layouts.describe(str(path), listing)
      assert len({item.key for item in listing.items}) == len(listing.items)
      with refusing(path):
        root = str(self._folder)
        dataset = ov_data.Dataset(ov_data.Source(str(path), image_root=root, format=format))
        for record in range(len(dataset)):
          with contextlib.suppress(ov_data.example.FeatureError):  # counted by the loader
            dataset.read(record)
    finally:
      path.unlink()
    return "counted" if listing.skips or listing.notes.counts else "used"


def _lines(rows: list[dict[str, object]]) -> bytes:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class Names:
  """Lists of classes and templates, and vocabularies."""

  def __init__(self, folder: Path):
    vocabulary = "\n".join(["[PAD]", "[bos]", "[eos]", "[UNK]", "a", "##b", "ü"]).encode()
    tokenizer = ov_data.Tokenizer.train(["a dog", "two cats"], 30)
    self._readers: dict[bytes, tuple[str, Callable[[str], object]]] = {
      "dress\nhat\nshoe ü\n".encode(): ("classes.txt", ov_eval.class_set),
      b'["dress", "hat", "shoe"]': ("classes.json", ov_eval.class_set),
      b"a photo of a {}\nart of the {}.\n": ("templates.txt", ov_eval.template_set),
      vocabulary: ("vocab.txt", ov_data.Tokenizer.from_vocab),
      tokenizer.to_json().encode(): ("tokenizer.json", ov_data.Tokenizer.from_file),
    }
    self._folder = folder
    self.seeds = [*self._readers]

  def check(self, data: bytes, original: bytes) -> Outcome:
    name, read = self._readers[original]
    path = self._folder / name
    path.write_bytes(data)
    with refusing(path):
      read(str(path))
    return "used"


class Progress:
  """Progress files of a conversion: it resumes to the same data set, or is rejected."""

  def __init__(self, folder: Path):
    self._out = folder / "set"
    self._rows = [{"txt": str(i), "jpg": bytes(i)} for i in range(6)]
    self._want = self._write()
    self._interrupt()
    self._logs = {path: path.read_bytes() for path in (self._out / "dataset.progress").iterdir()}
    self._shards = {path: path.read_bytes() for path in self._out.glob("*.tfrecord")}
    self._by_seed = {data: path for path, data in self._logs.items()}
    self.seeds = [*self._by_seed]

  def _write(self, stop: bool = False) -> list[bytes]:
    def make(split: str, number: int) -> Iterator[dict[str, object]]:
      if stop and number:
        raise KeyboardInterrupt
      yield from self._rows[number::2]

    with contextlib.suppress(KeyboardInterrupt):
      writer.write_dataset(self._out, {"train": 2}, make, {"kind": "fuzz"}, workers=0)
    return [path.read_bytes() for path in sorted(self._out.glob("*.tfrecord"))]

  def _interrupt(self) -> None:
    for path in self._out.iterdir():
      path.unlink()
    self._write(stop=True)

  def check(self, data: bytes, original: bytes) -> Outcome:
    (self._out / writer.MANIFEST).unlink(missing_ok=True)
    for path in self._out.glob("*.tfrecord*"):
      path.unlink()
    (self._out / "dataset.progress").mkdir(exist_ok=True)
    for path, content in (self._logs | self._shards).items():
      path.write_bytes(content)
    self._by_seed[original].write_bytes(data)
    with refusing(self._by_seed[original]):
      assert self._write() == self._want
      assert len(ov_data.Dataset(ov_data.Source(str(self._out), "train"))) == len(self._rows)
    return "used"


KINDS = {
  kind.__name__.lower(): kind
  for kind in (Images, Examples, Shards, Sidecars, Manifests, Tars, Lists, Names, Progress)
}
