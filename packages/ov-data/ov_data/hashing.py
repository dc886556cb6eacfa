"""Stateless random numbers keyed by integers, identical on all hosts and versions.

`mix` is the finalizer of splitmix64, https://doi.org/10.1145/2714064.2660195.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Uint64s = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(x: Uint64s) -> Uint64s:
  """Apply a bijection of 64-bit words; each input bit flips about half of the output bits."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
  return x ^ (x >> np.uint64(31))


def keys(*words: ArrayLike) -> Uint64s:
  """Return a 64-bit key for each broadcast tuple of integers, as an array of at least 1 dim."""
  key = np.zeros(1, np.uint64)
  for word in words:
    key = mix((key ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + np.uint64(_GAMMA))
  return key


def key(*words: int) -> int:
  """Return the key of one tuple as a Python int; equals `keys` and is faster for scalars."""
  value = 0
  for word in words:
    value = _mix((value ^ (word & _MASK)) + _GAMMA & _MASK)
  return value


class Uniforms:
  """Stream of uniform numbers in [0, 1), keyed by a tuple of integers.

  Uses Python integers: 0.5 us per number, and an image needs about six numbers.
  """

  def __init__(self, *words: int):
    self._state = key(*words)

  def __call__(self) -> float:
    self._state = (self._state + _GAMMA) & _MASK
    return (_mix(self._state) >> 11) * 2.0**-53

  def below(self, n: int) -> int:
    """Return a uniform integer in [0, n)."""
    return int(self() * n)


def _mix(x: int) -> int:
  x = ((x ^ (x >> 30)) * _FIRST) & _MASK
  x = ((x ^ (x >> 27)) * _SECOND) & _MASK
  return x ^ (x >> 31)
