"""Gathering values and merging metric states across JAX processes."""

import functools
import operator
import pickle
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")


def gather(value: T) -> list[T]:
  """Return the values of all JAX processes, in process order. All processes must call it.

  Values must be picklable; sizes may differ. With one process, returns `[value]`.
  """
  if jax.process_count() == 1:
    return [value]
  payload = np.frombuffer(pickle.dumps(value), np.uint8)
  with jax.transfer_guard("allow"):
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray(payload.size, np.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: payload.size] = payload
    rows = np.asarray(multihost_utils.process_allgather(padded))
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def across_processes(state: Any) -> Any:
  """Return the sum over all processes of a state that supports `+` (see `ov_eval.states`)."""
  return functools.reduce(operator.add, gather(state))
