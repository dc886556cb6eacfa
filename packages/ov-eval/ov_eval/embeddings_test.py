"""Tests that each valid example is collected once, sorted by index, for all batches, processes."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_eval import embeddings
from ov_eval.embeddings import (
  collect_embeddings,
  embed_texts,
  flatten_captions,
  merge_captions,
)


def _encode(texts):
  return np.array([[len(text), ord(text[0])] for text in texts], np.int32)


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_text_chunks_have_one_shape(chunk):
  texts = [letter * (i % 5 + 1) for i, letter in enumerate("abcdefghij")]
  calls, reported = [], []
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def embed(ids):
    chex.assert_shape(ids, (chunk, 2))
    return ids.astype(jnp.float32) @ jnp.ones((2, 3))

  def watched(ids):
    calls.append(ids)
    return embed(ids)

  found = embed_texts(
    watched, _encode, texts, chunk=chunk, progress=lambda *at: reported.append(at)
  )
  np.testing.assert_array_equal(found, _encode(texts).sum(1)[:, None] * np.ones(3))
  assert found.dtype == np.float32
  assert len(calls) == len(reported) == -(-10 // chunk) and reported[-1] == (10, 10)


def test_embed_texts_errors():
  embed = lambda ids: np.ones((len(ids), 2))
  with pytest.raises(ValueError, match="no texts"):
    embed_texts(embed, _encode, [])
  with pytest.raises(ValueError, match="returned 2 rows for 4 texts"):
    embed_texts(lambda ids: np.ones((1, 2)), _encode, list("abcd"), chunk=2)
  overflow = lambda ids: np.where(ids == ord("b"), np.inf, 1.0)
  with pytest.raises(ValueError, match="1 of 3 texts have embeddings with NaN or Inf"):
    embed_texts(overflow, _encode, list("abc"), chunk=2)


def _vector(index):
  """Return an embedding that identifies its example."""
  return np.stack([np.cos(index), np.sin(index), index], -1).astype(np.float32)


def _batches(rows, size, order=0):
  """Return batches of these examples; the last is padded with garbage under a used index."""
  rows = np.random.default_rng(order).permutation(rows)
  for start in range(0, len(rows), size):
    some = rows[start : start + size]
    index = np.append(some, np.zeros(size - len(some), int))
    yield {
      "index": index,
      "valid": np.arange(size) < len(some),
      "label": np.where(np.arange(size) < len(some), index % 7, -1),
      "captions": [tuple(f"{i} {c}" for c in range(i % 3)) for i in index],
    }


def _embed(batch):
  return np.where(batch["valid"][:, None], _vector(batch["index"]), np.nan)


def _assert_complete(found, index):
  np.testing.assert_array_equal(found.index, index)
  np.testing.assert_array_equal(found.vectors, _vector(found.index))
  np.testing.assert_array_equal(found.columns["label"], found.index % 7)
  expected = [tuple(f"{i} {c}" for c in range(i % 3)) for i in index]
  assert found.columns["captions"] == expected


COLUMNS = ("label", "captions")


@pytest.mark.parametrize("size", [1, 8, 64])
def test_each_example_is_collected_once_in_order(size):
  index = np.array([900, *range(3, 40)])
  batches = [*_batches(index, size), *_batches(index[5:11], size)]  # some repeat
  reported = []
  found = collect_embeddings(
    _embed, batches, columns=COLUMNS, progress=lambda *at: reported.append(at)
  )
  _assert_complete(found, np.sort(index))
  assert reported == [(n, len(batches)) for n in range(1, len(batches) + 1)]


def test_device_arrays_and_unknown_length():
  embed = jax.jit(lambda index: jnp.stack([index, -index], 1).astype(jnp.float32))
  batches = ({**batch, "label": jnp.asarray(batch["label"])} for batch in _batches(range(9), 4))
  reported = []
  found = collect_embeddings(
    lambda batch: embed(jnp.asarray(batch["index"])),
    batches,
    columns=("label",),
    progress=lambda *at: reported.append(at),
  )
  np.testing.assert_array_equal(found.vectors[:, 0], np.arange(9))
  assert isinstance(found.columns["label"], np.ndarray)
  assert reported == [(1, 0), (2, 0), (3, 0)]


def _as_processes(parts, size):
  """Return the result of each of several processes, simulated by synchronised threads."""
  barrier = threading.Barrier(len(parts), timeout=30)
  sent, results = [None] * len(parts), [None] * len(parts)

  def run(rank):
    def gather(value):
      sent[rank] = value
      barrier.wait()
      everything = list(sent)
      barrier.wait()
      return everything

    batches = _batches(parts[rank], size, rank)
    results[rank] = collect_embeddings(_embed, batches, columns=COLUMNS, gather=gather)

  threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


@pytest.mark.parametrize(
  "parts",
  [
    [range(20), range(20, 33)],
    [range(20), range(12, 33), range(5, 6)],  # some rows are on two processes
    [[], range(33)],  # a process without a batch
    [range(33), [], []],
  ],
)
def test_uneven_processes(monkeypatch, parts):
  monkeypatch.setattr(
    embeddings, "_ROWS", 6
  )  # several rounds; some processes have no rows in some of them
  for found in _as_processes(parts, size=4):
    _assert_complete(found, np.arange(33))


def test_collect_embeddings_errors():
  with pytest.raises(ValueError, match="no batch has a valid row"):
    collect_embeddings(_embed, [])
  nothing = {"index": np.arange(4), "valid": np.zeros(4, bool)}
  with pytest.raises(ValueError, match="no batch has a valid row"):
    collect_embeddings(_embed, [nothing])
  broken = lambda batch: np.where(batch["index"][:, None] < 3, np.nan, _vector(batch["index"]))
  with pytest.raises(ValueError, match="3 of 10 examples have embeddings with NaN or Inf"):
    collect_embeddings(broken, _batches(range(10), 4))


def test_flatten_captions():
  texts, owner = flatten_captions([("a", "b"), (), ["c"]])
  assert texts == ["a", "b", "c"] and owner.tolist() == [0, 0, 2] and owner.dtype == np.int64
  texts, owner = flatten_captions([(), ()])
  assert texts == [] and owner.shape == (0,)


def test_merge_captions():
  texts, pairs = merge_captions([("a", "b", "a"), (), ["c", "a"]])
  assert texts == ["a", "b", "c"] and pairs.dtype == np.int64
  assert pairs.tolist() == [[0, 0], [1, 0], [2, 2], [0, 2]]
  texts, pairs = merge_captions([()])
  assert texts == [] and pairs.shape == (0, 2)
