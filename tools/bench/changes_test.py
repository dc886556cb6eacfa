import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import changes, results
from tools.bench.harness import Benchmark, Case, Ratio

TOY = Benchmark("toy", "A toy.", [Case("a", dict), Case("b", dict)], [Ratio("a", "b")])
OLD: dict[str, dict[str, list[float]]] = {
  "a": {"cpu_s": [1.0, 1.1, 1.2, 1.0, 1.1], "clock_s": [1] * 5, "instructions": [10] * 5},
  "b": {"cpu_s": [2.0] * 5, "images_per_cpu_s": [50.0] * 5},
  "a : b": {"cpu_s": [0.5] * 5},
}


def _file(folder: Path, name: str, values: dict[str, Any], **machine: Any) -> str:
  rounds = len(values["a"]["cpu_s"])
  found = results.to_dict([(TOY, values, rounds)], "bench")
  found["machine"] |= machine
  (folder / name).write_text(json.dumps(found))
  return str(folder / name)


@pytest.mark.parametrize(
  "row, metric, values, worse, line",
  [
    ("a", "cpu_s", [1.15, 1.3, 1.4, 1.3, 1.2], False, None),  # the ranges overlap
    ("b", "cpu_s", [2.06] * 5, False, None),  # disjoint ranges, but a difference below the margin
    ("a", "cpu_s", [1.3, 1.3, 1.4, 1.3, 1.5], True, "slower  toy: a, CPU s: 1.1 -> 1.3 (+18.2%)"),
    ("a", "cpu_s", [0.8, 0.9, 0.8, 0.7, 0.8], False, "faster  toy: a, CPU s: 1.1 -> 0.8 (-27.3%)"),
    ("a", "clock_s", [9] * 5, False, None),
    ("a : b", "cpu_s", [0.9] * 5, False, None),  # the cases themselves are compared
    ("a", "instructions", [11] * 5, True, "larger  toy: a, HLO instructions: 10 -> 11 (+10.0%)"),
    ("a", "instructions", [9] * 5, False, "smaller toy: a, HLO instructions: 10 -> 9 (-10.0%)"),
    (
      "b",
      "images_per_cpu_s",
      [40] * 5,
      True,
      "slower  toy: b, images per CPU s: 50 -> 40 (-20.0%)",
    ),
  ],
)
def test_changes_beyond_noise_are_reported(row, metric, values, worse, line, tmp_path: Path):
  new = {name: dict(metrics) for name, metrics in OLD.items()}
  new[row][metric] = values
  text, found = changes.compare(_file(tmp_path, "old.json", OLD), _file(tmp_path, "new.json", new))
  assert found == worse
  assert text.splitlines()[:-1] == ([line] if line else [])


def test_only_counts_and_ratios_are_compared_between_machines(tmp_path: Path):
  new = {name: dict(metrics) for name, metrics in OLD.items()}
  new["b"]["cpu_s"], new["a : b"]["cpu_s"] = [9.0] * 5, [0.9] * 5
  old = _file(tmp_path, "old.json", OLD)
  text, worse = changes.compare(old, _file(tmp_path, "new.json", new, cpu="another", jax="9"))
  assert worse and text.startswith("slower  toy: a : b, CPU s: 0.5 -> 0.9 (+80.0%)\n1 worse")
  assert "other machine: only counts and ratios were compared" in text
  assert f"jax {results.machine()['jax']} before, 9 now" in text


def test_files_that_cannot_be_compared(tmp_path: Path):
  old = _file(tmp_path, "old.json", OLD)
  short = {name: {m: v[:2] for m, v in metrics.items()} for name, metrics in OLD.items()}
  with pytest.raises(ValueError, match="toy ran 2 rounds; expected --rounds=5 or more"):
    changes.compare(old, _file(tmp_path, "short.json", short))
  found = json.loads(Path(old).read_text())
  found["benchmarks"][0]["batch"] = 9
  (tmp_path / "other.json").write_text(json.dumps(found))
  with pytest.raises(ValueError, match="toy: batch was None and is 9; expected equal"):
    changes.compare(old, str(tmp_path / "other.json"))
  found["benchmarks"] = []
  (tmp_path / "none.json").write_text(json.dumps(found))
  with pytest.raises(ValueError, match="no number in common"):
    changes.compare(old, str(tmp_path / "none.json"))
