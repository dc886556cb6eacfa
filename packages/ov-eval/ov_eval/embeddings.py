"""Embeddings of a whole data set: of batches that each process reads its own of, and of texts."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import operator
from typing import Any

import jax
import numpy as np

from ov_eval.likelihood import Batch, one_late
from ov_eval.processes import gather as gather_processes

Progress = Callable[[int, int], None]
# Rows that cross the network at a time: `gather` makes a copy per process and device.
_ROWS = 4096


def embed_texts(
  embed_text: Callable[[np.ndarray], Any],
  encode: Callable[[list[str]], np.ndarray],
  texts: Sequence[str],
  *,
  chunk: int = 256,
  progress: Progress | None = None,
) -> np.ndarray:
  """Embeddings float32 [N, E] of N texts that every process has.

  Args:
    embed_text: ids int [chunk, T] -> [chunk, E], all rows, readable on this process. It gets the
      same ids on every process, and always `chunk` rows, so that it compiles once.
    encode: texts -> ids int [n, T].
    texts: at least one.
    chunk: texts at a time; the last ones are filled up with repeats, cut away again.
    progress: is told (texts done, texts in all).

  Raises:
    ValueError: without texts, or for embeddings that are not finite.
  """
  if not texts:
    raise ValueError("got no texts to embed; expected at least one.")
  texts, filled = list(texts), -len(texts) % chunk

  def batches() -> Iterable[Batch]:
    for start in range(0, len(texts), chunk):
      some = texts[start : start + chunk]
      yield {"ids": encode(some + [some[0]] * (chunk - len(some))), "done": start + len(some)}

  rows = []
  for batch, vectors in one_late(lambda batch: embed_text(batch["ids"]), batches()):
    rows.append(np.asarray(vectors, np.float32))
    if progress:
      progress(batch["done"], len(texts))
  embedded = np.concatenate(rows)
  if len(embedded) != len(texts) + filled:
    raise ValueError(f"embed_text gave {len(embedded)} rows for {len(texts) + filled} texts.")
  return check_finite(embedded[: len(texts)], "texts")


@dataclasses.dataclass(frozen=True, eq=False)
class Collected:
  """Embeddings of the valid examples of all processes, in order of index, each once.

  Attributes:
    vectors: float32 [N, E].
    index: int64 [N], of the examples in their data set.
    columns: what else was asked for, N values each: arrays where the batches hold arrays,
      otherwise lists.
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
  """Embeds every valid example once.

  Args:
    embed_fn: batch -> [B, E], the rows of this process.
    batches: each with `valid` bool [B] and `index` int [B]. A row that is not valid is left out,
      and an index that comes again, here or in another process, is taken once. When `embed_fn`
      contains collectives, every process must bring the same number of batches.
    columns: keys of the batches to keep beside, such as `label` or `captions`.
    gather: value -> values of all processes; called after the last batch, equally often in every
      process.
    progress: is told (batches done, batches in all or 0 where that is not known).

  Raises:
    ValueError: without a valid row, or for embeddings that are not finite.
  """
  in_all = operator.length_hint(batches)
  mine: list[_Rows] = []
  for done, (batch, vectors) in enumerate(one_late(embed_fn, batches), 1):
    valid = np.flatnonzero(batch["valid"])
    rows = {key: batch[key] for key in columns}
    rows |= {_INDEX: np.asarray(batch["index"], np.int64), _VECTOR: np.asarray(vectors, np.float32)}
    mine.append({key: _take(values, valid) for key, values in rows.items()})
    if progress:
      progress(done, in_all)
  together = _gather_rows(_concatenate(mine), gather)
  if not together or not len(together[_INDEX]):
    raise ValueError("no batch has a valid row; check the data that is evaluated.")
  index, first = np.unique(together[_INDEX], return_index=True)
  check_finite(together[_VECTOR], "examples")
  return Collected(
    together[_VECTOR][first], index, {key: _take(together[key], first) for key in columns}
  )


def flatten_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
  """Texts of all pictures in one list, and int64 [X] which picture each belongs to."""
  rows = [row for row, texts in enumerate(captions) for _ in texts]
  return [text for texts in captions for text in texts], np.array(rows, np.int64)


# Names that no column has.
_INDEX, _VECTOR = "\0index", "\0vector"
_Rows = dict[str, Any]


def _gather_rows(mine: _Rows, gather: Callable[[Any], list[Any]]) -> _Rows:
  """The rows of all processes, sent a few at a time."""
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
  """Embeddings [N, E] as they came.

  Raises:
    ValueError: if one of them is not finite.
  """
  bad = ~np.isfinite(vectors).all(1)
  if bad.any():
    raise ValueError(
      f"{int(bad.sum())} of {len(vectors)} {what} have embeddings that are not finite; "
      "the weights have diverged, or the embedding function overflows."
    )
  return vectors
