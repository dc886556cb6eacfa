"""Write a keep-list: the records of a source that pass filters and are no duplicates.

  bazel run //tools/data:keep -- --annotations=/data/annotations --output=/data/train.keep \
    --where='similarity > 0.25 and width >= 200' --exact_duplicates --perceptual_distance=6 \
    --embedding_similarity=0.97 --balance_queries=queries.txt --balance_limit=20000

--annotations is the output of //tools/data:annotate. Train on the kept records with
--config.input.keep_list=/data/train.keep.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before slow imports

import dataclasses
import os

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Folder of //tools/data:annotate.")
_OUTPUT = flags.DEFINE_string("output", None, "File of the keep-list.")
_WHERE = flags.DEFINE_string(
  "where",
  "",
  "Condition on columns of numbers, such as width, height and similarity, that kept records meet, "
  "with + - * /, comparisons, and, or, not, and 'is None'.",
)
_EXACT = flags.DEFINE_bool("exact_duplicates", False, "Drop repeated images with equal bytes.")
_DISTANCE = flags.DEFINE_integer(
  "perceptual_distance", None, "Drop images with at most this many different bits of 63."
)
_SIMILARITY = flags.DEFINE_float(
  "embedding_similarity", None, "Drop images whose embeddings are at least this similar."
)
_QUERIES = flags.DEFINE_string(
  "balance_queries", None, "File with one query per line; their matches balance the records."
)
_CLUSTERS = flags.DEFINE_integer(
  "balance_clusters", 0, "Number of clusters of embeddings that balance the records."
)
_LIMIT = flags.DEFINE_integer(
  "balance_limit", None, "Records that a query or cluster keeps on average."
)
_SEED = flags.DEFINE_integer("balance_seed", 0, "Seed of the balance.")


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
  from tools.data import balance, selection
  from tools.data.progress import Counter

  queries: tuple[str, ...] = ()
  if _QUERIES.value:
    queries = tuple(balance.read_queries(os.path.expanduser(_QUERIES.value))) or ("",)
  rules = selection.Rules(
    _WHERE.value, _EXACT.value, _DISTANCE.value, _SIMILARITY.value, queries, _CLUSTERS.value,
    _LIMIT.value,
  )  # fmt: skip
  if rules == selection.Rules():
    raise ValueError(
      "no rule: give --where, --exact_duplicates, --perceptual_distance, --embedding_similarity, "
      "--balance_queries or --balance_clusters"
    )
  rules = dataclasses.replace(rules, seed=_SEED.value)
  if os.path.lexists(out):
    raise ValueError(f"{out} exists, and runs may use it; choose another --output, or remove it")
  if not os.path.isdir(os.path.dirname(out) or "."):
    raise ValueError(f"{os.path.dirname(out)} is not a folder; create it, or change --output")
  annotations = Annotations.open(folder)
  total = len(annotations) * selection.passes(rules)
  with Counter("selecting", total) as counter:
    selected = selection.select(annotations, rules, counter)
  kept = selected.keep
  kept.write(out)
  lines = [selection.table(selected.dropped, kept.records)]
  if selected.balance is not None:
    lines.append(str(selected.balance))
  lines.append(
    f"{out}: {len(kept):,} of {kept.records:,} records kept, fingerprint {kept.fingerprint}"
  )
  return "\n".join(lines)


if __name__ == "__main__":
  run_app(main)
