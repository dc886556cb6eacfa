"""Tests that examples and positions follow from the history, not from the configuration."""

import random

import pytest

from apps.trainer.history import History, Span


def test_batch_size_change():
  history = History()
  history.begin("main", 0, 16)
  history.begin("main", 4, 8)  # resumed after 4 steps
  assert history.examples(4) == history.position(4) == 64
  assert history.examples(8) == history.position(8) == 96
  assert history.spans == (Span("main", 0, 0, 0, 16), Span("main", 4, 64, 64, 8))


def test_position_per_stage():
  history = History()
  history.begin("a", 0, 16)
  history.begin("a", 2, 16)  # resumed with the same batch size: nothing is added
  history.begin("b", 10, 4)
  assert [span.stage for span in history.spans] == ["a", "b"]
  assert (history.examples(10), history.position(10)) == (160, 160)
  assert (history.examples(13), history.position(13)) == (172, 12)
  assert (history.first_step("a"), history.first_step("b")) == (0, 10)
  assert history.first_step("c") is None


def test_empty_span_is_dropped():
  history = History()
  history.begin("a", 0, 16)
  history.begin("a", 0, 8)
  assert history.spans == (Span("a", 0, 0, 0, 8),)
  assert History().examples(0) == History().position(0) == 0


def test_resumes_count_every_example_once():
  dice = random.Random(0)
  for _ in range(50):
    history, step, examples = History(), 0, 0
    for stage in "abc":
      position = 0
      for _ in range(dice.randint(1, 4)):
        batch_size, steps = dice.choice((1, 8, 32)), dice.randint(0, 5)
        history = History(history.spans)  # saved and read again
        history.begin(stage, step, batch_size)
        step, examples = step + steps, examples + steps * batch_size
        position += steps * batch_size
        assert history.examples(step) == examples
        if position:
          assert history.position(step) == position


@pytest.mark.parametrize(
  "spans",
  [
    (Span("a", 0, 0, 0, 16), Span("a", 4, 64, 64, 8), Span("a", 2, 32, 32, 8)),
    (Span("a", 0, 0, 0, 16), Span("a", 4, 65, 64, 8)),
    (Span("a", 0, 0, 0, 16), Span("a", 4, 64, 63, 8)),
    (Span("a", 0, 0, 0, 16), Span("b", 4, 64, 64, 8)),
  ],
)
def test_inconsistent_history(spans):
  with pytest.raises(ValueError, match="inconsistent after step"):
    History(spans)
