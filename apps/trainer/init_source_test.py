"""Tests of initial parameters from checkpoints of the released code, for all kinds of paths."""

import os
from pathlib import Path
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apps.trainer.checkpoint import CheckpointError, Checkpoints
from apps.trainer.init_from import plan_init
from apps.trainer.init_source import open_source
from ov_convert import openvision_jax, orbax_folder
from ov_convert.name_map import unflatten
import ov_models
from ov_models import DecoderConfig, VisionLanguageConfig, ViTConfig

SMALL = dict(width=32, depth=2, mlp_dim=64, num_heads=2)
CONFIG = VisionLanguageConfig(
  encoder=ViTConfig(**SMALL, patch_size=8, image_size=32),
  decoder=DecoderConfig(**SMALL, vocab_size=40, max_len=12, position="none"),
)


def make_params(config, seed):
  rng = np.random.default_rng(seed)
  fill = lambda p: rng.normal(size=p.shape).astype(p.dtype)
  return jax.tree.map(fill, ov_models.abstract_params(config))


def write_published(folder, params, step):
  """Write a checkpoint in the layout of the released code, with attention kernels split by head."""
  theirs = unflatten(openvision_jax.to_theirs(params, CONFIG, split_heads=True))
  state = {"params": theirs, "opt": {"1": {"count": np.int32(step)}}}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
    writer.save(folder / "checkpoint.npz" / str(step) / "default", args=ocp.args.PyTreeSave(state))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """Return a workdir of the released code with steps 3 and 20, and their parameters."""
  workdir = tmp_path_factory.mktemp("published")
  params = {step: make_params(CONFIG, step) for step in (3, 20)}
  for step, tree in params.items():
    write_published(workdir, tree, step)
  return workdir, params


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "below", ["", "checkpoint.npz", "checkpoint.npz/20", "checkpoint.npz/20/default"]
)
def test_all_paths_of_released_checkpoint(published, below):
  workdir, params = published
  fresh = jax.tree.map(jax.numpy.asarray, make_params(CONFIG, 0))
  plan = plan_init(open_source(workdir / below), fresh)
  report = plan.report
  assert_equal(plan.apply(fresh), params[20])
  assert len(report.taken) == len(jax.tree.leaves(fresh)) and not report.fresh
  assert report.source.endswith("checkpoint.npz/20/default")
  assert "a checkpoint of the published code" in report.text()
  assert "config.tokenizer.path must be that vocabulary" in report.text()


def test_released_repository_and_earlier_step(published, tmp_path):
  workdir, params = published
  shutil.copytree(workdir, tmp_path / "repository" / "jax_orbax_weight")
  source = open_source(tmp_path / "repository", step=3)
  fresh = jax.tree.map(jax.numpy.asarray, make_params(CONFIG, 0))
  assert_equal(plan_init(source, fresh).apply(fresh), params[3])


def test_plan_reads_no_array(published):
  workdir, _ = published
  encoder = ViTConfig(**SMALL, patch_size=16, image_size=64)
  plan = plan_init(open_source(workdir), {"encoder": ov_models.abstract_params(encoder)})
  assert plan.report.resampled == {
    "encoder/patch_embed/kernel": "[8, 8, 3, 32] -> [16, 16, 3, 32], pseudoinverse resize"
  }
  assert "decoder/head/kernel" in plan.report.unused


def test_checkpoints_of_this_code_come_first(published, tmp_path):
  workdir, _ = published
  shutil.copytree(workdir / "checkpoint.npz", tmp_path / "checkpoint.npz")
  own = {"encoder": {"cls": jax.numpy.ones(3)}}
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, {"params": own}, {"tokenizer": "a1"})
  source = open_source(tmp_path)
  assert list(source.arrays) == ["encoder/cls"] and source.tokenizer == "a1"


def test_safetensors_export(tmp_path):
  params = make_params(CONFIG, 5)
  ov_models.save(tmp_path, CONFIG, params)
  fresh = jax.tree.map(jax.numpy.asarray, make_params(CONFIG, 0))
  plan = plan_init(open_source(tmp_path), fresh)
  assert_equal(plan.apply(fresh), params)
  assert plan.report.notes == ("an export",) and not plan.report.fresh


@pytest.mark.parametrize(
  ("make", "options", "message"),
  [
    (
      lambda w, tmp: tmp / "nowhere",
      {},
      "the folder does not exist; expected the workdir of a run",
    ),
    (lambda w, tmp: tmp, {}, "no intact checkpoint"),
    (lambda w, tmp: w, {"part": "ema"}, "is a checkpoint of the published code and holds no 'ema'"),
    (lambda w, tmp: w, {"step": 7}, "has no step 7; it has 3, 20"),
  ],
)
def test_errors_are_one_line(published, tmp_path, make, options, message):
  with pytest.raises((CheckpointError, ValueError), match=message):
    open_source(make(published[0], tmp_path), **options)


def test_file_is_not_a_checkpoint(tmp_path):
  (tmp_path / "checkpoint.npz").write_bytes(b"PK")
  with pytest.raises(CheckpointError, match="is a file; expected the workdir of a run"):
    open_source(tmp_path / "checkpoint.npz")


def test_golden_checkpoint():
  golden = Path(os.environ.get("OV_GOLDEN", "")) / "openvision1_checkpoint"
  if not golden.is_dir():
    pytest.skip("$OV_GOLDEN names no folder with openvision1_checkpoint")
  expected = orbax_folder.read(golden, num_heads=2)
  fresh = jax.tree.map(jax.numpy.zeros_like, expected.params)
  plan = plan_init(open_source(golden), fresh)
  assert_equal(plan.apply(fresh), expected.params)
  assert not plan.report.fresh and not plan.report.unused


def test_the_origin_of_an_import_is_passed_on(tmp_path):
  about = {"from": "timm:vit", "license": "cc-by-nc-4.0"}
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(0, {"params": make_params(CONFIG, 0)}, {"imported": about})
  assert open_source(tmp_path).imported == about
