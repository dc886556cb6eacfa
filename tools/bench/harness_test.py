import os

import numpy as np
import pytest

from tools.bench.harness import (
  Benchmark,
  Case,
  Goal,
  Ratio,
  Stopwatch,
  cpu_seconds_of,
  measure,
  measured,
  rates,
)


def _benchmark(calls: list[str], values: dict[str, list[float]]) -> Benchmark:
  """Return a benchmark whose cases return given values in order and record when they ran."""

  def case(name: str) -> Case:
    given = iter(values[name])

    def run() -> dict[str, float]:
      calls.append(name)
      return {"cpu_s": next(given), "instructions": 7}

    return Case(name, run, warm_up=name == "a")

  return Benchmark(
    "toy", "A toy.", [case("a"), case("b")], [Ratio("a", "b")], [Goal("a : b", "cpu_s", 1)]
  )


def test_rounds_are_interleaved_and_ratios_are_within_rounds():
  calls: list[str] = []
  said: list[str] = []
  toy = _benchmark(calls, {"a": [99, 2, 9], "b": [4, 3]})
  values = measure(toy, 2, said.append)
  assert calls == ["a", "a", "b", "a", "b"]  # the first run is discarded
  assert values["a"]["cpu_s"] == [2, 9] and values["b"]["cpu_s"] == [4, 3]
  assert values["a : b"]["cpu_s"] == [0.5, 3]
  assert said[0].startswith("toy 1/5  eta ?  warming up a")
  assert said[4].startswith("toy 5/5  eta 0:00:00  running b")


def test_a_changed_count_is_an_error():
  counts = iter((1, 2))
  toy = Benchmark(
    "toy", "A toy.", [Case("a", lambda: {"instructions": next(counts)}, warm_up=False)]
  )
  with pytest.raises(RuntimeError, match=r"a: instructions is exact, but was \[1, 2\]"):
    measure(toy, 2, lambda _: None)


def test_only_keeps_related_ratios_and_goals():
  toy = _benchmark([], {"a": [], "b": []})
  assert toy.only(lambda name: name == "a").ratios == []
  assert toy.only(lambda name: name == "a").goals == []
  kept = toy.only(lambda name: True)
  assert [case.name for case in kept.cases] == ["a", "b"]
  assert kept.ratios == [Ratio("a", "b")] and len(kept.goals) == 1


def test_goals():
  assert Goal("a", "cpu_s", 2).reached(2) and not Goal("a", "cpu_s", 2).reached(2.1)
  rate = Goal("a", "images_per_s", 2, at_least=True)
  assert rate.reached(2) and not rate.reached(1.9)


def test_seconds_of_this_process():
  watch = Stopwatch()
  while watch.read()[0] == 0:  # some clocks are coarse
    sum(range(10_000))
  ticks = 1 / os.sysconf("SC_CLK_TCK")  # resolution of the system's counter
  assert abs(cpu_seconds_of(os.getpid()) - sum(os.times()[:2])) <= 2 * ticks


def test_released_memory_counts_at_its_peak():
  mib = 2**20
  _, small = measured(lambda: np.ones(10 * mib, np.uint8))
  total, large = measured(lambda: int(np.ones(100 * mib, np.uint8).sum()))
  assert total == 100 * mib
  # The system counts pages in batches, and this process allocates some for other work.
  assert small["grown_mib"] < 50 < 90 < large["grown_mib"] < 150
  assert large["cpu_s"] > 0 and large["clock_s"] > 0


def test_rates():
  assert rates("images", 12, {"cpu_s": 4, "clock_s": 2}) == {
    "images_per_cpu_s": 3,
    "images_per_s": 6,
  }
