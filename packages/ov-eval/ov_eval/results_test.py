import json
import math

import pytest

from ov_eval.results import Result, read_results, with_context, write_results


def test_written_file_is_valid_json(tmp_path):
  path = tmp_path / "eval.json"
  results = [Result("caption_nll", 1.5, 10, 1.0, 2.0, "nats"), Result("perplexity", math.inf, 10)]
  write_results(path, results, split="heldout", step=7, examples_seen=448, prompts="ab12")
  read = json.loads(path.read_text(), parse_constant=lambda text: 1 / 0)
  assert read["step"] == 7 and read["examples_seen"] == 448 and read["prompts"] == "ab12"
  assert read["results"] == [
    {"name": "caption_nll", "value": 1.5, "count": 10, "unit": "nats", "interval": [1.0, 2.0]},
    {"name": "perplexity", "value": None, "count": 10, "unit": "", "interval": None},
  ]
  assert list(tmp_path.iterdir()) == [path]


def test_several_evaluations_in_one_file(tmp_path):
  path = tmp_path / "eval.json"
  zero_shot = with_context(
    [Result("zero_shot_top1", 0.5, 50, 0.3, 0.7, "share")],
    evaluator="zero_shot",
    split="pets/test",
    templates_hash="ab12",
  )
  plain = [Result("caption_nll", 1.5, 10, 1.0, 2.0, "nats"), Result("perplexity", math.inf, 10)]
  write_results(
    path, [*zero_shot, *plain], split="heldout", step=7, examples_seen=448, preprocessing="squash"
  )
  read = read_results(path)
  assert (read.split, read.step, read.examples_seen, read.level) == ("heldout", 7, 448, 0.95)
  assert read.context == {"preprocessing": "squash"}
  first, second, third = read.results
  assert first.context == {
    "evaluator": "zero_shot",
    "split": "pets/test",
    "templates_hash": "ab12",
    "preprocessing": "squash",
  }
  assert second.context == {"split": "heldout", "preprocessing": "squash"}
  assert (first.value, first.low, first.high, first.unit) == (0.5, 0.3, 0.7, "share")
  assert math.isnan(third.value) and third.low is None and third.count == 10


def test_with_context_keeps_existing_keys():
  result = Result("top1", 0.5, 10, context={"split": "test"})
  (changed,) = with_context([result], split="train", evaluator="knn")
  assert changed.context == {"split": "test", "evaluator": "knn"}
  assert result.context == {"split": "test"} and hash(changed) == hash(result)


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"results": [], "split": "a", "step": 1}', '{"results": 3}']
)
def test_malformed_files(tmp_path, text):
  path = tmp_path / "other.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="other.json is not a results file"):
    read_results(path)
  with pytest.raises(OSError):
    read_results(tmp_path / "missing.json")
