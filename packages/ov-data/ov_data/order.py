"""Stateless shuffling: a map from a position in the training stream to a record.

    Order(sizes, ...)(positions) -> source, record, epoch

A position is the index of an example in the endless global stream over all hosts. The reading state
is therefore one integer, and a host with rows [a, b) of a global batch reads the positions
[start + a, start + b) for any number of hosts.

Shuffling needs no index list. `permute` is a keyed bijection of [0, n): an alternating Feistel
network on the next power of two with cycle walking (Black and Rogaway 2002,
https://doi.org/10.1007/3-540-45760-7_9). Time and memory do not depend on n.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ov_data.hashing import Uint64s, keys, mix

Int64s = NDArray[np.int64]

_ROUNDS = 4  # rounds of two half-rounds
_PATTERN = 1000  # maximum length of the mixing pattern: weights are accurate to 0.0005
_WINDOW_SALT, _BLOCK_SALT = 1, 2


@dataclasses.dataclass(frozen=True)
class RecordRefs:
  """The records at n positions."""

  source: Int64s  # [n]
  record: Int64s  # [n], index of the record in its source
  epoch: Int64s  # [n], epoch of that source


@dataclasses.dataclass(frozen=True)
class Order:
  """Order of the records of one or several sources of the given `sizes`.

  Several sources are mixed by `weights` in a fixed periodic pattern. Each source has its own
  epochs, which contain every record exactly once.

  Values of shuffle:
    "global": permute all records of an epoch; for local disks and fast storage.
    "block": permute runs of `block` consecutive records, then shuffle records within windows of
      `window` runs; for object stores and spinning disks, where sequential reads are cheap. With
      `lanes` > 1, that many windows are read at a time, and the rows of a batch are assigned to
      them in stripes of `lane_rows`, so a host reads only the windows of its own rows.
    "none": stored order, the same in every epoch.

  Examples:
    >>> import numpy as np
    >>> import ov_data
    >>> order = ov_data.Order((4,), seed=1)
    >>> sorted(order(np.arange(4)).record.tolist())  # an epoch has every record once
    [0, 1, 2, 3]
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
      raise ValueError(f"seed={self.seed}: expected a 64-bit integer")
    if min(self.sizes) < 1:
      raise ValueError(f"sizes={self.sizes}: every source requires at least one record")
    if not all(0 < weight < math.inf for weight in self.weights):
      raise ValueError(
        f"weights={self.weights}: expected positive numbers; omit a source "
        "instead of setting its weight to 0"
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

  def __call__(self, positions: Int64s) -> RecordRefs:
    """Return the records at global positions (int64 [n], >= 0)."""
    pattern = mixing_pattern(self.weights)
    cycle, phase = np.divmod(positions, len(pattern))
    source = pattern[phase].astype(np.int64)
    record, epoch = np.zeros_like(positions), np.zeros_like(positions)
    for number, size in enumerate(self.sizes):
      selected = source == number
      before = np.cumsum(pattern == number) - (pattern == number)  # earlier entries of this source
      local = cycle[selected] * np.count_nonzero(pattern == number) + before[phase[selected]]
      epoch[selected], within = np.divmod(local, size)
      record[selected] = self._shuffled(within, size, keys(self.seed, number, epoch[selected]))
    return RecordRefs(source, record, epoch)

  def _shuffled(self, within: Int64s, size: int, key: Uint64s) -> Int64s:
    if self.shuffle == "global":
      return permute(within, size, key)
    if self.shuffle == "block":
      return self._block_shuffled(within, size, key)
    return within

  def _block_shuffled(self, within: Int64s, size: int, key: Uint64s) -> Int64s:
    window_records = self.block * self.window
    turn = self.lanes * window_records  # one window per lane
    in_turns = within < size // turn * turn
    turns, slot = np.divmod(within, turn)
    lane = slot // self.lane_rows % self.lanes
    stripe = slot // (self.lane_rows * self.lanes)
    # After the last complete turn, windows are read one by one; the last may be short.
    window = np.where(in_turns, turns * self.lanes + lane, within // window_records)
    slot = np.where(
      in_turns, stripe * self.lane_rows + slot % self.lane_rows, within % window_records
    )
    window_key = keys(key, _WINDOW_SALT, window)
    whole = window < size // window_records
    slot[whole] = permute(slot[whole], window_records, window_key[whole])
    slot[~whole] = permute(slot[~whole], size % window_records, window_key[~whole])
    run, offset = np.divmod(window * window_records + slot, self.block)
    whole = run < size // self.block  # a short run at the end is not moved
    run[whole] = permute(run[whole], size // self.block, keys(key, _BLOCK_SALT)[whole])
    return run * self.block + offset


def permute(x: Int64s, size: int, key: Uint64s) -> Int64s:
  """Apply a keyed permutation of [0, size) to `x`, with one key per element (both [n]).

  The expected cost is less than two evaluations of the network per element.
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
  """Return the source index at each position of one period, with sources evenly interleaved."""
  fractions = np.asarray(weights) / np.sum(weights)
  counts = np.maximum(1, np.floor(fractions * _PATTERN).astype(int))
  while counts.sum() < _PATTERN:  # largest remainder method
    counts[np.argmax(fractions * _PATTERN - counts)] += 1
  counts //= np.gcd.reduce(counts)
  source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
  return source[np.argsort(due, kind="stable")]
