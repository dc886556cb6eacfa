"""A compile cache that was filled without training is used on another machine."""

from pathlib import Path
import re

from apps.trainer.sinks import compare_metrics
from tests.end_to_end import runner

STAGES = "({'name': 'small'}, {'name': 'large', 'model.image_size': 48})"
SHORT = (
  "--config.total_steps=2",
  "--config.optimizer.schedule.warmup_steps=0",
  "--config.eval.every=0",
  "--config.eval.caption_examples=0",
)


def start(folder: Path, name: str, app: Path, *flags: str) -> str:
  """Start on a new machine with a new workdir, and return the output."""
  flags = (*flags, *SHORT, f"--workdir={folder / name}")
  code, printed = runner.run(*flags, cache=folder / "home" / name, app=app)
  assert code == 0, printed
  return printed


def train_step(printed: str, stage: str) -> str:
  """Return the logged origin of a stage's train step, and check that it is logged once."""
  (line,) = re.findall(rf"{stage}: train step (.*)", printed)
  return line


def compile_then_train(folder: Path, stages: list[str], app: Path, *flags: str) -> None:
  """Compile into the cache on one machine, and train from the cache on another."""
  flags = (*flags, f"--config.compile_store={folder}/store")
  printed = start(folder, "ahead", app, *flags, "--compile")
  print(printed)
  keys = []
  for stage in stages:
    line = train_step(printed, stage)
    keys += re.findall(r"^compiled in .*, cached in .* as (jit_update-\w{8}) ", line)
    # Table columns: seconds, key, size, peak memory.
    assert re.search(rf"{stage} .* compiled .* {keys[-1]} .* MB .* MiB", printed)
  assert f"{len(stages)} programs saved" in printed
  assert not (folder / "ahead" / "metrics.jsonl").exists()

  printed = start(folder, "trained", app, *flags)
  print(printed)
  assert f"{len(stages)} of {len(stages)} programs copied" in printed
  for stage, key in zip(stages, keys, strict=True):
    line = train_step(printed, stage)
    assert re.fullmatch(rf"loaded from the compile cache in .*: {key} .*", line)


def test_captioner_of_two_stages(tmp_path):
  flags = (*runner.TINY, f"--config.stages={STAGES}")
  compile_then_train(tmp_path, ["small", "large"], runner.CAPTION_TRAIN, *flags)
  printed = start(tmp_path, "alone", runner.CAPTION_TRAIN, *flags)
  assert train_step(printed, "small").startswith("compiled in ")
  assert train_step(printed, "large").startswith("compiled in ")
  # The program is bitwise the same on both machines.
  trained, alone = (tmp_path / name / "metrics.jsonl" for name in ("trained", "alone"))
  assert not compare_metrics(trained, alone)


def test_two_towers(tmp_path):
  compile_then_train(tmp_path, ["main"], runner.CLIP_TRAIN, *runner.tiny_clip())
