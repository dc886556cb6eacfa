import json
import math

from ov_eval.results import Result, write_results


def test_written_file_is_complete_valid_json(tmp_path):
  path = tmp_path / "eval.json"
  figures = [Result("caption_nll", 1.5, 10, 1.0, 2.0, "nats"), Result("perplexity", math.inf, 10)]
  write_results(path, figures, split="heldout", step=7, examples_seen=448, prompts="ab12")
  read = json.loads(path.read_text(), parse_constant=lambda text: 1 / 0)
  assert read["step"] == 7 and read["examples_seen"] == 448 and read["prompts"] == "ab12"
  assert read["results"] == [
    {"name": "caption_nll", "value": 1.5, "count": 10, "unit": "nats", "interval": [1.0, 2.0]},
    {"name": "perplexity", "value": None, "count": 10, "unit": "", "interval": None},
  ]
  assert list(tmp_path.iterdir()) == [path]
