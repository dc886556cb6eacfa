"""Configuration of a data source, and the request to open it.

A path is a directory of TFRecord shards, a glob, a sharded name (`data/train@8`, `data/train@`), a
file, a tuple of these, a directory of TensorFlow Datasets, or image files in one of the layouts of
`ov_data.layouts`: class folders, captions.jsonl, metadata.jsonl, captions next to the images, COCO
and Karpathy JSON files. Paths are local or gs://.
"""

import dataclasses
import functools

from ov_data import shard_names
from ov_data.index import Progress
from ov_data.keep_list import KeepList
from ov_data.layouts import Collection
from ov_data.splits import Split


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set and the features to use.

  Attributes:
    path: path of the data, see the module; a tuple concatenates the shards of several paths.
    split: "train", or a slice as in "train[:90%]", "train[-1000:]", "[1000:]"; None is everything.
      Split files also accept several splits, as in "train+restval".
    weight: relative weight of this source in a mixture.
    image_key: feature with the encoded image, for example "jpg" or "image/encoded".
    caption_keys: features with one or several captions each. One caption is sampled for each
      example and epoch: first a key, then a caption of that key.
    image_root: folder of the images of a list; by default the folder of the list.
    format: layout of image files, one of `ov_data.layouts.FORMATS`; "auto" detects it.
    keep_list: file of a keep-list of this source, see `ov_data.keep_list`; None uses all records.
    recaptions: folder of //tools/data:recaption with new captions of this source, which become the
      feature "recaption" of its records, see `ov_data.recaptions`; None for none.
    follow_links: whether to follow symbolic links that point outside a folder of images; otherwise
      they are counted as bad records. The folder itself and shards may always be links.

  Image files have the features of records: the bytes under `image_key`, the file name under "key",
  all captions under each of `caption_keys`, and for labelled images the class name under "class"
  and its index under "label". Class indices follow the sorted class names.
  """

  path: str | tuple[str, ...]
  split: str | None = None
  weight: float = 1.0
  image_key: str = "jpg"
  caption_keys: tuple[str, ...] = ("txt",)
  image_root: str | None = None
  format: str = "auto"
  follow_links: bool = False
  keep_list: str | None = None
  recaptions: str | None = None

  def __post_init__(self) -> None:
    if isinstance(self.caption_keys, str):
      raise ValueError(
        f"caption_keys={self.caption_keys!r}: expected a tuple of names, ({self.caption_keys!r},)"
      )

  @property
  def paths(self) -> tuple[str, ...]:
    """The paths as a tuple."""
    return (self.path,) if isinstance(self.path, str) else tuple(self.path)

  @property
  def all_paths(self) -> tuple[str, ...]:
    """All paths, including the image root."""
    return self.paths if self.image_root is None else (*self.paths, self.image_root)


@dataclasses.dataclass(frozen=True)
class Request:
  """Request to open a source.

  Attributes:
    source: source to open.
    split: parsed split of the source.
    progress: callback for the indexing, (bytes done, total bytes).
    run: number of consecutive records of a shard that are fetched with one read.
    cached_runs: number of runs to cache.
    keep: the records that will be read; a run then consists of kept records. None reads all.
  """

  source: Source
  split: Split
  progress: Progress | None = None
  run: int = 1
  cached_runs: int = 64
  keep: KeepList | None = None

  @property
  def path(self) -> str | None:
    """The path of the source; None if it has several."""
    return self.source.paths[0] if len(self.source.paths) == 1 else None

  @functools.cached_property
  def names(self) -> list[str]:
    """Names of the files at the paths that may be shards of any format."""
    return [n for path in self.source.paths for n in shard_names.names_at(path, self.split.name)]

  @functools.cached_property
  def collection(self) -> Collection:
    """The files or the list at the first path, read once and shared by all formats."""
    source = self.source
    return Collection(source.paths[0], source.image_root or "", source.follow_links)
