"""Average precision of images with several labels each."""

import numpy as np


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """Return the average precision of each class, float64 [C].

  The mean over the positive images of a class of the precision among the images ranked up to them.
  Equal scores rank in stored order. A class without positive images has 0, as in CLIP_benchmark;
  the mean over classes is its `mean_average_precision`.

  Args:
    scores: float [N, C], one score for each image and class.
    targets: bool [N, C], whether the image has the label.

  Raises:
    ValueError: if the shapes differ, there is no image, or a score is NaN.

  >>> average_precision(np.array([[3.0], [2.0], [1.0]]), np.array([[1], [0], [1]])).round(
  ...   3
  ... ).tolist()
  [0.833]
  """
  scores, targets = np.asarray(scores, np.float64), np.asarray(targets).astype(bool)
  if scores.ndim != 2 or scores.shape != targets.shape or not len(scores):
    raise ValueError(
      f"scores {scores.shape} and targets {targets.shape} must have one shape [N, C] with at least "
      "one image."
    )
  if np.isnan(scores).any():
    raise ValueError(f"{int(np.isnan(scores).any(1).sum())} images have NaN class scores.")
  order = np.argsort(-scores, axis=0, kind="stable")
  hits = np.take_along_axis(targets, order, 0)
  precision = hits.cumsum(0) / np.arange(1, len(hits) + 1)[:, None]
  return np.asarray((precision * hits).sum(0) / np.maximum(hits.sum(0), 1), np.float64)
