"""Write annotations of a source: sizes, hashes, and embeddings and similarities of a model.

  bazel run //tools/data:annotate -- --input=/data/shards --split=train --output=/data/annotations \
    --model=/tmp/ov-export/safetensors

--input is any data that training reads. --model is a folder of
`//apps:export -- --format=safetensors`; without it, embeddings and similarities are omitted. The
output has one Parquet file per shard (`ov_data.annotations` lists the columns), and
//tools/data:keep selects records by them. Repeat the command to resume an interrupted run.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import os

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

_INPUT = flags.DEFINE_string("input", None, "Source: shards, a list, or a folder of images.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the annotations.")
_MODEL = flags.DEFINE_string("model", None, "Folder of an exported model; default: none.")
_SPLIT = flags.DEFINE_string("split", None, "Split or slice of the input, such as 'train[:1000]'.")
_FORMAT = flags.DEFINE_string("format", "auto", "Layout of image files, see ov_data.layouts.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the images of a list.")
_IMAGE_KEY = flags.DEFINE_string("image_key", "jpg", "Feature with the image, for shards.")
_CAPTION_KEYS = flags.DEFINE_list("caption_keys", None, "Features with captions; default: txt.")
_FOLLOW_LINKS = flags.DEFINE_bool("follow_links", False, "Follow links that leave the folder.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per batch of the model.")
_THREADS = flags.DEFINE_integer("threads", 0, "Threads that decode; default: one per core.")
_MAX_BAD = flags.DEFINE_float("max_bad_fraction", 0.1, "Fraction of unusable records that stops.")


def main() -> None:
  if not (_INPUT.value and _OUTPUT.value):
    raise UserError("give --input=DATA and --output=FOLDER, and --model=FOLDER for embeddings")
  try:
    with user_errors():
      print(annotate(os.path.expanduser(_INPUT.value), os.path.expanduser(_OUTPUT.value)))
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def annotate(path: str, out: str) -> str:
  """Annotate according to the flags and return a summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; missing flags are reported before.
  import ov_data
  from ov_data import annotation
  import ov_serve
  from tools.data.progress import Counter

  dataset = ov_serve.open_images(
    path,
    split=_SPLIT.value,
    format=_FORMAT.value,
    image_root=None if _IMAGES.value is None else os.path.expanduser(_IMAGES.value),
    image_key=_IMAGE_KEY.value,
    caption_keys=None if _CAPTION_KEYS.value is None else tuple(_CAPTION_KEYS.value),
    follow_links=_FOLLOW_LINKS.value,
  )
  model = None if not _MODEL.value else ov_serve.Model.load(os.path.expanduser(_MODEL.value))
  try:
    with Counter("annotating", len(dataset)) as counter:
      summary = annotation.annotate(
        dataset,
        out,
        model=model,
        batch_size=_BATCH_SIZE.value,
        threads=_THREADS.value or None,
        max_bad_fraction=_MAX_BAD.value,
        progress=counter,
      )
  except ov_data.TooManyBadRecords as error:
    raise ValueError(str(error)) from error
  lines = [f"{out}: {summary.records:,} records; {summary.annotated:,} annotated in this run"]
  if summary.damaged:
    lines.append(f"damaged: {summary.damaged:,} files, renamed to *.damaged-N and computed again")
  for reason, count in summary.bad.items():
    lines.append(f"unusable: {count:,} {reason} (the first: {summary.first_bad[reason]})")
  return "\n".join(lines)


if __name__ == "__main__":
  run_app(main)
