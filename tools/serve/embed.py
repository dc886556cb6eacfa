"""Embed the images of a collection into an index for //tools/serve:search and //tools/serve.

  bazel run //tools/serve:embed -- --model=/tmp/ov-export/safetensors --input=/data/photos \
    --out=/data/photos.index

--model is a folder of `//apps:export -- --format=safetensors`. --input is any data that training
reads, or a folder of images without captions. Repeat the command to resume an interrupted run, or
to update the index of a changed collection: only new and changed images are embedded.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import contextlib

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.serve.common_flags import MODEL

_INPUT = flags.DEFINE_string("input", None, "Images: a folder, a list, or record shards.")
_OUT = flags.DEFINE_string("out", None, "Folder of the index.")
_SPLIT = flags.DEFINE_string("split", None, "Split or slice of the input, such as 'train[:1000]'.")
_FORMAT = flags.DEFINE_string("format", "auto", "Layout of image files, see ov_data.layouts.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the images of a list.")
_IMAGE_KEY = flags.DEFINE_string("image_key", "jpg", "Feature with the image, for shards.")
_CAPTION_KEYS = flags.DEFINE_list("caption_keys", None, "Features with captions; default: txt.")
_FOLLOW_LINKS = flags.DEFINE_bool("follow_links", False, "Follow links that leave the folder.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per batch.")
_GRAPH = flags.DEFINE_enum(
  "graph", "auto", ("auto", "yes", "no"), "Build an HNSW graph; auto: from 100,000 images on."
)
_HOST = flags.DEFINE_integer(
  "host_index", 0, "Index of this host, of --host_count hosts with a shared folder."
)
_HOSTS = flags.DEFINE_integer("host_count", 1, "Number of hosts that give this command.")
_MAX_BAD = flags.DEFINE_float("max_bad_fraction", 0.1, "Fraction of unusable images that stops.")


def main() -> None:
  if not (MODEL.value and _INPUT.value and _OUT.value):
    raise UserError("give --model=FOLDER, --input=IMAGES and --out=FOLDER")
  try:
    with user_errors():
      print(embed(MODEL.value, _INPUT.value, _OUT.value))
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def embed(model_folder: str, path: str, out: str) -> str:
  """Embed according to the flags and return a summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; missing flags are reported before.
  import ov_data
  import ov_serve
  from tools.data.progress import Counter

  dataset = ov_serve.open_images(
    path,
    split=_SPLIT.value,
    format=_FORMAT.value,
    image_root=_IMAGES.value,
    image_key=_IMAGE_KEY.value,
    caption_keys=None if _CAPTION_KEYS.value is None else tuple(_CAPTION_KEYS.value),
    follow_links=_FOLLOW_LINKS.value,
  )
  model = ov_serve.Model.load(model_folder)
  with contextlib.ExitStack() as stack:
    counter: Counter | None = None
    seen = 0

    def progress(done: int, total: int) -> None:
      nonlocal counter, seen
      if counter is None:
        counter = stack.enter_context(Counter("embedding", total))
      counter(done - seen)
      seen = done

    try:
      summary = ov_serve.embed(
        model,
        dataset,
        out,
        model_folder=model_folder,
        batch_size=_BATCH_SIZE.value,
        graph={"auto": None, "yes": True, "no": False}[_GRAPH.value],
        host=_HOST.value,
        hosts=_HOSTS.value,
        max_bad_fraction=_MAX_BAD.value,
        progress=progress,
      )
    except ov_data.TooManyBadRecords as error:
      raise ValueError(str(error)) from error
  done = f"{summary.embedded:,} images embedded, {summary.reused:,} unchanged"
  if not summary.complete:
    return f"{done}; other hosts are still embedding"
  lines = [f"{out}: {summary.count:,} images; {done}"]
  if summary.damaged:
    lines.append(f"damaged: {summary.damaged:,}, moved to {out}/damaged-* and embedded again")
  lines += [f"skipped: {count:,} {reason}" for reason, count in summary.bad.items()]
  if summary.bad:
    lines.append(f"{out}/errors-*.jsonl lists them")
  if summary.recall_at_10 is not None:
    lines.append(f"graph: recall@10 {summary.recall_at_10:.4f} against exact search")
  return "\n".join(lines)


if __name__ == "__main__":
  run_app(main)
