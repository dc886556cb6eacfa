"""Embeddings of a whole data set, from batches sharded over processes, and of lists of texts."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import operator
from typing import Any

import jax
import numpy as np

from ov_eval.likelihood import Batch, dispatch_ahead
from ov_eval.processes import gather as gather_processes

Progress = Callable[[int, int], None]
# Rows per call of `gather`, which makes one copy per process and device.
_ROWS = 4096


def embed_texts(
  embed_text: Callable[[np.ndarray], Any],
  encode: Callable[[list[str]], np.ndarray],
  texts: Sequence[str],
  *,
  chunk: int = 256,
  progress: Progress | None = None,
) -> np.ndarray:
  """Return embeddings float32 [N, E] of N texts that are the same on every process.

  Args:
    embed_text: maps ids int [chunk, T] to [chunk, E], addressable on this process. It receives
      the same ids on every process, always `chunk` rows, so it compiles once.
    encode: maps n texts to ids int [n, T].
    texts: texts to embed, at least one.
    chunk: batch size; the last batch is padded with repeats, whose embeddings are discarded.
    progress: called with (texts done, total texts).

  Raises:
    ValueError: if `texts` is empty or an embedding contains NaN or Inf.
  """
  if not texts:
    raise ValueError("got no texts to embed; expected at least one.")
  texts, filled = list(texts), -len(texts) % chunk

  def batches() -> Iterable[Batch]:
    for start in range(0, len(texts), chunk):
      some = texts[start : start + chunk]
      yield {"ids": encode(some + [some[0]] * (chunk - len(some))), "done": start + len(some)}

  rows = []
  for batch, vectors in dispatch_ahead(lambda batch: embed_text(batch["ids"]), batches()):
    rows.append(np.asarray(vectors, np.float32))
    if progress:
      progress(batch["done"], len(texts))
  embedded = np.concatenate(rows)
  if len(embedded) != len(texts) + filled:
    raise ValueError(f"embed_text returned {len(embedded)} rows for {len(texts) + filled} texts.")
  return check_finite(embedded[: len(texts)], "texts")


@dataclasses.dataclass(frozen=True, eq=False)
class Collected:
  """Embeddings of the valid examples of all processes, sorted by index, without duplicates.

  Attributes:
    vectors: embeddings float32 [N, E].
    index: int64 [N], index of each example in the data set.
    columns: requested columns with N values each, as arrays if the batches hold arrays, otherwise
      as lists.
  """

  vectors: np.ndarray
  index: np.ndarray
  columns: dict[str, Any]


def collect_embeddings(
  embed_fn: Callable[[Batch], Any],
  batches: Iterable[Batch],
  *,
  columns: Sequence[str] = (),
  gather: Callable[[Any], list[Any]] = gather_processes,
  progress: Progress | None = None,
) -> Collected:
  """Embed every valid example once.

  Args:
    embed_fn: maps a batch to [B, E], the rows of this process.
    batches: batches with `valid` bool [B] and `index` int [B]. Invalid rows are ignored, and a
      repeated index, on any process, is counted once. If `embed_fn` contains collectives, every
      process must pass the same number of batches.
    columns: keys of the batches to return with the embeddings, such as `label` or `captions`.
    gather: maps a value to the values of all processes. It is called after the last batch, the
      same number of times on every process.
    progress: called with (batches done, total batches or 0 if unknown).

  Raises:
    ValueError: if there is no valid row, or an embedding contains NaN or Inf.
  """
  total = operator.length_hint(batches)
  mine: list[_Rows] = []
  for done, (batch, vectors) in enumerate(dispatch_ahead(embed_fn, batches), 1):
    valid = np.flatnonzero(batch["valid"])
    rows = {key: batch[key] for key in columns}
    rows |= {_INDEX: np.asarray(batch["index"], np.int64), _VECTOR: np.asarray(vectors, np.float32)}
    mine.append({key: _take(values, valid) for key, values in rows.items()})
    if progress:
      progress(done, total)
  together = _gather_rows(_concatenate(mine), gather)
  if not together or not len(together[_INDEX]):
    raise ValueError("no batch has a valid row; check the evaluation data.")
  index, first = np.unique(together[_INDEX], return_index=True)
  check_finite(together[_VECTOR], "examples")
  return Collected(
    together[_VECTOR][first], index, {key: _take(together[key], first) for key in columns}
  )


def flatten_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
  """Return the captions of all images in one list, and int64 [X], the image of each."""
  rows = [row for row, texts in enumerate(captions) for _ in texts]
  return [text for texts in captions for text in texts], np.array(rows, np.int64)


def merge_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
  """Return the different captions in order, and int64 [P, 2], pairs of a caption and an image.

  A caption of several images is one text that is correct for all of them; see `retrieval`.
  """
  rows: dict[str, int] = {}
  pairs = [
    (rows.setdefault(text, len(rows)), image)
    for image, texts in enumerate(captions)
    for text in dict.fromkeys(texts)
  ]
  return list(rows), np.array(pairs, np.int64).reshape(-1, 2)


# Keys that cannot clash with the name of a column.
_INDEX, _VECTOR = "\0index", "\0vector"
_Rows = dict[str, Any]


def _gather_rows(mine: _Rows, gather: Callable[[Any], list[Any]]) -> _Rows:
  """Return the rows of all processes, gathered in chunks of `_ROWS`."""
  own = len(mine[_INDEX]) if mine else 0
  sizes = gather(own)
  if len(sizes) == 1:
    return mine
  parts: list[_Rows] = []
  for start in range(0, max(sizes), _ROWS):
    stop = min(start + _ROWS, own)
    piece = {key: values[start:stop] for key, values in mine.items()} if start < own else {}
    parts += [part for part in gather(piece) if part]
  return _concatenate(parts)


def _concatenate(parts: Sequence[_Rows]) -> _Rows:
  joined: _Rows = {}
  for key in parts[0] if parts else ():
    values = [part[key] for part in parts]
    if isinstance(values[0], np.ndarray):
      joined[key] = np.concatenate(values)
    else:
      joined[key] = [value for some in values for value in some]
  return joined


def _take(values: Any, rows: np.ndarray) -> Any:
  if isinstance(values, (np.ndarray, jax.Array)):
    return np.asarray(values)[rows]
  return [values[row] for row in rows]


def check_finite(vectors: np.ndarray, what: str) -> np.ndarray:
  """Return embeddings [N, E] unchanged.

  Args:
    vectors: the embeddings.
    what: what the rows are, for the error message.

  Raises:
    ValueError: if a row contains NaN or Inf.
  """
  bad = ~np.isfinite(vectors).all(1)
  if bad.any():
    raise ValueError(
      f"{int(bad.sum())} of {len(vectors)} {what} have embeddings with NaN or Inf; "
      "the weights have diverged, or the embedding function overflows."
    )
  return vectors
