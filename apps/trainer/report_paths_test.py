from pathlib import Path

import pytest

from apps.trainer.report_paths import relative


@pytest.mark.parametrize(
  ("workdir", "text", "shown"),
  (
    ("/people/ann/runs/a", "/people/ann/runs/a/data", "data"),
    ("/people/ann/runs/a", "/people/ann/runs/a", "."),
    ("/people/ann/runs/a", "/people/ann/shards/*.tfrecord", "../../shards/*.tfrecord"),
    ("/scratch/a", "/people/ann/shards", "~/shards"),
    ("/scratch/a", "/people/ann", "~"),
    ("/scratch/a", "/scratch/shards", "../shards"),
    ("/scratch/a", "read /scratch/a/checkpoints/4: 12", "read ./checkpoints/4: 12"),
    ("/scratch/a", "from /people/ann/b step 3", "from ~/b step 3"),
    ("/scratch/a", "gs://bucket/shards", "gs://bucket/shards"),
    ("/scratch/a", "a red circle / a blue square", "a red circle / a blue square"),
    ("/scratch/a", "", ""),
  ),
)
def test_paths_are_relative_to_the_workdir(monkeypatch, workdir, text, shown):
  monkeypatch.setenv("HOME", "/people/ann")
  assert relative(text, Path(workdir)) == shown


def test_nested_values(monkeypatch):
  monkeypatch.setenv("HOME", "/people/ann")
  value = {"a": ["/w/run/x", 3, None], "b": {"/w/run/k": ("/w/y",)}}
  assert relative(value, Path("/w/run")) == {"a": ["x", 3, None], "b": {"k": ("../y",)}}
