"""Tests of comparisons: rows, names, and detection of all kinds of differences."""

import json

import numpy as np
import pytest

from ov_convert import parity


def outputs(seed: int = 0) -> dict[str, np.ndarray]:
  """Arrays as a small model of two blocks gives them, in the order of computation."""
  rng = np.random.default_rng(seed)
  unit = rng.normal(size=(3, 8))
  unit /= np.linalg.norm(unit, axis=1, keepdims=True)
  arrays = {
    "image/pixels": rng.normal(size=(3, 6, 6, 3)),
    "text/ids": rng.integers(0, 9, (4, 5)),
    "image/block_00": rng.normal(size=(3, 5, 8)),
    "image/block_01": 10 * rng.normal(size=(3, 5, 8)),
    "image/block_02": 10 * rng.normal(size=(3, 5, 8)),
    "image/pooled": rng.normal(size=(3, 8)),
    "image/embedding": unit,
  }
  return {k: a.astype(np.float32) if a.dtype.kind == "f" else a for k, a in arrays.items()}


def judged(change=None, facts=None, required=()):
  ours, theirs = outputs(), outputs()
  if change:
    change(theirs)
  return parity.compare(ours, parity.Output(theirs, facts or {}, {}), required)


def test_equal_outputs_agree():
  rows = judged(required=outputs())
  assert [row.name for row in rows] == list(outputs())
  assert all(row.ok for row in rows) and parity.first_failure(rows) is None
  assert all(row.cosine is None or row.cosine > 1 - 1e-6 for row in rows)


@pytest.mark.parametrize(
  ("name", "amount", "ok"),
  [
    ("image/embedding", 0.9e-4, True),
    ("image/embedding", 1.2e-4, False),
    ("image/block_01", 1e-3, True),  # entries reach 20 and more: 1e-4 of that
    ("image/block_01", 1e-2, False),
    ("image/pooled", 5e-4, False),
  ],
)
def test_tolerances(name, amount, ok):
  def change(arrays):
    arrays[name].flat[3] += amount

  row = next(row for row in judged(change) if row.name == name)
  assert row.ok == ok
  assert row.max_abs == pytest.approx(amount, rel=0.05)


def test_the_first_failing_block_is_named():
  def change(arrays):
    arrays["image/block_01"] += 0.1
    arrays["image/block_02"] += 1.0
    arrays["image/embedding"] += 1.0

  rows = judged(change)
  assert parity.first_failure(rows).name == "image/block_01"
  assert "image/block_01 differs by 1.0e-01" in parity.explain(parity.first_failure(rows))
  text = parity.table(rows)
  assert text.count("FAILS") == 3 and "image/blocks" in text


def test_wrong_settings_explain_before_numbers_do():
  def change(arrays):
    arrays["image/block_01"] += 0.1

  facts = {
    "image/blocks.0.norm1: layer norm eps": 1e-6,
    "image/blocks.0.mlp.act: activation": "gelu",
    "text/blocks.0.mlp.act: activation": "gelu tanh",
    "image/norm: layer norm eps": 1e-5,
  }
  first = parity.first_failure(judged(change, facts))
  assert parity.explain(first) == "setting image/norm: layer norm eps: is 1e-05, expected 1e-06"
  for name, value in (
    ("image/blocks.0.mlp.act: activation", "gelu tanh"),
    ("text/blocks.0.mlp.act: activation", "gelu"),
    ("decoder/blocks.0.mlp.act: activation", "quick gelu"),
  ):
    assert parity.first_failure(judged(facts={name: value})).name == f"setting {name}"
  assert parity.first_failure(judged(facts={"logit scale": 3.0})) is None


def test_ids_must_be_equal():
  def change(arrays):
    arrays["text/ids"][1, 2] += 1

  row = parity.first_failure(judged(change))
  assert (row.name, row.max_abs) == ("text/ids", 0.25)
  assert parity.explain(row) == "text/ids: 25% of the rows differ"


def test_pixels_are_judged_by_their_mean():
  level = 1 / (255 * 0.226)  # of 255, in normalised units

  def one_pixel(arrays):
    arrays["image/pixels"].flat[0] += 20 * level

  def everywhere(arrays):
    arrays["image/pixels"] += 1.5 * level

  (row, *_) = judged(one_pixel)
  assert row.ok and row.max_abs == pytest.approx(20, rel=1e-3)
  (row, *_) = judged(everywhere)
  assert not row.ok and row.measured == pytest.approx(1.5, rel=1e-3)
  assert "check the filter, the crop and the normalization" in parity.explain(row)


def test_images_with_rounded_crops_have_another_tolerance():
  level = 1 / (255 * 0.226)
  ours, moved = outputs(), outputs()
  moved["image/pixels"][2:] += 20 * level
  rows = parity.compare(ours, parity.Output(moved, {}, {}), exact_crops=2)
  exact, rounded = rows[:2]
  assert (exact.name, rounded.name) == (parity.PIXELS, parity.ROUNDED_PIXELS)
  assert exact.measured == 0 and rounded.measured == pytest.approx(20, rel=1e-3)
  assert exact.ok and rounded.ok
  moved["image/pixels"][2:] += 20 * level
  assert not parity.compare(ours, parity.Output(moved, {}, {}), exact_crops=2)[1].ok


def test_missing_misshapen_and_non_finite_arrays():
  def change(arrays):
    del arrays["image/pooled"], arrays["image/block_01"]
    arrays["image/block_00"] = arrays["image/block_00"][:, 1:]
    arrays["image/embedding"][0, 0] = np.nan

  rows = {row.name: row for row in judged(change, required=["image/pooled"])}
  assert "image/block_01" not in rows  # not required
  assert rows["image/pooled"].problem == "the library did not return this output"
  assert rows["image/block_00"].problem == "has shape (3, 4, 8), expected (3, 5, 8)"
  assert rows["image/embedding"].problem == "contains NaN or Inf"
  assert not any(rows[n].ok for n in ("image/pooled", "image/block_00", "image/embedding"))


def test_output_comes_back(tmp_path):
  about = json.dumps({"facts": {"a": 1}, "versions": {"timm": "1"}})
  np.savez(tmp_path / "o.npz", about=np.array(about), **outputs())
  output = parity.Output.load(tmp_path / "o.npz")
  assert output.facts == {"a": 1} and output.versions == {"timm": "1"}
  assert list(output.arrays) == list(outputs())
  json.dumps([row.to_json() for row in parity.compare(outputs(), output)])
