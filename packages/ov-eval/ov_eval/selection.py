"""Selection of the right caption or image among a few, for compositional benchmarks.

An instance has I images and C captions; image i belongs to caption i. SugarCrepe (arXiv 2306.14610)
has one image and two captions, the second of which is wrong. Winoground (arXiv 2204.03162) has two
images and two captions with the same words. WinoGAViL (arXiv 2207.12576) has a cue and several
images, some of which are associated with it.
"""

import dataclasses

import numpy as np

from ov_eval.states import Share


@dataclasses.dataclass(frozen=True)
class Selection:
  """Fraction of instances with correct selections.

  Attributes:
    image: every caption is most similar to its image; always 1 for instances of one image.
    text: every image is most similar to its caption.
    both: both hold.
  """

  image: Share
  text: Share
  both: Share


def select_pairs(images: np.ndarray, texts: np.ndarray) -> Selection:
  """Return the fraction of instances whose images and captions select each other.

  A caption or image that is as similar to a wrong candidate as to the right one counts as wrong, as
  in both papers. CLIP_benchmark takes the first candidate of equal ones, which is the right one in
  SugarCrepe.

  Args:
    images: unit vectors float [N, I, E].
    texts: unit vectors float [N, C, E].

  Raises:
    ValueError: if the shapes do not match or there is no instance.
  """
  images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
  if images.ndim != 3 or texts.ndim != 3 or not len(images) or len(images) != len(texts):
    raise ValueError(
      f"images {images.shape} and texts {texts.shape} must have the shapes [N, I, E] and [N, C, E] "
      "with at least one instance."
    )
  scores = images @ texts.swapaxes(1, 2)  # [N, I, C]
  text = _right_is_best(scores)
  image = _right_is_best(scores.swapaxes(1, 2))
  return Selection(Share.of(image), Share.of(text), Share.of(image & text))


def _right_is_best(scores: np.ndarray) -> np.ndarray:
  """Return bool [N], whether the first min(Q, K) queries of scores [N, Q, K] select candidate q."""
  count = min(scores.shape[1:])
  scores = scores[:, :count]
  right = np.eye(*scores.shape[1:]) > 0
  own = scores[:, right]
  wrong = np.where(right, -np.inf, scores).max(2)
  return np.asarray((own > wrong).all(1), bool)


def jaccard(scores: np.ndarray, targets: np.ndarray) -> float:
  """Return the Jaccard index of the associated images and as many images with the highest scores.

  Equal scores rank in stored order.

  Args:
    scores: float [I], similarity of each image to the cue.
    targets: bool [I], whether the image is associated with the cue, at least one.

  >>> round(jaccard(np.array([0.9, 0.1, 0.5]), np.array([1, 1, 0])), 3)
  0.333
  """
  targets = np.asarray(targets).astype(bool)
  best = np.argsort(-np.asarray(scores, np.float64), kind="stable")[: targets.sum()]
  hits = int(targets[best].sum())
  return hits / (2 * int(targets.sum()) - hits)
