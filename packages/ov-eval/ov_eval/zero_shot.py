"""Zero-shot classification with two towers: which class's texts lie nearest to the picture?"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import operator
from typing import Any, Self

import numpy as np

from ov_eval.classes import ClassSet, TemplateSet, class_texts
from ov_eval.embeddings import Progress, embed_texts
from ov_eval.generative import Classification, class_ranks
from ov_eval.likelihood import Batch, one_late
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
  """One vector per class, float32 [C, E]: the mean over the templates, brought to unit length.

  z / (|z| + 1e-8) with z the mean of unit vectors (arXiv 2103.00020, section 3.1.4).

  Args:
    embed_text, encode, chunk, progress: see `embed_texts`; `embed_text` returns unit vectors.
    classes: C names.
    templates: the prompts that each name is put into.
    canonical: canonicalises names and templates; False where `encode` does.

  Raises:
    ValueError: for vectors that are not of unit length.
  """
  texts = class_texts(classes, templates, canonical=canonical)
  rows = embed_texts(embed_text, encode, texts, chunk=chunk, progress=progress)
  norms = np.linalg.norm(rows, axis=1)
  if np.abs(norms - 1).max() > 1e-2:
    worst = norms[np.abs(norms - 1).argmax()]
    raise ValueError(
      f"embed_text gave a vector of length {worst:.4g}; it must return unit vectors."
    )
  num_classes = len(classes.classes if isinstance(classes, ClassSet) else classes)
  mean = rows.reshape(num_classes, -1, rows.shape[-1]).mean(1, dtype=np.float64)
  return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
  """What was answered for each example; arrays [N] in order of `index`.

  Attributes:
    index: int64, of the example in its data set.
    label: int64, the true class.
    predicted: int64, the class with the highest score.
    rank: int64, how many classes stand before the true one; 0 is right.
    score: float32, of the predicted class.
    label_score: float32, of the true class.
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
    """Some rows, by slice, numbers or mask."""
    return type(self)(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

  @classmethod
  def of(cls, scores: np.ndarray, labels: np.ndarray, index: np.ndarray) -> Self:
    """From scores [B, C], labels [B] and index [B] of valid rows; ties as in `Classification`.

    Raises:
      ValueError: for a label outside [0, C) or a NaN score.
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
    """The figures."""
    return Classification(
      Share.of(self.rank < 1),
      Share.of(self.rank < 5),
      Confusion.of(self.label, self.predicted, num_classes),
    )

  def records(self, classes: ClassSet | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One dict per example for a JSON file; with `classes` the names of both classes too."""
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
  """Scores every picture against every class by the dot product.

  Args:
    embed_image: batch -> [B, E], the rows of this process.
    class_matrix: float32 [C, E], as of `class_embeddings`.
    batches: each with `label` int [B], `valid` bool [B] and `index` int [B]. A row that is not
      valid never counts, and an index that comes again, here or in another process, counts once.
    gather: value -> values of all processes; called once, at the end.
    progress: is told (batches done, batches in all or 0 where that is not known).

  Returns:
    The figures, and the answer to each example; both over all processes.

  Raises:
    ValueError: for a label outside [0, C), a NaN score, or an index with two labels.
  """
  batches_in_all = operator.length_hint(batches)
  # float64 rounded once: equal class vectors get equal scores for any size of batch.
  matrix = np.asarray(class_matrix, np.float64).T
  parts = [Predictions.of(np.zeros((0, matrix.shape[1]), np.float32), *np.zeros((2, 0), int))]
  for done, (batch, vectors) in enumerate(one_late(embed_image, batches), 1):
    valid = np.asarray(batch["valid"], bool)
    scores = (np.asarray(vectors, np.float64)[valid] @ matrix).astype(np.float32)
    parts.append(
      Predictions.of(scores, np.asarray(batch["label"])[valid], np.asarray(batch["index"])[valid])
    )
    if progress:
      progress(done, batches_in_all)
  everything = _join([part for several in gather(parts) for part in several])
  first = np.unique(everything.index, return_index=True)[1]
  # Repeats of one example must agree; if not, the index does not name the example.
  place = first[np.searchsorted(everything.index[first], everything.index)]
  differs = everything.label != everything.label[place]
  if differs.any():
    raise ValueError(
      f"index {everything.index[differs][0]} comes with two labels; `index` must name an example "
      "of the whole data set, the same on every process."
    )
  predictions = everything[first]
  return predictions.classification(matrix.shape[1]), predictions


def worst_mistakes(predictions: Predictions, limit: int = 10) -> Predictions:
  """The wrong answers whose score lies furthest above that of the true class, worst first."""
  wrong = predictions[predictions.rank > 0]
  order = np.argsort(wrong.label_score - wrong.score, kind="stable")
  return wrong[order[:limit]]


def _join(parts: Sequence[Predictions]) -> Predictions:
  names = [field.name for field in dataclasses.fields(Predictions)]
  return Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))
