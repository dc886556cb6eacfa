"""Tests of the searches: the settings tried, their order, and the result, without compilation."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from apps.configs.base import caption_config, resolve
from apps.trainer.parts import peak_bytes
from apps.trainer.stages import Stage
from tools.preflight.assess import find_batch, remedies
from tools.preflight.compile import refusal
from tools.preflight.topology import parse

TARGET = parse("v4-64")  # 32 chips


def _stage(**changes: Any) -> Stage:
  config = resolve(caption_config()).with_settings({"batch_size": 32 * 64, **changes})
  return Stage(0, "main", config, 0)


def _machine(fits: Callable[[Any], bool]) -> tuple[Callable[[Stage], Any], list[int]]:
  """Return a fake assessment that only checks the memory limit, and the list of its batch sizes."""
  seen: list[int] = []

  def one(stage: Stage) -> Any:
    seen.append(stage.config.batch_size // 32)
    answer = fits(stage.config)
    return SimpleNamespace(fits=answer, numbers={"fits": answer}, config=stage.config)

  return one, seen


@pytest.mark.parametrize(
  "limit, found, most",
  [
    (64, 64, 6),  # doubled once, then bisected between 64 and 128 to within 1/8
    (100, 96, 7),
    (20, 20, 9),
    (1, 1, 9),
  ],
)
def test_the_largest_batch(limit: int, found: int, most: int):
  one, seen = _machine(lambda config: config.batch_size <= limit * 32)
  said: list[str] = []
  best = find_batch(one, _stage(), TARGET, said.append)
  assert best is not None and best.config.batch_size == found * 32
  assert found <= limit < found * 9 / 8 + 1  # within 1/8
  assert len(seen) == len(set(seen)) == len(said) <= most  # nothing is compiled twice


def test_no_batch_fits():
  one, _ = _machine(lambda config: False)
  assert find_batch(one, _stage(), TARGET, lambda text: None) is None


def test_a_batch_is_a_multiple_of_its_micro_batches():
  one, seen = _machine(lambda config: config.batch_size <= 100 * 32)
  best = find_batch(one, _stage(accumulate=8), TARGET, lambda text: None)
  assert best is not None and best.config.batch_size == 96 * 32
  assert all(size % 8 == 0 for size in seen)


def test_remedies_are_tried_one_by_one():
  # Only a smaller micro-batch fits; the other remedies are tried and reported.
  one, _ = _machine(lambda config: config.batch_size // config.accumulate <= 16 * 32)
  tried = [(setting, result.fits) for setting, result in remedies(one, _stage(), TARGET)]
  assert tried == [
    ("--config.model.remat=full", False),
    ("--config.model.dtype=bfloat16", False),
    ("--config.mesh.data=-1 --config.mesh.fsdp=16", False),
    ("--config.accumulate=2", False),
    ("--config.accumulate=4", True),
    ("--config.batch_size=1024", False),
    ("--config.batch_size=512", True),
  ]


def test_remedies_already_in_use_are_skipped():
  stage = _stage(
    **{"model.remat": "full", "model.dtype": "bfloat16", "mesh.fsdp": 8, "batch_size": 32}
  )
  one, _ = _machine(lambda config: False)
  assert list(remedies(one, stage, TARGET)) == []


@pytest.mark.parametrize(
  "message, expected",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(298.5G) exceeds available HBM (30.75G).",
      (int(298.5 * 2**30), int(30.75 * 2**30)),
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 43.81G of 15.75G hbm. Exceeded hbm capacity by 28.06G.",
      (int(43.81 * 2**30), int(15.75 * 2**30)),
    ),
    ("RESOURCE_EXHAUSTED: something else", None),
    ("INVALID_ARGUMENT: Used 1.0G of 1.0G hbm", None),
  ],
)
def test_out_of_memory_errors_of_compilers(message: str, expected: Any):
  assert refusal(message) == expected


def test_peak_counts_donated_arrays_once():
  sizes = {"argument": 100, "output": 90, "temp": 30, "alias": 88}
  memory = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
  assert peak_bytes(memory) == 132
  memory.alias_size_in_bytes = 0
  assert peak_bytes(memory) == 220
