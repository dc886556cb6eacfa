"""The layout `img2dataset`: the `files` output of that tool, with captions next to each image.

photos/00000/000000001.jpg    000000001.txt    000000001.json
photos/00000_stats.json       photos/00000.parquet

Folders may have any name and depth. The Parquet files duplicate the JSON files and are ignored.
"""

from concurrent import futures
import re

from ov_data import fs, links
from ov_data.layouts import sidecars, text_rules
from ov_data.layouts.classes import UNSUPPORTED, tree_notes, tree_skips
from ov_data.layouts.items import Blob, Collection, Item, Listing, Notes, read_text
from ov_data.layouts.tree import Tree, is_image, is_unsupported_image, join_names
from ov_data.record_source import Skip

_STATS = re.compile(r"\d+_stats\.json")
_SHARD = re.compile(r"\d{5,}")
_TABLE = re.compile(r"\d+\.parquet")
SIDECARS = (*sidecars.TEXTS, "json")
_SIDECAR_SUFFIXES = tuple(f".{suffix}" for suffix in SIDECARS)
_WORKERS = 16  # threads that read captions


def read(collection: Collection) -> Listing:
  """List the images and read their captions.

  Raises:
    OSError: if a folder cannot be listed.
  """
  tree = collection.tree
  notes = tree_notes(tree)
  skips = tree_skips(tree)
  images: list[tuple[str, dict[str, str]]] = []  # image, caption files by suffix
  for folder in sorted(tree.folders):
    for stem, names in _stems(tree, folder, skips, notes).items():
      found = [name for name in names if is_image(name)]
      texts = {_split(name)[1]: name for name in names if not is_image(name)}
      images += [(join_names(folder, name), texts) for name in found]
      if not found:
        skips.append(Skip(join_names(folder, stem), "no image", f"has {', '.join(sorted(texts))}"))
  with futures.ThreadPoolExecutor(_WORKERS, "ov-captions") as pool:
    results = pool.map(lambda image: _item(tree, *image), images)
    items = []
    for result, own_notes in results:
      notes.merge(own_notes)
      if isinstance(result, Skip):
        skips.append(result)
      else:
        items.append(result)
  return Listing("img2dataset", items, skips, notes)


def has_sidecars(tree: Tree) -> bool:
  """Return whether some image has a text or JSON file of the same name next to it."""
  for names in tree.folders.values():
    texts = {_split(name)[0] for name in names if name.lower().endswith(_SIDECAR_SUFFIXES)}
    if texts and any(is_image(name) and _split(name)[0] in texts for name in names):
      return True
  return False


def has_numbered_folders(tree: Tree) -> bool:
  """Return whether the image folders are numbered like those of img2dataset."""
  if not all(_SHARD.fullmatch(top) for top in tree.images_by_top):
    return False
  return any(_STATS.fullmatch(name) for name in tree.folders[""]) or has_sidecars(tree)


def count_failures(folder: str, names: list[str], notes: Notes) -> None:
  """Add the failed downloads of NNNNN_stats.json files to the notes."""
  for name in names:
    if not _STATS.fullmatch(name):
      continue
    path = fs.join(folder, name)
    try:
      stats = text_rules.parse_json(read_text(path, text_rules.MAX_JSON_BYTES), path)
      failed = stats["count"] - stats["successes"]
      if failed > 0:
        notes.add("failed downloads", path, int(failed))
    except (ValueError, LookupError, TypeError, OverflowError):
      notes.add("unreadable download statistics", path)


def _stems(tree: Tree, folder: str, skips: list[Skip], notes: Notes) -> dict[str, list[str]]:
  """Return the images of a folder with their caption files, by stem; count other files."""
  stems: dict[str, list[str]] = {}
  names = tree.folders[folder]
  count_failures(fs.join(tree.root, folder) if folder else tree.root, names, notes)
  for name in names:
    stem, suffix = _split(name)
    if is_unsupported_image(name):
      skips.append(Skip(join_names(folder, name), UNSUPPORTED, "convert it to JPEG, PNG or WebP"))
    elif is_image(name) or suffix in SIDECARS:
      if not _STATS.fullmatch(name):
        stems.setdefault(stem, []).append(name)
    elif not _TABLE.fullmatch(name):
      notes.add("files that are not images", join_names(folder, name))
  return stems


def _split(name: str) -> tuple[str, str]:
  stem, _, suffix = name.rpartition(".")
  return stem, suffix.lower()


def _item(tree: Tree, file: str, texts: dict[str, str]) -> tuple[Item | Skip, Notes]:
  notes = Notes()
  folder = file.rpartition("/")[0]
  contents: dict[str, bytes] = {}
  problem: text_rules.TextError | None = None
  for suffix, name in texts.items():
    limit = text_rules.MAX_JSON_BYTES if suffix == "json" else text_rules.MAX_CAPTION_BYTES
    text_name = join_names(folder, name)
    try:
      if not tree.follow_links and (target := links.target_outside(tree.root, text_name)):
        raise text_rules.TextError(links.POINTS_OUTSIDE, links.describe(text_name, target))
      contents[suffix] = read_text(fs.join(tree.root, text_name), limit)
    except text_rules.TextError as error:
      problem = problem or error
  meta = contents.pop("json", None)
  try:
    captions = sidecars.captions(file, contents, meta, notes)
    if problem and not captions:
      raise problem
  except text_rules.TextError as error:
    return Skip(file, error.reason, error.detail), notes
  return Item(file, Blob(tree.root, file), captions), notes
