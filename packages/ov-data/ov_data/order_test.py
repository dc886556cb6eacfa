import numpy as np
import pytest

from ov_data.hashing import Uniforms, key, keys
from ov_data.order import Order, mixing_pattern, permute

SIZES = [1, 2, 3, 4, 5, 7, 31, 97, 1000, 1024, 1025, 7919]


def _key(seed, n):
  return np.broadcast_to(keys(seed), n)


@pytest.mark.parametrize("size", SIZES + [10**6])
def test_permute_is_a_bijection(size):
  y = permute(np.arange(size), size, _key(3, size))
  np.testing.assert_array_equal(np.sort(y), np.arange(size))


def test_permute_needs_no_memory_for_a_billion_records():
  x = np.array([0, 1, 10**9 - 1])
  y = permute(x, 10**9, _key(0, 3))
  assert len(set(y)) == 3 and y.min() >= 0 and y.max() < 10**9


@pytest.mark.parametrize("size", [3, 5, 10, 100])
def test_permute_is_uniform(size):
  # Uniformity of element and position: chi-square with (size - 1)^2 degrees of freedom stays within
  # 5 standard deviations (sqrt(2 dof)) of its mean.
  trials = 40_000 // size
  x = np.tile(np.arange(size), trials)
  y = permute(x, size, np.repeat(keys(np.arange(trials)), size))
  counts = np.zeros((size, size))
  np.add.at(counts, (x, y), 1)
  chi2 = ((counts - trials / size) ** 2 / (trials / size)).sum()
  dof = (size - 1) ** 2
  assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)


def test_neighbors_are_separated():
  # The mean distance of neighbors in a random permutation of n is n / 3.
  y = permute(np.arange(100_000), 100_000, _key(1, 100_000))
  assert abs(np.abs(np.diff(y)).mean() / 100_000 - 1 / 3) < 0.01
  assert abs(np.corrcoef(np.arange(100_000), y)[0, 1]) < 0.02  # 1 / sqrt(n) = 0.003


def test_the_order_is_frozen():
  # A changed order would silently repeat and lose examples when old checkpoints resume.
  refs = Order(sizes=(10,), seed=7)(np.arange(12))
  assert refs.record.tolist() == FROZEN_GLOBAL
  refs = Order(sizes=(10,), seed=7, shuffle="block", block=2, window=2)(np.arange(12))
  assert refs.record.tolist() == FROZEN_BLOCK
  assert [round(Uniforms(1, 2)(), 12)] == FROZEN_UNIFORM


FROZEN_GLOBAL = [9, 1, 7, 3, 5, 8, 6, 2, 4, 0, 0, 5]
FROZEN_BLOCK = [0, 9, 8, 1, 4, 5, 7, 6, 3, 2, 3, 9]
FROZEN_UNIFORM = [0.900610908893]


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lanes", [1, 3])
def test_every_record_once_an_epoch(shuffle, size, lanes):
  order = Order((size,), seed=1, shuffle=shuffle, block=6, window=3, lanes=lanes, lane_rows=2)
  refs = order(np.arange(3 * size))
  np.testing.assert_array_equal(refs.epoch, np.repeat([0, 1, 2], size))
  for epoch in range(3):
    np.testing.assert_array_equal(np.sort(refs.record[refs.epoch == epoch]), np.arange(size))


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_epochs_and_seeds_differ(shuffle):
  def first_epochs(seed):
    return Order((1000,), seed=seed, shuffle=shuffle, block=10, window=4)(np.arange(2000)).record

  one, other = first_epochs(0), first_epochs(1)
  assert (one[:1000] == one[1000:]).mean() < 0.05
  assert (one == other).mean() < 0.05


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_hosts_may_change(shuffle):
  # Batches of 24 over epochs of 100, read by 1, 2, 4 and 1 host(s): the stream equals that of a
  # single host, without lost or repeated examples, also across epochs.
  order = Order((100,), seed=5, shuffle=shuffle, block=8, window=2, lanes=2, lane_rows=4)
  stream = []
  for step, hosts in enumerate([1, 2, 2, 4, 4, 1, 2, 4]):
    rows = 24 // hosts
    for host in range(hosts):
      stream.append(order(np.arange(24 * step + host * rows, 24 * step + (host + 1) * rows)).record)
  stream = np.concatenate(stream)
  np.testing.assert_array_equal(stream, order(np.arange(len(stream))).record)
  np.testing.assert_array_equal(np.sort(stream[:100]), np.arange(100))


def test_blocks_keep_neighbors_together():
  order = Order((10_000,), shuffle="block", block=50, window=4)
  records = order(np.arange(10_000)).record.reshape(-1, 200)  # by window
  assert all(len(np.unique(window // 50)) == 4 for window in records)


def test_a_host_reads_only_its_lanes():
  # 4 hosts, batches of 32, 4 lanes: in the first turn a host touches a quarter of the runs.
  order = Order((4096,), shuffle="block", block=16, window=4, lanes=4, lane_rows=8)
  positions = np.arange(256).reshape(8, 32)  # 8 batches = one turn
  runs = [set(order(positions[:, 8 * h : 8 * h + 8].ravel()).record // 16) for h in range(4)]
  assert [len(r) for r in runs] == [4, 4, 4, 4]
  assert len(set.union(*runs)) == 16


def test_mixing_follows_the_weights():
  order = Order((1000, 50), weights=(3.0, 1.0), seed=2)
  refs = order(np.arange(4000))
  assert np.count_nonzero(refs.source == 0) == 3000
  for start in range(0, 4000, 4):  # evenly interleaved
    assert np.count_nonzero(refs.source[start : start + 4] == 1) == 1
  small = refs.record[refs.source == 1].reshape(-1, 50)  # 20 epochs of the small source
  for epoch in small:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
  np.testing.assert_array_equal(np.sort(refs.record[refs.source == 0][:1000]), np.arange(1000))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (0.7, 0.2, 0.1), (1000.0, 0.001)])
def test_mixing_pattern(weights):
  pattern = mixing_pattern(weights)
  shares = np.bincount(pattern, minlength=len(weights)) / len(pattern)
  np.testing.assert_allclose(shares, np.asarray(weights) / sum(weights), atol=0.001)
  assert shares.min() > 0


def test_key_of_integers_and_of_arrays_agree():
  words = [(0, 0), (1, 2), (-1, 5), (2**62, 3)]
  np.testing.assert_array_equal(keys(*np.array(words).T), [key(*word) for word in words])


def test_uniforms():
  draws = np.array([Uniforms(0, index)() for index in range(20_000)])
  assert draws.min() >= 0 and draws.max() < 1
  assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * len(draws))
  stream = Uniforms(0)
  draws = [stream.below(3) for _ in range(3000)]
  assert set(draws) == {0, 1, 2}


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(sizes=(0,)), "at least one record"),
    (dict(sizes=(1,), weights=(0.0,)), "positive"),
    (dict(sizes=(1, 2)), "2 sources and 1 weights"),
    (dict(sizes=(1,), shuffle="all"), "shuffle='all'"),
    (dict(sizes=(1,), block=0), "block=0"),
    (dict(sizes=(1,), shuffle="block", block=5, window=1, lane_rows=2), "not a multiple"),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    Order(**arguments)
