"""Generated captions: generation over a data set, attribute accuracy and statistics."""

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
  """Generated caption of one image with its reference captions.

  Attributes:
    index: index of the example in the data set.
    generated: generated caption.
    references: reference captions of the data set, at least one for `caption_metrics`.
    extras: additional data of the caller, such as ground truth.
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
  """Return captions of the first `limit` valid examples, in the order of the batches.

  Args:
    generate_fn: maps a batch to ids int [B, T], the rows of this process.
    detokenize: maps ids [T] to text.
    batches: batches with `valid` bool [B], `index` int [B] and `references`, a list of B sequences
      of texts. Pass the original texts of the data set: detokenized ids lack what the tokenizer
      does not preserve.
    limit: maximum number of examples over all processes; None for all.
    extras: maps (batch, row) to `CaptionRecord.extras`.
    gather: maps a value to the values of all processes; called once per batch, so that all
      processes stop together.

  Raises:
    ValueError: if a batch has no `references`.
  """
  records: list[CaptionRecord] = []
  for batch in batches:
    if "references" not in batch:
      raise ValueError(
        f"a batch has {', '.join(map(str, batch))}, but no references; add the reference captions "
        "of each row as texts."
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
  """Accuracy of attributes in generated captions.

  Attributes:
    overall: fraction of correct attributes.
    by_kind: the same for each kind of attribute, in order of first occurrence.
    all_correct: fraction of captions with all attributes correct.
    exact_match: fraction of captions equal to a reference; see `caption_text.is_exact`.
  """

  overall: Share
  by_kind: dict[str, Share]
  all_correct: Share
  exact_match: Share

  def results(self, level: float = 0.95) -> list[Result]:
    """Return `attribute_accuracy[/<kind>]`, `all_attributes_correct` and `exact_match`.

    Without ground truth, only `exact_match` is returned.
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
  """Compare each caption with the ground truth of its image.

  Args:
    records: records returned by `generate_captions`.
    score_fn: maps a record to {kind: (correct attributes, total attributes)}. A record without
      attributes counts only for `exact_match`.
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
  """Return mean length and diversity of captions; low diversity reveals a collapsed model.

  Words are those of `caption_text.caption_words`.

  Returns:
    `caption_words` and `reference_words` (mean lengths), `distinct_captions` and
    `distinct_references` (fractions of distinct texts); without those of captions or references
    of which there are none.
  """
  generated = [compared_words(r.generated, ())[0] for r in records]
  references = [caption_words(text) for r in records for text in r.references]
  results = []
  for name, captions in (("caption", generated), ("reference", references)):
    if not captions:
      continue
    length = Mean.of([len(words) for words in captions])
    results.append(length.result(f"{name}_words", unit="words"))
    distinct = len(set(map(tuple, captions))) / len(captions)
    results.append(Result(f"distinct_{name}s", distinct, len(captions), unit="share"))
  return results
