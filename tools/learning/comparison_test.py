"""Comparison of trainings with known differences."""

import numpy as np
import pytest

from tools.learning import comparison, figures
from tools.learning.trained import Trained


def trained(loss, weights=None, **outputs) -> Trained:
  loss = np.asarray(loss, np.float64)
  return Trained({"loss": loss, "grad_norm": loss}, weights or {"kernel": np.ones(2)}, outputs)


def test_the_noise_band_is_the_largest_difference_so_far_or_rounding():
  same = [(trained([1.0, 1.0, 1.0]), trained([1.0, 1.001, 1.0]))]
  band = comparison.noise_band(same)
  np.testing.assert_allclose(band, [1e-6, 1e-3, 1e-3], rtol=2e-3)


def test_a_difference_is_a_multiple_of_the_band():
  band = np.array([1e-6, 1e-3, 1e-3])
  multiple = comparison.excess([(trained([1.0, 1.0, 2.0]), trained([1.0, 1.002, 1.0]))], band)
  np.testing.assert_allclose(multiple, [0, 2, 500], rtol=2e-3)
  assert comparison.first_above(multiple, 10) == 3
  assert comparison.first_above(multiple, 1000) is None


def test_biases_of_keys_are_not_compared():
  one = trained([1.0], {"attn/key/bias": np.array([5.0]), "kernel": np.array([3.0, 4.0])})
  other = trained([1.0], {"attn/key/bias": np.array([-5.0]), "kernel": np.array([3.0, 3.0])})
  assert comparison.weight_distance((one, other)) == pytest.approx(1 / 5)


def test_held_out_metrics_equal_counts_by_hand():
  labels = np.array([0, 1])
  logits = np.array([[2.0, 1.0], [2.0, 1.0]])
  assert comparison.held_out(trained([1.0], logits=logits), labels) == 50
  assert comparison.held_out(trained([1.0], nll=np.array([1.0, 2.0])), labels) == 1.5
  eye = np.eye(20)
  assert comparison.held_out(trained([1.0], image=eye, text=eye), labels) == 100
  assert comparison.held_out(trained([1.0], image=eye, text=-eye), labels) == 0


def test_the_chart_shows_both_sides_and_escapes_its_title():
  steps = np.arange(1, 60) / 10
  some = [trained(steps), trained(steps + 1e-6)]
  svg = figures.render("a < b", some, some)
  assert "a &lt; b" in svg and svg.count("within PyTorch") == 2
  assert svg.count("<path") == 2 * (2 + 2 + 3 + 3)  # a curve and its key each
