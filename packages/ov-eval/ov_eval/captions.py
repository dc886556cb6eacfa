"""Generated captions: collecting them, and what can be counted on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from ov_eval.caption_text import caption_words, compared_words, is_exact
from ov_eval.likelihood import Batch
from ov_eval.processes import gather as gather_processes
from ov_eval.results import Result
from ov_eval.states import Mean, Share


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
  """A generated caption and the true ones.

  Attributes:
    index: of the example in its data set.
    generated: the model's caption.
    references: true captions as in the data set, at least one.
    extras: whatever else the caller wants to keep, such as ground truth.
  """

  index: int
  generated: str
  references: tuple[str, ...]
  extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def generate_captions(
  generate_fn: Callable[[Batch], Any],
  detokenize: Callable[[np.ndarray], str],
  batches: Iterable[Batch],
  *,
  limit: int | None = None,
  extras: Callable[[Batch, int], Mapping[str, Any]] | None = None,
  gather: Callable[[Any], list[Any]] = gather_processes,
) -> list[CaptionRecord]:
  """Captions for the first `limit` valid examples, in the order of the batches.

  Args:
    generate_fn: batch -> ids int [B, T] for the rows of this process.
    detokenize: ids [T] -> text.
    batches: each with `valid` bool [B], `index` int [B] and `references`, a list of B sequences of
      texts. These are the texts of the data set: ids turned into text again would have lost what
      the tokenizer does not keep.
    limit: examples over all processes; None takes every one.
    extras: (batch, row) -> what to keep in `CaptionRecord.extras`.
    gather: value -> values of all processes; called once per batch, so that all stop together.

  Raises:
    ValueError: a batch has no `references`.
  """
  records: list[CaptionRecord] = []
  for batch in batches:
    if "references" not in batch:
      raise ValueError(
        f"a batch has {', '.join(map(str, batch))}, but no references; give the true captions of "
        "each row as texts."
      )
    generated = np.asarray(jax.device_get(generate_fn(batch)))
    mine = [
      CaptionRecord(
        index=int(batch["index"][row]),
        generated=detokenize(generated[row]),
        references=tuple(batch["references"][row]),
        extras=dict(extras(batch, row)) if extras else {},
      )
      for row in np.flatnonzero(batch["valid"]).tolist()
    ]
    records += [record for part in gather(mine) for record in part]
    if limit is not None and len(records) >= limit:
      return records[:limit]
  return records


@dataclasses.dataclass(frozen=True)
class AttributeAccuracy:
  """Attributes right in generated captions.

  Attributes:
    overall: over all attributes.
    by_kind: the same per kind, in the order in which kinds are met.
    all_correct: captions with every attribute right.
    exact_match: captions with the words of a reference; see `caption_text.is_exact`.
  """

  overall: Share
  by_kind: dict[str, Share]
  all_correct: Share
  exact_match: Share

  def results(self, level: float = 0.95) -> list[Result]:
    """`attribute_accuracy` overall and `/<kind>`, `all_attributes_correct`, `exact_match`.

    Without ground truth there is `exact_match` only.
    """
    named = {
      "attribute_accuracy": self.overall,
      **{f"attribute_accuracy/{kind}": share for kind, share in self.by_kind.items()},
      "all_attributes_correct": self.all_correct,
      "exact_match": self.exact_match,
    }
    return [share.result(name, level) for name, share in named.items() if share.count]


def attribute_accuracy(
  records: Sequence[CaptionRecord],
  score_fn: Callable[[CaptionRecord], Mapping[str, tuple[int, int]]],
) -> AttributeAccuracy:
  """Checks each caption against the ground truth of its picture.

  Args:
    records: from `generate_captions`.
    score_fn: record -> {kind: (attributes right, attributes in all)}. A record without
      attributes counts for `exact_match` only.
  """
  scored = [score for score in map(score_fn, records) if score]
  kinds = dict.fromkeys(kind for score in scored for kind in score)
  sums = [tuple(map(sum, zip(*score.values(), strict=True))) for score in scored]
  of_kind = {kind: [score[kind] for score in scored if kind in score] for kind in kinds}
  return AttributeAccuracy(
    overall=_share(sums),
    by_kind={kind: _share(pairs) for kind, pairs in of_kind.items()},
    all_correct=Share.of([right == total for right, total in sums]),
    exact_match=Share.of([is_exact(r.generated, r.references) for r in records]),
  )


def _share(pairs: Sequence[tuple[int, ...]]) -> Share:
  return Share.of([right for right, _ in pairs], [total for _, total in pairs])


def caption_statistics(records: Sequence[CaptionRecord]) -> list[Result]:
  """Length in words, and how many captions differ: this shows a model that repeats one caption.

  Words are those of `caption_text.caption_words`.

  Returns:
    `caption_words` and `reference_words` (means), `distinct_captions` and `distinct_references`
    (share of different texts among all); empty without records.
  """
  if not records:
    return []
  generated = [compared_words(r.generated, ())[0] for r in records]
  references = [caption_words(text) for r in records for text in r.references]
  results = []
  for name, captions in (("caption", generated), ("reference", references)):
    length = Mean.of([len(words) for words in captions])
    results.append(length.result(f"{name}_words", unit="words"))
    distinct = len(set(map(tuple, captions))) / len(captions)
    results.append(Result(f"distinct_{name}s", distinct, len(captions), unit="share"))
  return results
