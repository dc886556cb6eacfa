"""The searches: what is tried, in which order, and what is taken. Nothing is compiled here."""

from collections.abc import Callable
import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from apps.configs.base import caption_config
from apps.trainer.stages import Stage
from tools.preflight.assess import find_batch, remedies, short_source
from tools.preflight.compile import Memory, refusal
from tools.preflight.topology import Target, parse

V4 = parse("v4-64")  # 32 chips
TARGET = Target("v4-64", V4.chip, 32, 8, V4.chip.usable_hbm, V4, here=False)


def _stage(**changes: Any) -> Stage:
  config = caption_config()
  config.update_from_flattened_dict({"batch_size": 32 * 64, **changes})
  return Stage(0, "main", config, 0)


def _machine(fits: Callable[[Any], bool]) -> tuple[Callable[[Stage], Any], list[int]]:
  """An assessment that only looks whether a configuration fits, and the batches it saw."""
  seen: list[int] = []

  def one(stage: Stage) -> Any:
    seen.append(stage.config.batch_size // 32)
    answer = fits(stage.config)
    return SimpleNamespace(fits=answer, numbers={"fits": answer}, config=stage.config)

  return one, seen


@pytest.mark.parametrize(
  "limit, found, most",
  [
    (64, 64, 6),  # doubled once, then between 64 and 128 until an eighth is left
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
  assert found <= limit < found * 9 / 8 + 1  # to an eighth
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
  # Only fewer images at once help: the others are tried and told.
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


def test_remedies_that_are_in_place_are_left_out():
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
def test_what_a_compiler_says_of_too_little_memory(message: str, expected: Any):
  assert refusal(message) == expected


def test_peak_counts_donated_arrays_once():
  memory = Memory(arguments=100, outputs=90, temporaries=30, aliased=88)
  assert memory.peak == 132
  assert dataclasses.replace(memory, aliased=0).peak == 220


@pytest.mark.parametrize(
  "source, short",
  [
    ("/x/apps/trainer/step.py:169", "apps/trainer/step.py:169"),
    ("/x/packages/ov-models/ov_models/blocks.py:1", "ov_models/blocks.py:1"),
    ("/x/python3.11/site-packages/optax/tree.py:7", "optax/tree.py:7"),
    ("/else/where.py:3", "/else/where.py:3"),
  ],
)
def test_short_sources(source: str, short: str):
  assert short_source(source) == short
  assert re.fullmatch(r".*:\d+", short)
