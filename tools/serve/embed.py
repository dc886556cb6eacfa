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
from tools.data import source_flags
from tools.serve.common_flags import MODEL

_OUT = flags.DEFINE_string("out", None, "Folder of the index.")
_GRAPH = flags.DEFINE_enum(
  "graph", "auto", ("auto", "yes", "no"), "Build an HNSW graph; auto: from 100,000 images on."
)
_HOST = flags.DEFINE_integer(
  "host_index", 0, "Index of this host, of --host_count hosts with a shared folder."
)
_HOSTS = flags.DEFINE_integer("host_count", 1, "Number of hosts that give this command.")


def main() -> None:
  if not (MODEL.value and source_flags.INPUT.value and _OUT.value):
    raise UserError("give --model=FOLDER, --input=IMAGES and --out=FOLDER")
  try:
    with user_errors():
      print(embed(MODEL.value, _OUT.value))
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def embed(model_folder: str, out: str) -> str:
  """Embed according to the flags and return a summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; missing flags are reported before.
  import ov_data
  import ov_serve
  from tools.data.progress import Counter

  dataset = source_flags.open_input()
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
        batch_size=source_flags.BATCH_SIZE.value,
        graph={"auto": None, "yes": True, "no": False}[_GRAPH.value],
        host=_HOST.value,
        hosts=_HOSTS.value,
        max_bad_fraction=source_flags.MAX_BAD.value,
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
