"""Converts an image collection into record shards for training.

  bazel run //tools/data:convert -- --input=/data/photos --output=/data/photos_shards

--input is one of
  a folder with captions.jsonl   {"file": "images/a.jpg", "captions": ["...", ...]} a line
  a folder with labels.jsonl     {"file": "images/a.jpg", "label": "dress"} a line
  a folder of class folders      dress/a.jpg, shoes/b.png, ...
  COCO's captions_*.json         with --images=FOLDER
  WebDataset tars                a folder, a glob, or name-{000..099}.tar; jpg|png|webp + txt|json

Every picture is decoded once; what cannot be used is left out, counted by reason and listed in
skipped.jsonl. A stopped run goes on where it was when the same command is given again.
"""

import dataclasses
import os
from pathlib import Path
import sys
import tempfile

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from ov_data import fs, writer
from tools.data import common_flags, inputs, progress, shards

_INPUT = flags.DEFINE_string("input", None, "Folder, list or tars; see above.")
_FORMAT = flags.DEFINE_enum("format", "auto", ("auto", *inputs.FORMATS), "What the input is.")
_IMAGES = flags.DEFINE_string("images", "", "Folder of the pictures, if not that of the list.")
_HOLDOUT = flags.DEFINE_float("holdout", 0.0, "Share of the pictures in the split 'heldout'.")
_MAX_SIDE = flags.DEFINE_integer("max_side", 0, "Larger pictures are shrunk to this many pixels.")
_REENCODE = flags.DEFINE_bool("reencode", False, "Store every picture as a new JPEG.")
_QUALITY = flags.DEFINE_integer("quality", 92, "Of the JPEGs that are written anew.")
_TEMPLATE = flags.DEFINE_string(
  "caption_template", "", "Caption for pictures that have only a label: 'a photo of a {}'."
)
_REQUIRE_CAPTION = flags.DEFINE_bool("require_caption", False, "Leave out what has no caption.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Only so many pictures, to try things out.")
_SHARD_MB = flags.DEFINE_integer("shard_mb", 64, "About the size of a shard.")

CLASSES = "classes.txt"  # beside the shards: label number i stands on line i + 1


def main() -> None:
  if not _INPUT.value or not common_flags.OUTPUT.value:
    raise UserError("give --input=FOLDER and --output=FOLDER; --helpshort lists all flags")
  try:
    with user_errors():
      summary = convert(_INPUT.value, Path(common_flags.OUTPUT.value).expanduser())
  except KeyboardInterrupt:
    raise UserError("stopped; the same command goes on from here") from None
  print(summary)
  if not sum(summary.examples.values()):
    raise UserError(f"not one picture could be used; {summary.directory}/{writer.SKIPPED} says why")


def convert(source: str, output: Path) -> writer.Summary:
  """Does what the flags say.

  Raises:
    ValueError, OSError: a mistake in flags or input, in words for the user.
  """
  if _SHARD_MB.value < 1 or _LIMIT.value < 0:
    raise ValueError("--shard_mb must be at least 1 and --limit not negative.")
  options = shards.Options(
    max_side=_MAX_SIDE.value,
    reencode=_REENCODE.value,
    quality=_QUALITY.value,
    caption_template=_TEMPLATE.value,
    require_caption=_REQUIRE_CAPTION.value,
  )
  print(f"listing {source}", file=sys.stderr)
  images = os.path.expanduser(_IMAGES.value or "")
  found = inputs.read(os.path.expanduser(source), _FORMAT.value or "auto", images)
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
      "version": 1,
      "items": len(found.items),
      "digest": shards.digest(found),
      "options": dataclasses.asdict(options),
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
  if plan.classes:
    fs.write_atomic(str(output / CLASSES), "".join(f"{c}\n" for c in plan.classes).encode())
  return summary


if __name__ == "__main__":
  run_app(main)
