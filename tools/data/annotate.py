"""Write annotations of a source: sizes, hashes, embeddings, similarities and scores of a model.

  bazel run //tools/data:annotate -- --input=/data/shards --split=train --output=/data/annotations \
    --model=/tmp/ov-export/safetensors

--input is any data that training reads. --model is a folder of
`//apps:export -- --format=safetensors`; without it, embeddings and similarities are omitted.
--caption_likelihood adds the mean log likelihood per token of the first caption, if the model is a
captioner, and --heads=aesthetics=FILE a linear function of the image embedding. The output has one
Parquet file per shard (`ov_data.annotations` lists the columns), and //tools/data:keep selects
records by them. Repeat the command to resume an interrupted run.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import os

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.data import source_flags

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the annotations.")
_MODEL = flags.DEFINE_string("model", None, "Folder of an exported model; default: none.")
_LIKELIHOOD = flags.DEFINE_bool(
  "caption_likelihood", False, "Add the log likelihood per token of the first caption."
)
_HEADS = flags.DEFINE_list(
  "heads", [], "Linear heads on the embedding, COLUMN=FILE; .safetensors or .npz with weight, bias."
)
_TEXTS = flags.DEFINE_bool("texts", False, "Store the captions, to balance by queries.")
_THREADS = flags.DEFINE_integer("threads", 0, "Threads that decode; default: one per core.")


def main() -> None:
  if not (source_flags.INPUT.value and _OUTPUT.value):
    raise UserError("give --input=DATA and --output=FOLDER, and --model=FOLDER for embeddings")
  try:
    with user_errors():
      print(annotate(os.path.expanduser(_OUTPUT.value)))
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def annotate(out: str) -> str:
  """Annotate according to the flags and return a summary.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; missing flags are reported before.
  import ov_data
  from ov_data import annotation
  import ov_serve
  from tools.data import linear_heads
  from tools.data.progress import Counter

  heads = linear_heads.read_heads(_HEADS.value)
  dataset = source_flags.open_input()
  model = None if not _MODEL.value else ov_serve.Model.load(os.path.expanduser(_MODEL.value))
  try:
    with Counter("annotating", len(dataset)) as counter:
      summary = annotation.annotate(
        dataset,
        out,
        model=model,
        likelihood=_LIKELIHOOD.value,
        heads=heads,
        texts=_TEXTS.value,
        batch_size=source_flags.BATCH_SIZE.value,
        threads=_THREADS.value or None,
        max_bad_fraction=source_flags.MAX_BAD.value,
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
