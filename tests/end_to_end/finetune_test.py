"""Fine-tuning of a run with finetune.py as a user does: every mode, resume, and export."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apps.exporter.source import load_source
from apps.trainer.checkpoint import find_checkpoint
from apps.trainer.sinks import compare_metrics
import ov_models
from tests.end_to_end import runner

FINETUNE = runner.CLIP_DEMO.with_name("finetune.py")
LORA = "mode=lora,rank=2,alpha=6"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache):
  """Return the workdir of a run with two blocks in the image tower."""
  workdir = tmp_path_factory.mktemp("start") / "w"
  code, printed = runner.run(
    *runner.tiny_clip("clip"),
    f"--workdir={workdir}",
    "--config.model.encoder_options={'depth': 2}",
    "--config.total_steps=8",
    "--config.eval.every=0",
    "--config.eval.gallery=0",
    "--config.input.demo.probe_examples=0",
    cache=cache,
    app=runner.CLIP_TRAIN,
  )
  assert code == 0, printed
  return workdir


def tune(start, workdir, arguments, cache, *more):
  """Fine-tune for 6 steps on the demo data of the first run."""
  data = start / "data"
  code, printed = runner.run(
    f"--config={FINETUNE}:init={start},batch_size=16,steps=6,lr=0.01,{arguments}",
    f"--workdir={workdir}",
    f"--config.input.data_dir={data}",
    "--config.input.split=train",
    f"--config.input.eval_data_dir={data}",
    "--config.input.eval_split=heldout",
    f"--config.eval.zero_shot.dir={data}/labelled",
    "--config.eval.zero_shot.split=heldout",
    f"--config.eval.zero_shot.classes={data}/classes.json",
    "--config.eval.batch_size=16",
    "--config.eval.gallery=0",
    "--config.log_every=1",
    "--config.checkpoint.every=3",
    "--config.tensorboard=False",
    *more,
    cache=cache,
    app=runner.CLIP_TRAIN,
  )
  assert code == 0, printed
  return printed


def state_of(workdir, part="params"):
  """Return the arrays of the newest checkpoint by path."""
  state = ocp.PyTreeCheckpointer().restore(find_checkpoint(workdir) / "state")[part]
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def metrics(file):
  return {r["name"]: r["value"] for r in json.loads(file.read_text())["results"]}


@pytest.fixture(scope="module")
def lora(start, cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("lora") / "w"
  tune(start, workdir, LORA, cache)
  return workdir


def test_only_adapters_are_trained_and_the_initial_model_is_evaluated(start, lora):
  before, after = state_of(start), state_of(lora)
  assert all(after[path].tobytes() == array.tobytes() for path, array in before.items())
  adapters = [path for path in after if path.startswith("lora/")]
  assert set(after) == {*before, *adapters}
  assert all(after[path].any() for path in adapters)
  assert metrics(lora / "evaluations" / "0.json") == metrics(start / "evaluations" / "8.json")


def test_an_export_merges_the_adapters(lora):
  release, arrays = load_source(lora).release, state_of(lora)
  ov_models.bind(release.config, release.params)  # a model without adapters
  for tower in ("encoder", "text"):
    path = f"{tower}/blocks/mlp/up/kernel"
    low = [arrays[f"lora/{path}/{name}"] for name in "ab"]
    expected = arrays[path] + 6 / 2 * np.einsum("lir,lro->lio", *low)
    got = release.params[tower]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # float32 sums of two products


def test_a_resumed_run_with_adapters_has_the_same_bits(start, lora, cache, tmp_path):
  workdir = tmp_path / "w"
  shutil.copytree(lora, workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  assert find_checkpoint(workdir).name == "3"
  tune(start, workdir, LORA, cache)
  for part in ("params", "opt"):
    expected, found = state_of(lora, part), state_of(workdir, part)
    assert expected.keys() == found.keys()
    assert all(found[path].tobytes() == array.tobytes() for path, array in expected.items())
  assert not compare_metrics(lora / "metrics.jsonl", workdir / "metrics.jsonl")


def test_weights_between_the_initial_and_the_trained_ones(start, lora, cache, tmp_path):
  base, tuned = load_source(start).release.params, load_source(lora).release.params
  exported = lambda alpha: load_source(lora, wise_ft=alpha).release.params
  jax.tree.map(np.testing.assert_array_equal, exported(0.0), base)
  jax.tree.map(np.testing.assert_array_equal, exported(1.0), tuned)
  middle = jax.tree.map(lambda new, old: (new + old) / 2, tuned, base)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported(0.5), middle)
  workdir = tmp_path / "w"
  shutil.copytree(lora, workdir)
  tune(start, workdir, LORA, cache, "--config.eval_only=True", "--config.eval.wise_ft=0")
  assert metrics(workdir / "evaluation.json") == metrics(lora / "evaluations" / "0.json")


@pytest.mark.parametrize(
  ("arguments", "frozen", "trained"),
  [
    ("mode=lit", ("encoder/", "image_head/"), "text/embed/embedding"),
    (
      "last_blocks=1,layer_decay=0.5",
      ("encoder/patch_embed/", "encoder/cls"),
      "encoder/norm/scale",
    ),
  ],
)
def test_frozen_parameters_keep_their_bits(start, cache, tmp_path, arguments, frozen, trained):
  tune(start, tmp_path / "w", arguments, cache)
  before, after = state_of(start), state_of(tmp_path / "w")
  kept = [path for path in before if path.startswith(frozen)]
  assert kept and all(after[path].tobytes() == before[path].tobytes() for path in kept)
  assert (after[trained] != before[trained]).any()
  if arguments.startswith("last_blocks"):
    for path in (path for path in before if path.startswith("encoder/blocks")):
      assert after[path][:1].tobytes() == before[path][:1].tobytes(), path
      assert (after[path][1:] != before[path][1:]).any(), path


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("init=/nowhere", "init=/nowhere: no intact checkpoint"),
    ("init=/nowhere,mode=half", "mode='half': expected one of full, lit, lora"),
  ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, cache, tmp_path):
  code, printed = runner.run(
    f"--config={FINETUNE}:{arguments}",
    f"--workdir={tmp_path}/w",
    cache=cache,
    app=runner.CLIP_TRAIN,
  )
  runner.expect_one_line(printed, code, message)
