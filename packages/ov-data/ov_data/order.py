"""Which record stands at which place of the training stream: a function, so nothing to store.

    Order(sizes, ...)(positions) -> source, record, epoch

A position is the number of an example in the endless global stream, over all hosts. The whole
reading state is therefore one integer, and a host that owns the rows [a, b) of a global batch
reads the positions [start + a, start + b), however many hosts there are.

Shuffling never makes a list. `permute` is a keyed bijection of [0, n): an alternating Feistel
network on the next power of two, walked until it falls below n (Black and Rogaway 2002,
https://doi.org/10.1007/3-540-45760-7_9). Time and memory do not depend on n.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ov_data.hashing import Uint64s, keys, mix

Int64s = NDArray[np.int64]

_ROUNDS = 4  # of two half-rounds each
_PATTERN = 1000  # longest mixing pattern: weights are met to within half a thousandth
_WINDOW_SALT, _BLOCK_SALT = 1, 2


@dataclasses.dataclass(frozen=True)
class Places:
  """What stands at n positions."""

  source: Int64s  # [n]
  record: Int64s  # [n], number of the record within its source
  epoch: Int64s  # [n], how often that source has been read to its end before


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of reading `sizes` records from each source.

  Several sources are mixed by `weights` in a fixed repeating pattern; each runs through its own
  epochs, in each of which every record comes exactly once.

  shuffle:
    "global": any record may stand anywhere in the epoch; for local disks and fast stores.
    "block": runs of `block` neighbouring records are permuted, then records are shuffled within
      windows of `window` runs; for object stores and spinning disks, where neighbours are cheap.
      With `lanes` > 1 that many windows are open at a time, and the rows of a batch are dealt to
      them in stripes of `lane_rows`, so that a host reads only the windows of its own rows.
    "none": as they lie on disk, the same in every epoch.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...] = (1.0,)
  seed: int = 0
  shuffle: Literal["global", "block", "none"] = "global"
  block: int = 256
  window: int = 16
  lanes: int = 1
  lane_rows: int = 1

  def __post_init__(self) -> None:
    if len(self.sizes) != len(self.weights) or not self.sizes:
      raise ValueError(
        f"{len(self.sizes)} sources and {len(self.weights)} weights; expected as "
        "many weights as sources, and at least one"
      )
    if not -(2**63) <= self.seed < 2**63:
      raise ValueError(f"seed={self.seed}: expected an integer of 64 bits")
    if min(self.sizes) < 1:
      raise ValueError(f"sizes={self.sizes}: every source needs at least one record")
    if not all(0 < weight < math.inf for weight in self.weights):
      raise ValueError(
        f"weights={self.weights}: expected positive numbers; leave a source out "
        "instead of giving it no weight"
      )
    if self.shuffle not in ("global", "block", "none"):
      raise ValueError(f"shuffle={self.shuffle!r}: expected 'global', 'block' or 'none'")
    for name in ("block", "window", "lanes", "lane_rows"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
    if self.shuffle == "block" and (self.block * self.window) % self.lane_rows:
      raise ValueError(
        f"block x window = {self.block * self.window} records is not a multiple of "
        f"lane_rows={self.lane_rows}"
      )

  def __call__(self, positions: Int64s) -> Places:
    """The places at global positions `positions` (int64 [n], >= 0)."""
    pattern = mixing_pattern(self.weights)
    cycle, phase = np.divmod(positions, len(pattern))
    source = pattern[phase].astype(np.int64)
    record, epoch = np.zeros_like(positions), np.zeros_like(positions)
    for number, size in enumerate(self.sizes):
      mine = source == number
      before = np.cumsum(pattern == number) - (pattern == number)  # of this source, in the pattern
      local = cycle[mine] * np.count_nonzero(pattern == number) + before[phase[mine]]
      epoch[mine], within = np.divmod(local, size)
      record[mine] = self._shuffled(within, size, keys(self.seed, number, epoch[mine]))
    return Places(source, record, epoch)

  def _shuffled(self, within: Int64s, size: int, key: Uint64s) -> Int64s:
    if self.shuffle == "global":
      return permute(within, size, key)
    if self.shuffle == "block":
      return self._block_shuffled(within, size, key)
    return within

  def _block_shuffled(self, within: Int64s, size: int, key: Uint64s) -> Int64s:
    window_records = self.block * self.window
    turn = self.lanes * window_records  # all lanes, one window each
    in_turns = within < size // turn * turn
    turns, place = np.divmod(within, turn)
    lane = place // self.lane_rows % self.lanes
    stripe = place // (self.lane_rows * self.lanes)
    # Behind the last whole turn the windows follow one another, and the last one may be short.
    window = np.where(in_turns, turns * self.lanes + lane, within // window_records)
    place = np.where(
      in_turns, stripe * self.lane_rows + place % self.lane_rows, within % window_records
    )
    window_key = keys(key, _WINDOW_SALT, window)
    whole = window < size // window_records
    place[whole] = permute(place[whole], window_records, window_key[whole])
    place[~whole] = permute(place[~whole], size % window_records, window_key[~whole])
    run, offset = np.divmod(window * window_records + place, self.block)
    whole = run < size // self.block  # the short run at the very end stays where it is
    run[whole] = permute(run[whole], size // self.block, keys(key, _BLOCK_SALT)[whole])
    return run * self.block + offset


def permute(x: Int64s, size: int, key: Uint64s) -> Int64s:
  """Where a shuffle of [0, size) puts `x`, for one key each (both [n]); a bijection in x.

  Expected work: under two passes of the network for each element.
  """
  bits = max(1, (size - 1).bit_length())
  right_bits = np.uint64(bits - bits // 2)
  left_mask = np.uint64((1 << bits // 2) - 1)
  right_mask = np.uint64((1 << (bits - bits // 2)) - 1)
  round_keys = [keys(key, number) for number in range(2 * _ROUNDS)]
  y = x.astype(np.uint64)
  astray = np.ones(len(x), bool)
  while astray.any():
    left, right = y[astray] >> right_bits, y[astray] & right_mask
    for number in range(_ROUNDS):
      left ^= mix(right + round_keys[2 * number][astray]) & left_mask
      right ^= mix(left + round_keys[2 * number + 1][astray]) & right_mask
    y[astray] = left << right_bits | right
    astray = y >= size
  return y.astype(np.int64)


def mixing_pattern(weights: tuple[float, ...]) -> NDArray[np.int32]:
  """Source numbers of one period of the mixture, each source spread evenly over it."""
  shares = np.asarray(weights) / np.sum(weights)
  counts = np.maximum(1, np.floor(shares * _PATTERN).astype(int))
  while counts.sum() < _PATTERN:  # the largest remainder gains one
    counts[np.argmax(shares * _PATTERN - counts)] += 1
  counts //= np.gcd.reduce(counts)
  source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
  return source[np.argsort(due, kind="stable")]
