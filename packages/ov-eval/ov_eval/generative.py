"""Zero-shot classification with a caption model: which class prompt is the likeliest caption?"""

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
  """Lower case, no ASCII punctuation except the string `keep`, single spaces.

  `_` becomes a space. The predecessor keeps "," in class names and "{}" in templates.

  >>> canonicalise("A bad photo of a {}.", keep="{}")
  'a bad photo of a {}'
  """
  remove = str.maketrans("", "", string.punctuation)
  parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
  return re.sub(r"\s+", " ", keep.join(part.translate(remove) for part in parts).lower()).strip()


def class_prompts(class_names: Sequence[str], template: str = "a photo of a {}.") -> list[str]:
  """One canonicalised prompt per class.

  Raises:
    ValueError: if the template lacks `{}`, two classes end as the same prompt, or nothing is left
      of a name.
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
    raise ValueError(f"classes {same} all give the prompt {prompt!r}; make their names differ.")
  return prompts


def prompts_hash(prompts: Sequence[str]) -> str:
  """Twelve hex digits that identify the prompts, for result files."""
  return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Classification:
  """Outcome over a data set; mergeable with `+`."""

  top1: Share
  top5: Share
  confusion: Confusion

  def __add__(self, other: Self) -> Self:
    return type(self)(
      self.top1 + other.top1, self.top5 + other.top5, self.confusion + other.confusion
    )

  @classmethod
  def of(cls, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> Self:
    """From scores float [B, C] and labels int [B].

    Equal scores rank in order of class number, so that top-1 is `argmax`.

    Raises:
      ValueError: for a label outside [0, C) or a NaN score in a valid row.
    """
    valid = np.asarray(valid, bool)
    scores, labels = np.asarray(scores)[valid], np.asarray(labels)[valid]
    num_classes = scores.shape[-1]
    rank = class_ranks(scores, labels)
    predicted = scores.argmax(1) if len(scores) else labels
    return cls(Share.of(rank < 1), Share.of(rank < 5), Confusion.of(labels, predicted, num_classes))

  def results(self, level: float = 0.95, prefix: str = "zero_shot") -> list[Result]:
    """`<prefix>_top1`, `<prefix>_top5`, `<prefix>_mean_per_class`."""
    mean = self.confusion.mean_per_class()
    return [
      self.top1.result(f"{prefix}_top1", level),
      self.top5.result(f"{prefix}_top5", level),
      Result(f"{prefix}_mean_per_class", mean, self.top1.count, unit="share"),
    ]


def class_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """How many classes stand before the true one: int [B] from scores float [B, C], labels int [B].

  Equal scores rank in order of class number.

  Raises:
    ValueError: for a label outside [0, C) or a NaN score.
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
  """Scores every class prompt as a caption of every picture.

  Args:
    encode_fn: batch -> what `score_fn` needs of the pictures (image tokens); once per batch.
    score_fn: (encoded, ids int [K, T]) -> (log-likelihood [B, K], tokens [K] or [B, K]). It always
      sees K = min(chunk, P) prompts, so it compiles once.
    batches: each with `label` int [B] and `valid` bool [B].
    prompt_ids: int [P, T], the tokenised prompts.
    prompt_class: int [P], the class of each prompt; the score of a class is the log of the sum of
      its prompts' likelihoods. None: one prompt per class, in order of class number.
    length: `sum` is log p(prompt | picture); `mean` divides it by the prompt's tokens, which
      takes away the advantage of short names.
    chunk: prompts scored at a time.
    merge: joins the states of the processes; called once, at the end.

  Raises:
    ValueError: for an unknown `length` or labels that are not class numbers.
  """
  if length not in ("sum", "mean"):
    raise ValueError(f"length={length!r} must be 'sum' or 'mean'.")
  num_prompts = len(prompt_ids)
  classes = np.arange(num_prompts) if prompt_class is None else np.asarray(prompt_class)
  if sorted(set(classes.tolist())) != list(range(classes.max() + 1)) or len(classes) != num_prompts:
    raise ValueError(
      f"prompt_class must give each of {num_prompts} prompts a class, with no class left out."
    )
  chunk = min(chunk, num_prompts)
  # The last chunk is filled up with repeats of prompt 0, cut away below.
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
  """Log of the sum of exp over the prompts of each class: [B, P] -> float64 [B, C]."""
  joined = np.full((len(scores), num_classes), -np.inf)
  with np.errstate(invalid="ignore"):  # a NaN score is refused later, with its row counted
    for prompt, label in enumerate(classes):
      joined[:, label] = np.logaddexp(joined[:, label], scores[:, prompt].astype(np.float64))
  return joined
