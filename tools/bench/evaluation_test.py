import re

import numpy as np
import pytest

from tools.bench import embedding, evaluation, writing
from tools.bench.compiling import load_config


def test_the_whole_is_what_its_parts_took(tmp_path):
  texts = evaluation._Part(lambda: {"cpu_s": 3.0, "clock_s": 2.0}, 10)
  scores = evaluation._Part(lambda: pytest.fail("ran again"), 1, {"cpu_s": 4.0, "clock_s": 5.0})
  assert evaluation._estimate([texts, scores]) == {"cpu_s": 34, "clock_s": 25}
  texts.run()
  assert texts.found == {"cpu_s": 3.0, "clock_s": 2.0}
  # 81,000 prompts are 316.4 times 256.
  assert evaluation._chunks(1000) == 317


def test_cases_and_ratios(tmp_path):
  benchmark = evaluation.make(tmp_path)
  names = {case.name for case in benchmark.cases}
  assert len(names) == len(benchmark.cases)
  assert all({ratio.case, ratio.base} <= names for ratio in benchmark.ratios)
  (plot,) = benchmark.plots
  assert {row for points in plot.lines.values() for _, row in points} <= names


def test_ways_to_classify_agree():
  scores = embedding.Scores(pictures=300, classes=40, batch=64)
  assert scores.ours()["clock_s"] > 0
  assert scores.naive()["clock_s"] > 0
  assert 0.2 < scores.shares[0] < scores.shares[1] < 1  # some are found, so that there is a choice
  scores._labels = (scores._labels + 1) % 40
  with pytest.raises(RuntimeError, match="two ways to classify found"):
    scores.naive()


def test_ways_to_retrieve_agree():
  pairs = embedding.Retrieval(images=50, captions_each=5, width=32)
  assert pairs.ours()["clock_s"] > 0
  assert pairs.naive()["clock_s"] > 0
  assert all(0 < recall < 1 for recall in (pairs.recall[0], pairs.recall[3]))
  pairs._owner = np.roll(pairs._owner, 1)
  with pytest.raises(RuntimeError, match="two ways to retrieve found"):
    pairs.naive()


def test_towers_embed_what_is_asked_for():
  config = load_config("openvision.py", evaluation.TOWERS.format(32))
  _make_small(config, "encoder_options", "text_options", "decoder_options")
  towers = embedding.Towers(config, batch=2, pictures=4, classes=3, templates=2, chunk=4)
  pictures, texts = towers.pictures(), towers.texts()
  np.testing.assert_allclose(pictures["images_per_s"] * pictures["clock_s"], 4)
  np.testing.assert_allclose(texts["texts_per_s"] * texts["clock_s"], 6)


def test_ways_to_write_and_to_score_agree():
  config = load_config("openvision2.py", re.sub("res=160", "res=32", evaluation.WRITER))
  config.batch_size = 2
  _make_small(config, "encoder_options", "decoder_options")
  writer = writing.Writer(config, captions=3, scored=4)
  written = writer.write(8)
  np.testing.assert_allclose(written["tokens_per_s"] * written["clock_s"], 3 * 8)
  assert len(np.unique(writer.written[8])) > 3  # no word that is written again and again
  writer.write_naively(8)
  writer.likelihood()
  scored = writer.naive_likelihood()
  np.testing.assert_allclose(scored["images_per_s"] * scored["clock_s"], 4)
  writer.written[8] = writer.written[8] + 1
  with pytest.raises(RuntimeError, match="two ways to write 8 tokens gave other captions"):
    writer.write_naively(8)


def _make_small(config, *parts):
  for part in parts:
    config.model[part] = {"depth": 1}
