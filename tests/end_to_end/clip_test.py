"""OpenVision training as a user runs it: outputs, resuming, evaluation, other losses."""

import json
from pathlib import Path
import random
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apps.trainer.checkpoint import find_checkpoint
from apps.trainer.sinks import compare_metrics, read_metrics
import ov_data
import ov_eval
from tests.end_to_end import runner


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


def run(*flags, cache, expect=0):
  code, printed = runner.run(*flags, cache=cache, app=runner.CLIP_TRAIN)
  assert code == expect, printed
  return printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("trained")
  run(*runner.tiny_clip(), f"--workdir={workdir}", cache=cache)
  return workdir


def figures(path: Path):
  """Return the metrics of an evaluation as in its file."""
  return {(r["name"]): r["value"] for r in json.loads(path.read_text())["results"]}


def params_of(workdir):
  """Return the arrays of the newest checkpoint by path."""
  state = ocp.PyTreeCheckpointer().restore(find_checkpoint(workdir) / "state")
  leaves = jax.tree_util.tree_leaves_with_path(state["params"])
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def test_a_run_writes_metrics_galleries_and_the_text_processor(trained):
  lines = read_metrics(trained / "metrics.jsonl")
  names = {name for line in lines for name in line}
  assert {
    "train/clip_loss", "train/caption_nll", "train/scale", "train/image_top1", "train/text_top1",
    "train/mean_positive", "train/mean_negative", "eval/zero_shot_top1", "eval/zero_shot_top5",
    "eval/zero_shot_mean_per_class", "eval/img2txt_r1", "eval/txt2img_r1", "eval/txt2img_r10",
    "eval/img2txt_median_rank", "eval/knn_top1", "eval/probe_top1", "eval/majority_top1",
    "eval/caption_nll",
  } <= names  # fmt: skip
  page = (trained / "report.html").read_text()
  for title in (
    "Images retrieved for captions",
    "Captions retrieved for images",
    "Zero-shot mistakes",
  ):
    assert title in page
  assert "http://" not in page.replace("http://www.w3.org", "")
  found = ov_eval.read_results(trained / "evaluation.json")
  context = {r.name: r.context for r in found.results}
  assert len(context["zero_shot_top1"]["templates_hash"]) == 12
  assert context["img2txt_r1"]["preprocessing"] == "squash to 32 px"
  assert (found.step, found.examples_seen) == (30, 480)
  assert (trained / "evaluations" / "10.json").exists()
  processor = ov_data.TextProcessor.load(trained / "tokenizer")
  assert (processor.length, processor.pool, processor.padding) == (15, "last", "attend")


def test_evaluating_again_gives_identical_metrics(trained, cache, tmp_path):
  before = figures(trained / "evaluation.json")
  metrics = (trained / "metrics.jsonl").read_bytes()
  run(
    *runner.tiny_clip(),
    f"--workdir={trained}",
    "--config.eval_only=True",
    f"--config.eval.per_example={tmp_path}",
    cache=cache,
  )
  assert figures(trained / "evaluation.json") == before
  assert (trained / "metrics.jsonl").read_bytes() == metrics
  answers = [json.loads(line) for line in (tmp_path / "zero_shot.jsonl").read_text().splitlines()]
  right = sum(answer["predicted"] == answer["label"] for answer in answers)
  assert right / len(answers) == before["zero_shot_top1"]
  ranks = [
    json.loads(line) for line in (tmp_path / "retrieval_txt2img.jsonl").read_text().splitlines()
  ]
  assert np.median([line["rank"] for line in ranks]) == before["txt2img_median_rank"]


def test_another_workdir_evaluates_with_the_text_processor_of_the_params(trained, cache, tmp_path):
  run(
    *runner.tiny_clip(),
    f"--workdir={tmp_path / 'again'}",
    "--config.eval_only=True",
    "--config.eval.gallery=0",
    f"--config.init_from.path={trained}",
    cache=cache,
  )
  assert figures(tmp_path / "again" / "evaluation.json") == figures(trained / "evaluation.json")
  page = (tmp_path / "again" / "report.html").read_text()
  assert "Images retrieved for captions" not in page and "Zero-shot mistakes" not in page


def test_kill_9_changes_no_metric(trained, cache, tmp_path):
  dice = random.Random("clip")
  flags = (*runner.tiny_clip(), f"--workdir={tmp_path}")
  process = runner.start(*flags, cache=cache, app=runner.CLIP_TRAIN)
  runner.wait_for_step(tmp_path, dice.randrange(9, 20), process)
  path = tmp_path / "metrics.jsonl"
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert 0 < read_metrics(path)[-1]["step"] < 30
  run(*flags, cache=cache)
  assert not compare_metrics(trained / "metrics.jsonl", path)


@pytest.mark.parametrize("loss", ["openvision", "clip", "siglip", "coca", "cappa"])
def test_every_loss_is_finite_and_falls_over_200_steps(loss, cache, tmp_path):
  run(
    *runner.tiny_clip(loss),
    f"--workdir={tmp_path}",
    "--config.total_steps=200",
    "--config.eval.every=0",
    "--config.checkpoint.every=200",
    "--config.input.demo.train_examples=1000",
    cache=cache,
  )
  losses = [
    line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line
  ]
  assert len(losses) == 200 and np.isfinite(losses).all()
  first, last = np.mean(losses[:10]), np.mean(losses[-10:])
  print(f"{loss}: {losses[0]:.4f} at step 1, mean of the last ten {last:.4f}")
  assert last < 0.9 * first
  names = set(figures(tmp_path / "evaluation.json"))
  assert ("img2txt_r1" in names) == (loss != "cappa")
  assert ("cider" in names) == (loss in ("coca", "cappa"))
  assert "zero_shot_top1" in names and "probe_top1" in names


def test_towers_from_two_runs_with_one_frozen(trained, cache, tmp_path):
  """LiT: the image tower of one run is frozen, and the text tower of another run is trained."""
  run(
    *runner.tiny_clip("clip"),
    f"--workdir={tmp_path}",
    f"--config.init_from.path={trained}",
    "--config.init_from.include=('^encoder/', '^image_head/')",
    f"--config.init_from.more=({{'path': '{trained}', 'step': 28, 'include': ('^text/',)}},)",
    f"--config.tokenizer.path={trained}/tokenizer",
    "--config.optimizer.frozen=('^encoder/', '^image_head/')",
    "--config.total_steps=6",
    cache=cache,
  )
  source, result = params_of(trained), params_of(tmp_path)
  image = [name for name in result if name.startswith(("encoder/", "image_head/"))]
  text = [name for name in result if name.startswith("text/") and name.endswith("/kernel")]
  assert len(image) > 10 and len(text) > 5
  for name in image:
    np.testing.assert_array_equal(result[name], source[name], err_msg=name)
  for name in text:
    assert not np.array_equal(result[name], source[name]), name
  reports = sorted(path.name for path in tmp_path.glob("init_from_*.json"))
  assert reports == ["init_from_main.json", "init_from_main_1.json"]
