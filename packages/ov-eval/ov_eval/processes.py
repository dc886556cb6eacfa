"""What several processes counted, put together: every process gets the same, in process order."""

import functools
import operator
import pickle
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")


def gather(value: T) -> list[T]:
  """The values of all processes of this JAX job, in process order. All of them must call it.

  Any picklable value; sizes may differ. With one process it returns `[value]` at once.
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
  """The sum over all processes of a state that has `+` (see `ov_eval.states`)."""
  return functools.reduce(operator.add, gather(state))
