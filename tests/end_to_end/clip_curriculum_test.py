"""A two-tower curriculum whose text length grows by stage, killed in every stage.

The captioner in curriculum_test is killed at the same points. This test adds the text tower: its
text processor, which evaluation and export read, must follow the stage.
"""

import pytest

from apps.trainer.sinks import compare_metrics
import ov_data
from tests.end_to_end import runner
from tests.end_to_end.curricula import Curriculum

_DEEPER = "{'width': 32, 'depth': 2, 'mlp_dim': 64, 'num_heads': 2}"
LENGTHS = (15, 17, 18)  # tokens of a text in each stage
CURRICULUM = Curriculum(
  runner.CLIP_TRAIN,
  ("small", "large", "fine"),
  (
    *runner.tiny_clip(),
    "--config.input.demo.probe_examples=0",
    "--config.stages=({'name': 'small'},"
    f" {{'name': 'large', 'model.image_size': 48, 'model.token_len': {LENGTHS[1]}}},"
    f" {{'name': 'fine', 'model.encoder': 'mu/8', 'model.token_len': {LENGTHS[2]},"
    f" 'model.caption_len': 16, 'model.decoder_options': {_DEEPER}, 'batch_size': 8}})",
  ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


def test_kill_9_in_every_stage_changes_no_metric(tmp_path_factory, tmp_path, cache):
  undisturbed = tmp_path_factory.mktemp("undisturbed")
  printed = CURRICULUM.run(undisturbed, cache=cache)
  assert "resampled text/position_embedding: [15, 32] -> [17, 32], linear" in printed
  assert "fresh decoder/queries: the source has [13, 32], the model [16, 32]" in printed
  for number, length in enumerate(LENGTHS):
    CURRICULUM.kill(number, tmp_path, cache=cache)
    assert ov_data.TextProcessor.load(tmp_path / "tokenizer").length == length
  CURRICULUM.run(tmp_path, cache=cache)
  assert not compare_metrics(undisturbed / "metrics.jsonl", tmp_path / "metrics.jsonl")
  assert CURRICULUM.metadata(tmp_path) == CURRICULUM.metadata(undisturbed)
