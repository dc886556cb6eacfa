"""A run killed before a file change resumes with equal results, for a sample of file changes.

`kill_points_nightly_test` covers all of them.
"""

import pytest

from tests.end_to_end import kill_points

_TRIED = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def points(folder):
  return kill_points.record("caption", folder)


def test_points_cover_all_outputs_of_a_run(points):
  changed = " ".join(point.change for point in points)
  for name in ("data/", "tokenizer", "config.json", "metrics.jsonl", "manifest", "report.html"):
    assert name in changed
  assert len(points) > 100


def test_every_point_resumes(points, folder):
  tried = points[3 :: len(points) // _TRIED]
  wrong = [
    f"before {point.change}: {found}"
    for point, found in kill_points.try_points("caption", tried, folder)
    if found
  ]
  assert not wrong


def test_differences_are_found(points, folder, tmp_path):
  """The comparison detects changes."""
  undisturbed = folder / "undisturbed"
  other = tmp_path / "other"
  other.mkdir()
  lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
  (other / "metrics.jsonl").write_text("\n".join([*lines[:-2], lines[-1]]) + "\n")
  (tmp_path / "other.arrays").write_text("0")
  found = kill_points.differences(undisturbed, other)
  assert any("lines against" in line for line in found)
  assert "the last checkpoints differ in their arrays" in found
  assert "report.json is missing" in found
