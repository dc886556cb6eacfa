"""Write a keep-list: the records of a source that pass filters and are no duplicates.

  bazel run //tools/data:keep -- --annotations=/data/annotations --output=/data/train.keep \
    --where='similarity > 0.25 and width >= 200' --exact_duplicates --perceptual_distance=6 \
    --embedding_similarity=0.97

--annotations is the output of //tools/data:annotate. Train on the kept records with
--config.input.keep_list=/data/train.keep.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import os

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Folder of //tools/data:annotate.")
_OUTPUT = flags.DEFINE_string("output", None, "File of the keep-list.")
_WHERE = flags.DEFINE_string(
  "where",
  "",
  "Condition on record, width, height and similarity that kept records meet, with + - * /, "
  "comparisons, and, or, not, and 'is None'.",
)
_EXACT = flags.DEFINE_bool("exact_duplicates", False, "Drop repeated images with equal bytes.")
_DISTANCE = flags.DEFINE_integer(
  "perceptual_distance", None, "Drop images with at most this many different bits of 63."
)
_SIMILARITY = flags.DEFINE_float(
  "embedding_similarity", None, "Drop images whose embeddings are at least this similar."
)


def main() -> None:
  if not (_ANNOTATIONS.value and _OUTPUT.value):
    raise UserError("give --annotations=FOLDER and --output=FILE, and at least one rule")
  with user_errors():
    print(keep(os.path.expanduser(_ANNOTATIONS.value), os.path.expanduser(_OUTPUT.value)))


def keep(folder: str, out: str) -> str:
  """Write the keep-list according to the flags and return a table of the dropped records.

  Raises:
    ValueError, OSError: if flags or annotations are invalid; the messages address the user.
  """
  from ov_data.annotations import Annotations
  from tools.data import selection
  from tools.data.progress import Counter

  rules = selection.Rules(_WHERE.value, _EXACT.value, _DISTANCE.value, _SIMILARITY.value)
  if rules == selection.Rules():
    raise ValueError(
      "no rule: give --where, --exact_duplicates, --perceptual_distance or --embedding_similarity"
    )
  if os.path.lexists(out):
    raise ValueError(f"{out} exists, and runs may use it; choose another --output, or remove it")
  if not os.path.isdir(os.path.dirname(out) or "."):
    raise ValueError(f"{os.path.dirname(out)} is not a folder; create it, or change --output")
  annotations = Annotations.open(folder)
  total = len(annotations) * selection.passes(rules)
  with Counter("selecting", total) as counter:
    kept, counts = selection.select(annotations, rules, counter)
  kept.write(out)
  return (
    f"{selection.table(counts, kept.records)}\n"
    f"{out}: {len(kept):,} of {kept.records:,} records kept, fingerprint {kept.fingerprint}"
  )


if __name__ == "__main__":
  run_app(main)
