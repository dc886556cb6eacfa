"""A data set by name: which records, under which features.

A path is a directory of TFRecord shards, a glob, a sharded name (`data/train@8`, `data/train@`),
one file, a tuple of any of these, or a directory written by TensorFlow Datasets; or images in
files, in one of the layouts of `ov_data.layouts`: class folders, captions.jsonl, metadata.jsonl,
captions next to the images, COCO's and Karpathy's JSON files. Local and gs://.
"""

from collections.abc import Collection, Sequence
import contextlib
import dataclasses
import functools

from ov_data import example, fs, image_files, layouts
from ov_data.example import Feature
from ov_data.index import Progress, ShardIndex
from ov_data.layouts import jsonl
from ov_data.pictures import Pictures
from ov_data.record_source import RecordSource, Skip
from ov_data.shards import TFDS_INFO, Shards
from ov_data.splits import Split

_PROBES = 16  # records looked at for missing keys


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set and which of its features are used.

  path: see the module; a tuple names several places of shards that are read as one.
  split: "train", or a part as in "train[:90%]", "train[-1000:]", "[1000:]"; None is everything.
    A split file takes several, as in "train+restval".
  weight: share of this source in a mixture, relative to the others.
  image_key: the feature with the encoded image, for instance "jpg" or "image/encoded".
  caption_keys: the features with captions, each holding one or several; one is drawn for each
    example and epoch, first among the keys, then among the captions of that key.
  image_root: the folder of the images that a list names; that of the list by default.
  format: the layout of images in files, one of `ov_data.layouts.FORMATS`; "auto" guesses it.
  follow_links: whether symbolic links are followed that lead out of a folder of images; otherwise
    they are counted as bad records. The folder itself and shards may be links to anywhere.

  Images in files get the features of records: the file's bytes as `image_key`, its name as "key";
  all captions under each of `caption_keys`; of labelled ones the name under "class" and its number
  under "label". Class folders are numbered from 0 in the order of their names.
  """

  path: str | tuple[str, ...]
  split: str | None = None
  weight: float = 1.0
  image_key: str = "jpg"
  caption_keys: tuple[str, ...] = ("txt",)
  image_root: str | None = None
  format: str = "auto"
  follow_links: bool = False

  def __post_init__(self) -> None:
    if isinstance(self.caption_keys, str):
      raise ValueError(
        f"caption_keys={self.caption_keys!r}: expected a tuple of names, ({self.caption_keys!r},)"
      )

  @property
  def paths(self) -> tuple[str, ...]:
    """`path` as a tuple."""
    return (self.path,) if isinstance(self.path, str) else tuple(self.path)

  @property
  def places(self) -> tuple[str, ...]:
    """All that is read from."""
    return self.paths if self.image_root is None else (*self.paths, self.image_root)


class Dataset:
  """The records of a source, numbered 0 to len - 1.

  Args:
    source: what to open.
    progress: is told of the indexing, (bytes done, bytes in all).
    run, cached_runs: for shards, see `ov_data.shards.Shards`.

  Raises:
    ValueError: nothing there, missing shards, an unknown split, a split file that cannot be read,
      or not one usable record.
  """

  def __init__(
    self,
    source: Source,
    progress: Progress | None = None,
    run: int = 1,
    cached_runs: int = 64,
  ):
    self.source = source
    split = Split.parse(source.split)
    pictures = _open_pictures(source, split)
    self._records: RecordSource = (
      Shards(source.paths, split, progress, run, cached_runs) if pictures is None else pictures
    )
    if not len(self._records):
      raise ValueError(f"split={source.split!r} takes none of the records of {source.path}")

  def __len__(self) -> int:
    return len(self._records)

  @property
  def indexes(self) -> list[ShardIndex]:
    """The indexes of the shards; empty for image files."""
    return self._records.indexes if isinstance(self._records, Shards) else []

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The names that the numbers under "label" stand for, if the source is a folder of classes."""
    return self._records.class_names

  @property
  def skips(self) -> Sequence[Skip]:
    """Inputs that were found and give no record: damaged records, files that are no images."""
    return self._records.skips

  @property
  def fingerprint(self) -> str:
    """16 hex digits of what is read, independent of its location. For shards they cover names,
    sizes, edge checksums and record counts; for images their names, labels and captions."""
    return self._records.fingerprint

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file that holds a record, and the offset of the record's data in it."""
    return self._records.locate(record)

  def features(self, record: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Read a record; see `RecordSource.features`. Safe to call from many threads."""
    return self._records.features(record, keys)

  def read(self, record: int) -> bytes:
    """Read a record as a serialised `tf.train.Example`. Safe to call from many threads.

    Raises:
      records.RecordError: the checksums do not fit the bytes.
      example.FeatureError: an image file is missing or too large.
      OSError: the file cannot be read.
    """
    if isinstance(self._records, Shards):
      return self._records.read(record)
    return example.serialise(self._records.features(record))

  @property
  def present_keys(self) -> frozenset[str]:
    """Features of the first records; empty if none of these can be read."""
    return frozenset(self._probed)

  @functools.cached_property
  def _probed(self) -> dict[str, bool]:
    """The features of the first records, and whether they hold bytes."""
    found: dict[str, bool] = {}
    for record in range(min(_PROBES, len(self))):
      with contextlib.suppress(ValueError, OSError):  # counted when its turn comes
        for key, value in self.features(record).items():
          found[key] = isinstance(value, list) or found.get(key, False)
    return found

  def check_keys(self, extra_keys: Sequence[str] = (), *, captions: bool = True) -> None:
    """Look at the first records, so that a misspelt key fails before training.

    Args:
      extra_keys: features to look for, in addition to the image key of the source.
      captions: whether to look for its caption keys too.

    Raises:
      ValueError: a key that none of them has, or images or captions that are numbers; names the
        keys that are there.
    """
    caption_keys = self.source.caption_keys if captions else ()
    place = f"the first {min(_PROBES, len(self))} records of {self.source.path}"
    there = f"they have {', '.join(sorted(self._probed))}"
    for key in (self.source.image_key, *caption_keys, *extra_keys):
      if self._probed and key not in self._probed:
        raise ValueError(
          f"feature {key!r} is in none of {place}; {there}. Set image_key and caption_keys to what "
          "is there."
        )
      if key not in extra_keys and not self._probed.get(key, True):
        raise ValueError(
          f"feature {key!r} holds numbers in {place}, and images and captions are bytes; {there}. "
          "Set image_key and caption_keys to others."
        )


def _open_pictures(source: Source, split: Split) -> Pictures | None:
  """Open the source as images in files; return None where it must be shards."""
  lists = [path for path in source.paths if path.endswith((".json", ".jsonl"))]
  takes_root = lists or (len(source.paths) == 1 and _holds_list(source))
  if source.image_root is not None and not takes_root:
    raise ValueError(
      f"image_root={source.image_root!r} goes with a split file such as dataset_coco.json or "
      f"another list of images, and path={source.path!r} is none; leave it out"
    )
  if lists and len(source.paths) > 1:
    raise ValueError(
      f"path={source.path!r}: only shards are read as one; give each split file its own Source"
    )
  if len(source.paths) != 1:
    return None
  path = source.paths[0]
  if fs.is_dir(path) and fs.exists(fs.join(path, TFDS_INFO)):
    return None
  return image_files.open_image_files(
    path,
    split,
    source.image_key,
    source.caption_keys,
    source.image_root,
    source.format,
    source.follow_links,
  )


def _holds_list(source: Source) -> bool:
  """Return whether the path is a folder with captions.jsonl or labels.jsonl."""
  path = source.paths[0]
  if not fs.is_dir(path):
    return source.format in layouts.FORMATS and layouts.LAYOUTS[source.format].takes_images
  return any(fs.exists(fs.join(path, name)) for name in jsonl.LISTS)
