"""Zero-shot classification by the likelihood of class prompts under a caption model."""

import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import json
import re
import string
from typing import Any, Literal, Self

import jax
import numpy as np

from ov_eval.likelihood import Batch
from ov_eval.processes import across_processes
from ov_eval.results import Result
from ov_eval.states import Confusion, Share


def canonicalise(text: str, keep: str = "") -> str:
  """Lowercase, remove ASCII punctuation except the string `keep`, and collapse whitespace.

  `_` becomes a space. The released OpenVision code keeps "," in class names and "{}" in templates.

  >>> canonicalise("A bad photo of a {}.", keep="{}")
  'a bad photo of a {}'
  """
  remove = str.maketrans("", "", string.punctuation)
  parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
  return re.sub(r"\s+", " ", keep.join(part.translate(remove) for part in parts).lower()).strip()


def class_prompts(class_names: Sequence[str], template: str = "a photo of a {}.") -> list[str]:
  """Return one canonicalised prompt per class.

  Raises:
    ValueError: if the template lacks `{}`, two classes get the same prompt, or a name becomes
      empty.
  """
  if "{}" not in template:
    raise ValueError(f"template {template!r} has no {{}} for the class name.")
  pattern = canonicalise(template, keep="{}")
  names = [canonicalise(name, keep=",") for name in class_names]
  if empty := [name for name, text in zip(class_names, names, strict=True) if not text.strip(" ,")]:
    raise ValueError(f"class {empty[0]!r} has no letter or digit; write it in words.")
  prompts = [pattern.replace("{}", name) for name in names]
  prompt, times = collections.Counter(prompts).most_common(1)[0]
  if times > 1:
    same = [name for name, text in zip(class_names, prompts, strict=True) if text == prompt]
    raise ValueError(f"classes {same} all have the prompt {prompt!r}; use distinct names.")
  return prompts


def prompts_hash(prompts: Sequence[str]) -> str:
  """Return a hash of the prompts for result files, 12 hex digits."""
  return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Classification:
  """Classification metrics of a data set; mergeable with `+`."""

  top1: Share
  top5: Share
  confusion: Confusion

  def __add__(self, other: Self) -> Self:
    return type(self)(
      self.top1 + other.top1, self.top5 + other.top5, self.confusion + other.confusion
    )

  @classmethod
  def of(cls, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> Self:
    """Return the metrics of scores float [B, C] and labels int [B].

    Ties rank in order of class number, so top-1 equals `argmax`.

    Raises:
      ValueError: if a valid row has a label outside [0, C) or a NaN score.
    """
    valid = np.asarray(valid, bool)
    scores, labels = np.asarray(scores)[valid], np.asarray(labels)[valid]
    num_classes = scores.shape[-1]
    rank = class_ranks(scores, labels)
    predicted = scores.argmax(1) if len(scores) else labels
    return cls(Share.of(rank < 1), Share.of(rank < 5), Confusion.of(labels, predicted, num_classes))

  def results(self, level: float = 0.95, prefix: str = "zero_shot") -> list[Result]:
    """Return `<prefix>_top1`, `<prefix>_top5` and `<prefix>_mean_per_class`."""
    mean = self.confusion.mean_per_class()
    return [
      self.top1.result(f"{prefix}_top1", level),
      self.top5.result(f"{prefix}_top5", level),
      Result(f"{prefix}_mean_per_class", mean, self.top1.count, unit="share"),
    ]


def class_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Return the rank of the true class, int [B] from 0, for scores float [B, C], labels int [B].

  Ties rank in order of class number.

  Raises:
    ValueError: if a label is outside [0, C) or a score is NaN.
  """
  num_classes = scores.shape[-1]
  outside = labels[(labels < 0) | (labels >= num_classes)]
  if outside.size:
    raise ValueError(f"label {outside[0]} is not in [0, {num_classes}); check the class names.")
  if np.isnan(scores).any():
    raise ValueError(f"{int(np.isnan(scores).any(-1).sum())} examples have NaN class scores.")
  own = np.take_along_axis(scores, labels[:, None], 1)
  earlier = np.arange(num_classes) < labels[:, None]
  return ((scores > own) | ((scores == own) & earlier)).sum(1)


def classify_by_likelihood(
  encode_fn: Callable[[Batch], Any],
  score_fn: Callable[[Any, np.ndarray], tuple[Any, Any]],
  batches: Iterable[Batch],
  prompt_ids: np.ndarray,
  prompt_class: np.ndarray | None = None,
  *,
  length: Literal["sum", "mean"] = "sum",
  chunk: int = 64,
  merge: Callable[[Classification], Classification] = across_processes,
) -> Classification:
  """Score every class prompt as a caption of every image.

  Args:
    encode_fn: maps a batch to the image features that `score_fn` needs; called once per batch.
    score_fn: maps (features, ids int [K, T]) to (log-likelihood [B, K], number of tokens [K] or
      [B, K]). K is always min(chunk, P), so it compiles once.
    batches: batches with `label` int [B] and `valid` bool [B].
    prompt_ids: tokenised prompts, int [P, T].
    prompt_class: class of each prompt, int [P]; the score of a class is the log of the sum of the
      likelihoods of its prompts. None: one prompt per class, in order of class number.
    length: `sum` scores by log p(prompt | image); `mean` divides by the number of tokens, which
      removes the advantage of short names.
    chunk: number of prompts scored at a time.
    merge: merges the states of all processes; called once, at the end.

  Raises:
    ValueError: if `length` is unknown, or a label is not a class number.
  """
  if length not in ("sum", "mean"):
    raise ValueError(f"length={length!r} must be 'sum' or 'mean'.")
  num_prompts = len(prompt_ids)
  classes = np.arange(num_prompts) if prompt_class is None else np.asarray(prompt_class)
  if sorted(set(classes.tolist())) != list(range(classes.max() + 1)) or len(classes) != num_prompts:
    raise ValueError(
      f"prompt_class must assign a class to each of {num_prompts} prompts, without gaps."
    )
  chunk = min(chunk, num_prompts)
  # The last chunk is padded with prompt 0; the padding is removed below.
  order = np.append(np.arange(num_prompts), np.zeros(-num_prompts % chunk, int))
  chunks = np.asarray(prompt_ids)[order].reshape(-1, chunk, prompt_ids.shape[1])
  num_classes = int(classes.max()) + 1
  state = Classification.of(np.zeros((0, num_classes)), np.zeros(0, int), np.zeros(0, bool))
  for batch in batches:
    encoded = encode_fn(batch)
    parts = jax.device_get([score_fn(encoded, ids) for ids in chunks])
    scores = np.concatenate(
      [total / tokens if length == "mean" else total for total, tokens in parts], axis=1
    )[:, :num_prompts]
    state += Classification.of(
      _by_class(scores, classes, num_classes), batch["label"], batch["valid"]
    )
  return merge(state)


def _by_class(scores: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
  """Return the log-sum-exp over the prompts of each class: [B, P] -> float64 [B, C]."""
  joined = np.full((len(scores), num_classes), -np.inf)
  with np.errstate(invalid="ignore"):  # class_ranks raises for NaN scores
    for prompt, label in enumerate(classes):
      joined[:, label] = np.logaddexp(joined[:, label], scores[:, prompt].astype(np.float64))
  return joined
