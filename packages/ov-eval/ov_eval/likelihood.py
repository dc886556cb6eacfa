"""NLL per token and perplexity of held-out captions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import math
from typing import Any, Self

import jax
import numpy as np

from ov_eval.processes import across_processes
from ov_eval.results import Result
from ov_eval.states import Mean

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CaptionNLL:
  """Negative log-likelihood of captions in nats; mergeable with `+`."""

  state: Mean = Mean()

  def __add__(self, other: Self) -> Self:
    return type(self)(self.state + other.state)

  @property
  def nll(self) -> float:
    """NLL per token: sum over all tokens / number of tokens, not a mean of means."""
    return self.state.value

  @property
  def perplexity(self) -> float:
    """exp(nll); Inf on overflow."""
    return _exp(self.nll)

  @property
  def tokens(self) -> int:
    return int(self.state.weight)

  @property
  def examples(self) -> int:
    return self.state.count

  def results(self, level: float = 0.95) -> list[Result]:
    """Return `caption_nll` and `caption_perplexity`, with intervals over examples."""
    low, high = self.state.interval(level)
    return [
      Result("caption_nll", self.nll, self.examples, low, high, "nats"),
      Result("caption_perplexity", self.perplexity, self.examples, _exp(low), _exp(high)),
    ]


def caption_nll(
  score_fn: Callable[[Batch], tuple[Any, Any]],
  batches: Iterable[Batch],
  *,
  merge: Callable[[CaptionNLL], CaptionNLL] = across_processes,
) -> CaptionNLL:
  """Return the NLL of all valid captions.

  Args:
    score_fn: maps a batch to (NLL summed over the tokens of a row [B], number of tokens [B]) for
      the rows of this process; host or device arrays.
    batches: batches with `valid` bool [B]; invalid rows are ignored. If `score_fn` contains
      collectives, every process must pass the same number of batches.
    merge: merges the states of all processes; called once, at the end.
  """
  state = Mean()
  for batch, (nll, tokens) in dispatch_ahead(score_fn, batches):
    state += Mean.of(nll, tokens, batch["valid"])
  return merge(CaptionNLL(state))


def dispatch_ahead(
  fn: Callable[[Batch], Any], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Any]]:
  """Yield (batch, fn(batch) on the host), fetching after the next batch has been dispatched."""
  waiting = None
  for batch in batches:
    dispatched = fn(batch)
    if waiting is not None:
      yield waiting[0], jax.tree.map(np.asarray, jax.device_get(waiting[1]))
    waiting = batch, dispatched
  if waiting is not None:
    yield waiting[0], jax.tree.map(np.asarray, jax.device_get(waiting[1]))


def _exp(value: float) -> float:
  try:
    return math.exp(value)
  except OverflowError:
    return math.inf
