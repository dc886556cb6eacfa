"""Zero-shot classification by the similarity of image and class text embeddings."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import operator
from typing import Any, Self

import numpy as np

from ov_eval.classes import ClassSet, TemplateSet, class_texts
from ov_eval.embeddings import Progress, embed_texts
from ov_eval.generative import Classification, class_ranks
from ov_eval.likelihood import Batch, dispatch_ahead
from ov_eval.processes import gather as gather_processes
from ov_eval.states import Confusion, Share


def class_embeddings(
  embed_text: Callable[[np.ndarray], Any],
  encode: Callable[[list[str]], np.ndarray],
  classes: ClassSet | Sequence[str],
  templates: TemplateSet | Sequence[str],
  *,
  chunk: int = 256,
  canonical: bool = True,
  progress: Progress | None = None,
) -> np.ndarray:
  """Return class embeddings float32 [C, E], each the normalised mean over all templates.

  z / (|z| + 1e-8) with z the mean of unit vectors (arXiv 2103.00020, section 3.1.4).

  Args:
    embed_text, encode, chunk, progress: see `embed_texts`; `embed_text` returns unit vectors.
    classes: C class names.
    templates: prompt templates.
    canonical: whether to canonicalise names and templates; pass False if `encode` does it.

  Raises:
    ValueError: if `embed_text` returns vectors that are not unit vectors.
  """
  texts = class_texts(classes, templates, canonical=canonical)
  rows = embed_texts(embed_text, encode, texts, chunk=chunk, progress=progress)
  norms = np.linalg.norm(rows, axis=1)
  if np.abs(norms - 1).max() > 1e-2:
    worst = norms[np.abs(norms - 1).argmax()]
    raise ValueError(
      f"embed_text returned a vector of norm {worst:.4g}; it must return unit vectors."
    )
  num_classes = len(classes.classes if isinstance(classes, ClassSet) else classes)
  mean = rows.reshape(num_classes, -1, rows.shape[-1]).mean(1, dtype=np.float64)
  return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
  """Predictions for all examples; arrays [N] sorted by `index`.

  Attributes:
    index: int64, index of the example in the data set.
    label: int64, true class.
    predicted: int64, class with the highest score.
    rank: int64, rank of the true class; 0 means the prediction is correct.
    score: float32, score of the predicted class.
    label_score: float32, score of the true class.
  """

  index: np.ndarray
  label: np.ndarray
  predicted: np.ndarray
  rank: np.ndarray
  score: np.ndarray
  label_score: np.ndarray

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, rows: Any) -> Self:
    """Return rows selected by slice, indices or mask."""
    return type(self)(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

  @classmethod
  def of(cls, scores: np.ndarray, labels: np.ndarray, index: np.ndarray) -> Self:
    """Return predictions for scores [B, C], labels [B] and index [B] of valid rows.

    Ties rank in order of class number.

    Raises:
      ValueError: if a label is outside [0, C) or a score is NaN.
    """
    rank = class_ranks(scores, labels)
    predicted = scores.argmax(1)
    rows = np.arange(len(scores))
    return cls(
      index=np.asarray(index, np.int64),
      label=np.asarray(labels, np.int64),
      predicted=predicted,
      rank=rank,
      score=scores[rows, predicted],
      label_score=scores[rows, labels],
    )

  def classification(self, num_classes: int) -> Classification:
    """Return the classification metrics."""
    return Classification(
      Share.of(self.rank < 1),
      Share.of(self.rank < 5),
      Confusion.of(self.label, self.predicted, num_classes),
    )

  def records(self, classes: ClassSet | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one JSON-serialisable dict per example, with class names if `classes` is given."""
    names = classes.classes if isinstance(classes, ClassSet) else classes
    columns = {f.name: getattr(self, f.name).tolist() for f in dataclasses.fields(self)}
    if names is not None:
      columns["label_name"] = [names[label] for label in columns["label"]]
      columns["predicted_name"] = [names[label] for label in columns["predicted"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def classify_by_embedding(
  embed_image: Callable[[Batch], Any],
  class_matrix: np.ndarray,
  batches: Iterable[Batch],
  *,
  gather: Callable[[Any], list[Any]] = gather_processes,
  progress: Progress | None = None,
) -> tuple[Classification, Predictions]:
  """Classify every image by the dot products with the class embeddings.

  Args:
    embed_image: maps a batch to [B, E], the rows of this process.
    class_matrix: float32 [C, E], as returned by `class_embeddings`.
    batches: batches with `label` int [B], `valid` bool [B] and `index` int [B]. Invalid rows are
      ignored, and a repeated index, on any process, is counted once.
    gather: maps a value to the values of all processes; called once, at the end.
    progress: called with (batches done, total batches or 0 if unknown).

  Returns:
    The metrics, and the prediction for each example, both over all processes.

  Raises:
    ValueError: if a label is outside [0, C), a score is NaN, or an index has two labels.
  """
  total = operator.length_hint(batches)
  # Round once from float64, so that equal class vectors get equal scores for any batch size.
  matrix = np.asarray(class_matrix, np.float64).T
  parts = [Predictions.of(np.zeros((0, matrix.shape[1]), np.float32), *np.zeros((2, 0), int))]
  for done, (batch, vectors) in enumerate(dispatch_ahead(embed_image, batches), 1):
    valid = np.asarray(batch["valid"], bool)
    scores = (np.asarray(vectors, np.float64)[valid] @ matrix).astype(np.float32)
    parts.append(
      Predictions.of(scores, np.asarray(batch["label"])[valid], np.asarray(batch["index"])[valid])
    )
    if progress:
      progress(done, total)
  everything = _join([part for several in gather(parts) for part in several])
  first = np.unique(everything.index, return_index=True)[1]
  # Repeats of an example must agree; otherwise `index` does not identify the example.
  position = first[np.searchsorted(everything.index[first], everything.index)]
  differs = everything.label != everything.label[position]
  if differs.any():
    raise ValueError(
      f"index {everything.index[differs][0]} has two labels; `index` must identify an example of "
      "the data set, equally on every process."
    )
  predictions = everything[first]
  return predictions.classification(matrix.shape[1]), predictions


def worst_mistakes(predictions: Predictions, limit: int = 10) -> Predictions:
  """Return the most confident mistakes: those with the largest score margin over the true class."""
  wrong = predictions[predictions.rank > 0]
  order = np.argsort(wrong.label_score - wrong.score, kind="stable")
  return wrong[order[:limit]]


def _join(parts: Sequence[Predictions]) -> Predictions:
  names = [field.name for field in dataclasses.fields(Predictions)]
  return Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))
