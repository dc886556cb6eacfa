import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_eval.likelihood import caption_nll


def _batches(nll, tokens, size):
  """Return batches of `size` rows; the last is padded with garbage rows marked invalid."""
  for start in range(0, len(nll), size):
    rows = np.arange(start, start + size)
    valid = rows < len(nll)
    rows = rows % len(nll)
    yield {
      "valid": valid,
      "nll": np.where(valid, nll[rows], 1e9).astype(np.float32),
      "tokens": np.where(valid, tokens[rows], 7),
    }


def _score(batch):
  return jnp.asarray(batch["nll"]), jnp.asarray(batch["tokens"])


@pytest.fixture
def rows():
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 20, 37)
  return (rng.random(37) * tokens).astype(np.float32), tokens


def test_equals_brute_force_for_any_batch_size(rows):
  nll, tokens = rows
  states = [caption_nll(_score, _batches(nll, tokens, size)) for size in (1, 8, 37, 64)]
  expected = math.fsum(nll.tolist()) / tokens.sum()
  assert states[0].nll == pytest.approx(expected, rel=1e-15)
  assert states[0].perplexity == pytest.approx(math.exp(expected))
  assert (states[0].tokens, states[0].examples) == (tokens.sum(), 37)
  assert all(state == states[0] for state in states)


def test_merging_uneven_hosts(rows):
  nll, tokens = rows
  whole = caption_nll(_score, _batches(nll, tokens, 8))
  parts = [
    caption_nll(_score, _batches(nll[part], tokens[part], 8), merge=lambda state: state)
    for part in (slice(0, 30), slice(30, 37))
  ]
  assert parts[0] + parts[1] == whole


def test_results_have_interval_and_count(rows):
  nll, perplexity = caption_nll(_score, _batches(*rows, 8)).results()
  assert nll.low < nll.value < nll.high and nll.count == 37
  assert perplexity.low == pytest.approx(math.exp(nll.low))


def test_runs_under_a_transfer_guard_and_fetches_one_batch_late(rows):
  log = []

  def score(batch):
    log.append("dispatch")
    return jax.device_put(batch["nll"]), jax.device_put(batch["tokens"])

  def batches():
    for batch in _batches(*rows, 16):
      log.append("read")
      yield batch

  with jax.transfer_guard("disallow"):
    state = caption_nll(score, batches())
  assert state.examples == 37
  assert log[:4] == ["read", "dispatch"] * 2


def test_no_batches_give_nan():
  assert math.isnan(caption_nll(_score, []).nll)
