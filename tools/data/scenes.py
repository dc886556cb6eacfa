"""Write the demo data as record shards: synthetic scenes with exact captions.

bazel run //tools/data:scenes -- --output=/tmp/scenes --train=60000 --heldout=1000
bazel run //tools/data:scenes -- --sheet=/tmp/scenes.png      (an image of 24 of them)
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import io
from typing import cast

from absl import flags

from apps.demo import scene_shards, scenes
from apps.trainer.errors import UserError, run_app, user_errors
from ov_data import fs, outputs
from tools.data import common_flags, progress

_TRAIN = flags.DEFINE_integer("train", 20_000, "Number of training scenes.")
_HELDOUT = flags.DEFINE_integer("heldout", 1_000, "Number of scenes with unseen compositions.")
_VAL = flags.DEFINE_integer("val", 0, "Number of additional scenes from the training distribution.")
_SIZE = flags.DEFINE_integer("image_size", 64, "Pixels, 32 to 256.")
_OBJECTS = flags.DEFINE_integer("num_objects", None, "Objects per scene, 1 or 2; default: mixed.")
_SHEET = flags.DEFINE_string("sheet", None, "Local PNG file for a sheet of 24 scenes.")
_SHEET_SPLIT = flags.DEFINE_enum("sheet_split", "train", scenes.SPLITS, "Scenes on the sheet.")


def _check_sheet(value: str) -> None:
  path = outputs.check_file(common_flags.local_path(value))
  if path.suffix.lower() != ".png":
    raise ValueError(f"{path.name}: expected a file name that ends with .png")


common_flags.validate("sheet", _check_sheet)


def main() -> None:
  if not common_flags.OUTPUT.value and not _SHEET.value:
    raise UserError("give --output=FOLDER, or --sheet=FILE.png for a sheet of samples")
  with common_flags.resumable(), user_errors():
    _write()


def _write() -> None:
  if _SHEET.value:
    split = cast(scenes.Split, _SHEET_SPLIT.value)
    sample = [
      scenes.sample_scene(common_flags.SEED.value, i, split, _OBJECTS.value) for i in range(24)
    ]
    buffer = io.BytesIO()
    scenes.contact_sheet(sample, columns=6, image_size=_SIZE.value).save(buffer, "PNG")
    fs.write_atomic(str(common_flags.local_path(_SHEET.value)), buffer.getvalue())
  if common_flags.OUTPUT.value:
    sizes = {"train": _TRAIN.value, "heldout": _HELDOUT.value, "val": _VAL.value}
    sizes = {split: size for split, size in sizes.items() if size}
    with progress.Counter("drawing", sum(sizes.values())) as counter:
      summary = scene_shards.make_scenes_dataset(
        common_flags.local_path(common_flags.OUTPUT.value),
        sizes,
        seed=common_flags.SEED.value,
        image_size=_SIZE.value,
        num_objects=_OBJECTS.value,
        workers=common_flags.WORKERS.value,
        progress=counter,
        overwrite=common_flags.OVERWRITE.value,
      )
    print(summary)


if __name__ == "__main__":
  run_app(main)
