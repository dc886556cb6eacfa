"""A run with a curriculum of three stages, killed in every stage, gives unchanged metrics.

The stages differ in resolution, patch size, caption length, decoder, batch size and learning rate.
"""

import json

import pytest

from apps.trainer.sinks import compare_metrics
from tests.end_to_end import runner
from tests.end_to_end.curricula import STEPS, Curriculum

_DEEPER = "{'width': 32, 'depth': 2, 'mlp_dim': 64, 'num_heads': 2}"
CURRICULUM = Curriculum(
  runner.CAPTION_TRAIN,
  ("small", "large", "fine"),
  (
    *runner.TINY,
    "--config.eval.caption_examples=0",
    "--config.stages=({'name': 'small'},"
    " {'name': 'large', 'model.image_size': 48, 'optimizer.learning_rate': 1e-3},"
    " {'name': 'fine', 'model.image_size': 48, 'model.encoder': 'mu/8', 'model.token_len': 18,"
    f" 'model.decoder_options': {_DEEPER}, 'batch_size': 8,"
    " 'optimizer.learning_rate': 5e-4, 'optimizer.schedule.warmup_steps': 0})",
  ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("undisturbed")
  printed = CURRICULUM.run(workdir, cache=cache)
  assert "resampled encoder/patch_embed/kernel: [16, 16, 3, 32] -> [8, 8, 3, 32]" in printed
  return workdir


def test_the_report_of_each_stage_lists_transferred_params(undisturbed):
  large = json.loads((undisturbed / "init_from_large.json").read_text())
  assert large["source"].endswith(f"/{STEPS}")
  assert not large["fresh"] and not large["unused"]
  fine = json.loads((undisturbed / "init_from_fine.json").read_text())
  assert fine["source"].endswith(f"/{2 * STEPS}")
  assert fine["resampled"] == {
    "encoder/patch_embed/kernel": "[16, 16, 3, 32] -> [8, 8, 3, 32], pseudoinverse resize",
    "decoder/position_embedding": "[13, 32] -> [17, 32], linear",
  }
  assert fine["fresh"] and all(path.startswith("decoder/blocks") for path in fine["fresh"])
  assert {"encoder/norm/scale", "decoder/head/kernel"} <= set(fine["taken"])


def test_kill_9_in_every_stage_changes_no_metric(undisturbed, tmp_path, cache):
  killed = [CURRICULUM.kill(number, tmp_path, cache=cache) for number in range(3)]
  printed = CURRICULUM.run(tmp_path, cache=cache)
  print(f"killed after the checkpoints of steps {killed}")
  assert f"fine: restoring step {killed[-1]}" in printed
  assert not compare_metrics(undisturbed / "metrics.jsonl", tmp_path / "metrics.jsonl")
  assert CURRICULUM.metadata(tmp_path) == CURRICULUM.metadata(undisturbed)
