"""Convert an image collection into record shards for training.

  bazel run //tools/data:convert -- --input=/data/photos --output=/data/photos_shards

--input is one of
  a folder with captions.jsonl   {"file": "images/a.jpg", "captions": ["...", ...]} a line
  and/or labels.jsonl            {"file": "images/a.jpg", "label": "dress"} a line
  an imagefolder                 metadata.jsonl or metadata.csv with file_name and text
  img2dataset's files            00000/000000001.jpg with 000000001.txt or .json
  a folder of class folders      dress/a.jpg, shoes/b.png, ...
  COCO's captions_*.json         with --images=FOLDER
  Karpathy's dataset_*.json      with --images=FOLDER
  WebDataset tars                a folder, a glob, or name-{000..099}.tar; jpg|png|webp + txt|json

Every image is decoded once. Unusable images are skipped, counted by reason and listed in
skipped.jsonl. Repeat the command to resume an interrupted conversion.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

from collections import Counter
import dataclasses
import os
from pathlib import Path
import sys
import tempfile
from typing import Any

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from ov_data import fs, layouts, outputs, writer
from tools.data import common_flags, progress, shards

_INPUT = flags.DEFINE_string("input", None, "Folder, list or tars to convert.")
_FORMAT = flags.DEFINE_enum("format", "auto", ("auto", *layouts.FORMATS), "Format of the input.")
_IMAGES = flags.DEFINE_string(
  "images", "", "Folder of the images of a list; default: the folder of the list."
)
_HOLDOUT = flags.DEFINE_float("holdout", 0.0, "Fraction of the images in the split 'heldout'.")
_MAX_SIDE = flags.DEFINE_integer("max_side", 0, "Downscale larger images to this many pixels.")
_REENCODE = flags.DEFINE_bool("reencode", False, "Store every image as a new JPEG.")
_QUALITY = flags.DEFINE_integer("quality", 92, "Quality of written JPEGs.")
_TEMPLATE = flags.DEFINE_string(
  "caption_template", "", "Caption for images that have only a label: 'a photo of a {}'."
)
_REQUIRE_CAPTION = flags.DEFINE_bool("require_caption", False, "Skip images without caption.")
_FOLLOW_LINKS = flags.DEFINE_bool(
  "follow_links", False, "Follow links that point outside the folder of images."
)
_LIMIT = flags.DEFINE_integer("limit", 0, "Convert only a sample of this many images.")
_SHARD_MB = flags.DEFINE_integer("shard_mb", 64, "Approximate size of a shard.")

CLASSES = "classes.txt"  # stored next to the shards; label i is on line i + 1


def main() -> None:
  if not _INPUT.value or not common_flags.OUTPUT.value:
    raise UserError("give --input=FOLDER and --output=FOLDER; --helpshort lists all flags")
  with common_flags.resumable(), user_errors():
    summary = convert(_INPUT.value, common_flags.local_path(common_flags.OUTPUT.value))
  print(summary)
  if not sum(summary.examples.values()):
    reasons = fs.printable(f"{summary.directory}/{writer.SKIPPED}")
    raise UserError(f"no image is usable; {reasons} lists the reasons")


def convert(source: str, output: Path) -> writer.Summary:
  """Convert a collection according to the flags.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  if _SHARD_MB.value < 1:
    raise ValueError(f"shard_mb={_SHARD_MB.value}: expected at least 1.")
  if _LIMIT.value < 0:
    raise ValueError(f"limit={_LIMIT.value}: expected 0 (all images) or a number of images.")
  outputs.check_names(output, (CLASSES,))
  shards.check_holdout(_HOLDOUT.value)
  options = shards.Options(
    max_side=_MAX_SIDE.value,
    reencode=_REENCODE.value,
    quality=_QUALITY.value,
    caption_template=_TEMPLATE.value,
    require_caption=_REQUIRE_CAPTION.value,
    follow_links=_FOLLOW_LINKS.value,
  )
  images = os.path.expanduser(_IMAGES.value or "")
  for path in (source, images):
    if fs.is_remote(path):
      raise ValueError(f"{path}: only local files can be converted; copy it to a local disk first.")
  print(f"listing {fs.printable(source)}", file=sys.stderr)
  found = layouts.read(
    os.path.expanduser(source), _FORMAT.value or "auto", images, options.follow_links
  )
  _report(source, found)
  if _LIMIT.value:
    found = shards.sample(found, _LIMIT.value, common_flags.SEED.value)
  with tempfile.TemporaryDirectory() as folder:
    plan = shards.plan(
      found,
      folder,
      options,
      holdout=_HOLDOUT.value,
      shard_bytes=_SHARD_MB.value << 20,
      seed=common_flags.SEED.value,
    )
    recipe = {
      "kind": f"converted {found.format}",
      "version": 2,
      "items": len(found.items),
      "content of the input": shards.digest(found),
      "options": _recipe_options(options),
      "holdout": _HOLDOUT.value,
      "seed": common_flags.SEED.value,
    }
    total = len(found.items) + len(found.skips)
    with progress.Counter("converting", total) as counter:
      summary = writer.write_dataset(
        output,
        plan.shards,
        plan,
        recipe,
        workers=common_flags.WORKERS.value,
        progress=counter,
        overwrite=common_flags.OVERWRITE.value,
      )
  if found.notes.counts:
    print(f"note: {found.notes}")
  if plan.classes:
    text = "".join(f"{label}\n" for label in plan.classes).encode()
    names = output / CLASSES
    if not names.exists() or names.read_bytes() != text:  # a complete data set may be read-only
      fs.write_atomic(str(names), text)
  return summary


def _recipe_options(options: shards.Options) -> dict[str, Any]:
  """Return the options for a recipe, without newer options that are off, for compatibility."""
  values = dataclasses.asdict(options)
  return {name: value for name, value in values.items() if name != "follow_links" or value}


def _report(source: str, found: layouts.Listing) -> None:
  """Print a summary of the input, with skips and notes."""
  print(layouts.describe(source, found), file=sys.stderr)
  reasons = Counter(skip.reason for skip in found.skips)
  for reason, count in reasons.items():
    first = next(skip for skip in found.skips if skip.reason == reason)
    key = layouts.text_rules.printable(first.key)
    print(f"skipped: {count:,} {reason} (the first: {key})", file=sys.stderr)
  if found.notes.counts:
    print(f"note: {found.notes}", file=sys.stderr)


if __name__ == "__main__":
  run_app(main)
