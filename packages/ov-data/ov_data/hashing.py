"""Random numbers that are functions of integers: no state, the same on every host and version.

`mix` is the finaliser of splitmix64, https://doi.org/10.1145/2714064.2660195.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Uint64s = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(x: Uint64s) -> Uint64s:
  """A bijection of 64-bit words in which every input bit moves about half of the output bits."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
  return x ^ (x >> np.uint64(31))


def keys(*words: ArrayLike) -> Uint64s:
  """One 64-bit key for each broadcast tuple of integers; always an array of at least 1 dim."""
  key = np.zeros(1, np.uint64)
  for word in words:
    key = mix((key ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + np.uint64(_GAMMA))
  return key


def key(*words: int) -> int:
  """What `keys` gives for one tuple, in plain integers: faster where there is no array."""
  value = 0
  for word in words:
    value = _mix((value ^ (word & _MASK)) + _GAMMA & _MASK)
  return value


class Uniforms:
  """A stream of uniform numbers in [0, 1) that belongs to a tuple of integers.

  Plain Python integers: half a microsecond a number, and an image needs about six of them.
  """

  def __init__(self, *words: int):
    self._state = key(*words)

  def __call__(self) -> float:
    self._state = (self._state + _GAMMA) & _MASK
    return (_mix(self._state) >> 11) * 2.0**-53

  def below(self, n: int) -> int:
    """A uniform integer in [0, n)."""
    return int(self() * n)


def _mix(x: int) -> int:
  x = ((x ^ (x >> 30)) * _FIRST) & _MASK
  x = ((x ^ (x >> 27)) * _SECOND) & _MASK
  return x ^ (x >> 31)
