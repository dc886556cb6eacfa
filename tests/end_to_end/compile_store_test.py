"""A store of compiled programs, filled without training, spares another home the compiler."""

import re

import pytest

from apps.trainer.sinks import compare_metrics
from tests.end_to_end import runner

STAGES = "({'name': 'small'}, {'name': 'large', 'model.image_size': 48})"
SHORT = (
  "--config.total_steps=2",
  "--config.optimizer.schedule.warmup_steps=0",
  "--config.eval.every=0",
  "--config.eval.caption_examples=0",
)
FLAGS = {
  "caption_train": (*runner.TINY, *SHORT, f"--config.stages={STAGES}"),
  "clip_train": (*runner.tiny_clip(), *SHORT),
}
APPS = {"caption_train": runner.CAPTION_TRAIN, "clip_train": runner.CLIP_TRAIN}


def lines(printed: str, stage: str) -> str:
  """What became of the train step of a stage, the same in every program of a start."""
  (line,) = re.findall(rf"{stage}: train step (.*)", printed)
  return line


@pytest.mark.parametrize(
  "app, stages", [("caption_train", ["small", "large"]), ("clip_train", ["main"])]
)
def test_compile_fills_a_store_for_another_home(tmp_path, app, stages):
  flags, store = FLAGS[app], f"--config.compile_store={tmp_path}/store"

  def start(name: str, *more: str) -> str:
    code, printed = runner.run(
      *flags, *more, f"--workdir={tmp_path / name}", cache=tmp_path / "home" / name, app=APPS[app]
    )
    assert code == 0, printed
    return printed

  printed = start("ahead", store, "--compile")
  print(printed)
  for stage in stages:
    assert re.search(rf"{stage} .*compiled .*jit_update-\w{{8}} .* MB .* MiB", printed), printed
    assert lines(printed, stage).startswith("compiled in ")
  assert f"{len(stages)} programs kept" in printed
  assert not (tmp_path / "ahead" / "metrics.jsonl").exists()
  keys = re.findall(r"kept in .* as (jit_update-\w+)", printed)

  printed = start("trained", store)
  print(printed)
  assert f"{len(stages)} of {len(stages)} programs fetched" in printed
  for stage, key in zip(stages, keys, strict=True):
    assert re.fullmatch(rf"loaded from the compile cache in .*: {key} .*", lines(printed, stage))

  printed = start("alone")
  for stage in stages:
    assert lines(printed, stage).startswith("compiled in ")
  assert not compare_metrics(
    tmp_path / "trained" / "metrics.jsonl", tmp_path / "alone" / "metrics.jsonl"
  )
