import re

import numpy as np
import pytest

from tools.bench import evaluation
from tools.bench.compiling import load_config


def test_the_estimate_is_the_sum_of_its_parts():
  texts = evaluation._Part(lambda: {"cpu_s": 3.0, "clock_s": 2.0}, 10)
  scores = evaluation._Part(lambda: pytest.fail("ran again"), 1, {"cpu_s": 4.0, "clock_s": 5.0})
  assert evaluation._estimate([texts, scores]) == {"cpu_s": 34, "clock_s": 25}
  texts.run()
  assert texts.found == {"cpu_s": 3.0, "clock_s": 2.0}
  # 81,000 prompts are 316.4 times 256.
  assert evaluation._chunks(1000) == 317


def test_names_of_cases_are_distinct(tmp_path):
  names = [case.name for case in evaluation.make(tmp_path).cases]
  assert len(set(names)) == len(names) == 11


def test_scores_and_retrieval_run_on_any_size():
  assert evaluation.classification(pictures=300, classes=40, batch=64)["clock_s"] > 0
  assert evaluation.retrieval(images=50, captions_each=5, width=32)["clock_s"] > 0


def test_towers_embed_all_images_and_texts():
  config = load_config("openvision.py", evaluation.TOWERS.format(32))
  config = _small(config, "encoder_options", "text_options", "decoder_options")
  towers = evaluation.Towers(config, batch=2, pictures=4, classes=3, templates=2, chunk=4)
  pictures, texts = towers.pictures(), towers.texts()
  np.testing.assert_allclose(pictures["images_per_s"] * pictures["clock_s"], 4)
  np.testing.assert_allclose(texts["texts_per_s"] * texts["clock_s"], 6)


def test_captions_are_written_and_scored():
  config = load_config("openvision2.py", re.sub("res=160", "res=32", evaluation.WRITER))
  config = _small(config.with_settings({"batch_size": 2}), "encoder_options", "decoder_options")
  writer = evaluation.Writer(config, captions=3, scored=4)
  written = writer.write(8)
  np.testing.assert_allclose(written["tokens_per_s"] * written["clock_s"], 3 * 8)
  scored = writer.likelihood()
  np.testing.assert_allclose(scored["images_per_s"] * scored["clock_s"], 4)


def _small(config, *parts):
  return config.with_settings({f"model.{part}": {"depth": 1} for part in parts})
