"""Runs of both apps that are killed before any of their file changes resume with equal results."""

import pytest

from tests.end_to_end import kill_points


@pytest.mark.parametrize("app", kill_points.FLAGS)
def test_every_point_resumes(app, tmp_path):
  points = kill_points.record(app, tmp_path)
  found = {
    f"{point.folder.name} before {point.change}": wrong
    for point, wrong in kill_points.try_points(app, points, tmp_path)
    if wrong
  }
  print(f"{app}: {len(points)} points, {len(found)} with a difference")
  assert not found
