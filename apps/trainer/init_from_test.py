"""Tests of the initialisation from another run: copied, resampled and fresh parameters, errors."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.trainer.checkpoint import CheckpointError, Checkpoints
from apps.trainer.config import InitSettings
from apps.trainer.init_from import check_tokenizer, interpolate, plan_init, resize_patches
from apps.trainer.init_source import open_source
import ov_models
from ov_models import DecoderConfig, VisionLanguageConfig, ViTConfig

SMALL = dict(width=32, depth=2, mlp_dim=64, num_heads=2)


def model(image=32, patch=8, vocab=40, max_len=12, decoder=SMALL, encoder=SMALL):
  return VisionLanguageConfig(
    encoder=ViTConfig(**encoder, patch_size=patch, image_size=image, position="learned"),
    decoder=DecoderConfig(**decoder, vocab_size=vocab, max_len=max_len, position="learned"),
  )


def make_params(config, seed):
  rng = np.random.default_rng(seed)
  fill = lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype)
  return jax.tree.map(fill, ov_models.abstract_params(config))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Return a workdir whose newest checkpoint contains OLD, with an average twice as large."""
  workdir = tmp_path_factory.mktemp("source")
  ema = jax.tree.map(lambda p: 2 * p, OLD)
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(1, {"params": ema, "step": jnp.int32(1)}, {})
    checkpoints.save(2, {"params": OLD, "ema": ema, "step": jnp.int32(2)}, {})
  return workdir


OLD = make_params(model(), 0)
FRESH = {}


def fresh(**kwargs):
  key = json.dumps(kwargs, sort_keys=True)
  if key not in FRESH:
    FRESH[key] = make_params(model(**kwargs), 1)
  return FRESH[key]


def copy(source, params, **options):
  """Return `params` with those of the newest checkpoint of a workdir, and the report."""
  plan = plan_init(open_source(source), params, **options)
  return plan.apply(params), plan.report


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.array(x) for p, x in leaves}


def assert_equal(a, b):
  for (path, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=path)


def test_same_model_is_copied(source):
  params, report = copy(source, fresh())
  assert_equal(params, OLD)
  assert not report.resampled and not report.fresh and not report.unused
  assert len(report.taken) == len(jax.tree.leaves(OLD)) and report.source.endswith("/2")


def test_earlier_step_and_average(source):
  twice = jax.tree.map(lambda p: 2 * p, OLD)
  for earlier in (open_source(source, step=1), open_source(source, part="ema")):
    assert_equal(plan_init(earlier, fresh()).apply(fresh()), twice)


def test_position_tables_are_resampled(source):
  new = fresh(image=48, max_len=20)
  params, report = copy(source, new)
  got, old = flat(params), flat(OLD)
  assert report.resampled == {
    "decoder/position_embedding": "[12, 32] -> [20, 32], linear",
    "encoder/position_embedding": "[17, 32] -> [37, 32], bilinear",
  }
  expected = ov_models.resample_positions(OLD["encoder"]["position_embedding"], (4, 4), (6, 6))
  np.testing.assert_allclose(got["encoder/position_embedding"], expected, atol=1e-6)
  # Linear over rows whose centres are spread over the same length, ends held.
  at = np.clip((np.arange(20) + 0.5) * 12 / 20 - 0.5, 0, 11)
  table = old["decoder/position_embedding"]
  expected = np.stack([np.interp(at, np.arange(12), column) for column in table.T], axis=1)
  # The weights of a resize are differences of float32 positions up to 20.
  np.testing.assert_allclose(got["decoder/position_embedding"], expected, atol=1e-5)
  for path in report.taken:
    np.testing.assert_array_equal(got[path], old[path])


def test_mismatching_parameters_stay_fresh(source, tmp_path):
  new = fresh(vocab=50, decoder={**SMALL, "depth": 3})
  params, report = copy(source, new)
  got = flat(params)
  assert report.fresh["decoder/embed/embedding"] == "the source has [40, 32], the model [50, 32]"
  assert "decoder/head/kernel" in report.fresh
  assert report.fresh["decoder/blocks/norm1/scale"] == "the source has [2, 32], the model [3, 32]"
  assert all(path.startswith("encoder/") for path in report.taken if "blocks" in path)
  for path in report.fresh:
    np.testing.assert_array_equal(got[path], flat(new)[path])
  assert "fresh decoder/head/kernel: the source has [32, 40], the model [32, 50]" in report.text()
  report.save(tmp_path / "report.json")
  assert json.loads((tmp_path / "report.json").read_text())["fresh"] == report.fresh


def test_parameters_of_one_model_only(source):
  new = {"encoder": fresh()["encoder"], "probe": {"kernel": jnp.ones(3)}}
  report = plan_init(open_source(source), new).report
  assert report.fresh == {"probe/kernel": "not in the source"}
  assert "decoder/head/kernel" in report.unused and len(report.unused) > 10


def test_include_and_exclude(source):
  params, report = copy(source, fresh(), include=["^encoder/"], exclude=["cls$"])
  assert report.fresh["encoder/cls"] == "excluded"
  assert report.fresh["decoder/head/kernel"] == "not included"
  assert all(path.startswith("encoder/") for path in report.taken)
  np.testing.assert_array_equal(params["encoder"]["cls"], fresh()["encoder"]["cls"])


def test_patch_kernels_are_resized(source):
  params, report = copy(source, fresh(image=64, patch=16))
  kernel = OLD["encoder"]["patch_embed"]["kernel"]
  assert report.resampled == {
    "encoder/patch_embed/kernel": "[8, 8, 3, 32] -> [16, 16, 3, 32], pseudoinverse resize"
  }
  np.testing.assert_allclose(
    params["encoder"]["patch_embed"]["kernel"],
    resize_patches(kernel, 16, "pseudoinverse"),
    rtol=1e-5,
    atol=1e-6,
  )


def tokens(patches, kernel):
  return jnp.einsum("BPQC,PQCD->BD", patches, kernel, precision="highest")


def test_pseudoinverse_keeps_tokens_of_enlarged_patches():
  kernel = OLD["encoder"]["patch_embed"]["kernel"]
  patches = jax.random.normal(jax.random.key(2), (10, 8, 8, 3))
  enlarged = jax.image.resize(patches, (10, 12, 12, 3), "bilinear")
  same = tokens(enlarged, resize_patches(kernel, 12, "pseudoinverse"))
  # The pseudo-inverse of a float32 resize matrix.
  np.testing.assert_allclose(same, tokens(patches, kernel), rtol=1e-4, atol=1e-4)


def test_patch_resize_methods():
  kernel = OLD["encoder"]["patch_embed"]["kernel"]
  smooth = jax.image.resize(
    jax.random.normal(jax.random.key(3), (50, 3, 3, 3)), (50, 8, 8, 3), "bilinear"
  )
  small = jax.image.resize(smooth, (50, 4, 4, 3), "bilinear")

  def error(method, factor=1.0):
    got = factor * tokens(small, resize_patches(kernel, 4, method))
    return float(jnp.abs(got - tokens(smooth, kernel)).mean())

  assert error("pseudoinverse") < 0.5 * error("bilinear")
  bilinear = resize_patches(kernel, 4, "bilinear")
  np.testing.assert_array_equal(bilinear, jax.image.resize(kernel, (4, 4, 3, 32), "bilinear"))


@pytest.mark.parametrize(
  "kwargs,message",
  [
    (dict(include=["^encdoer/"]), "include='.encdoer/' matches no parameter; examples of paths:"),
    (dict(exclude=["nothing"]), "exclude='nothing' matches no parameter"),
  ],
)
def test_error_messages(source, kwargs, message):
  with pytest.raises(ValueError, match=message):
    plan_init(open_source(source), fresh(), **kwargs)


def test_a_checkpoint_without_average_has_no_ema(source):
  with pytest.raises(ValueError, match="holds no 'ema'; it holds params, step"):
    open_source(source, step=1, part="ema")


def test_no_matching_parameters(source, tmp_path):
  with pytest.raises(ValueError, match="nothing in .* fits the model: it holds decoder/"):
    plan_init(open_source(source), {"image": {"kernel": jnp.ones(3)}})
  with pytest.raises(CheckpointError, match="no intact checkpoint"):
    open_source(tmp_path)


def test_token_rows_require_same_tokenizer(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, {"params": OLD, "step": jnp.int32(1)}, {"tokenizer": "a1b2"})
  everything = plan_init(open_source(tmp_path), fresh()).report
  check_tokenizer(everything, "a1b2")
  with pytest.raises(ValueError, match="decoder/embed/embedding.*another tokenizer .a1b2.*c3d4"):
    check_tokenizer(everything, "c3d4")
  tower = plan_init(open_source(tmp_path), fresh(), include=("^encoder/",)).report
  check_tokenizer(tower, "c3d4")
  rest = plan_init(
    open_source(tmp_path), fresh(), exclude=("embed/embedding$|decoder/head/kernel$",)
  ).report
  check_tokenizer(rest, "c3d4")


def test_interpolation_with_the_initial_parameters(source):
  initial = [InitSettings("config.init_from.path", str(source), None, "params", {})]
  tuned = make_params(model(), 1)
  mix = lambda alpha: interpolate(initial, tuned, alpha)
  chex.assert_trees_all_equal(mix(1.0), tuned)
  chex.assert_trees_all_equal(mix(0.0), OLD)
  expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, tuned, OLD)
  # One float32 rounding of each product and sum.
  chex.assert_trees_all_close(mix(0.25), expected, rtol=1e-6, atol=1e-7)
  with pytest.raises(ValueError, match="wise_ft=0.5 needs the initial parameters"):
    interpolate([], tuned, 0.5)


def test_interpolation_keeps_what_the_source_lacks_and_resamples(source):
  initial = [InitSettings("config.init_from.path", str(source), None, "params", {})]
  tuned = make_params(model(image=48, vocab=50), 1)
  mixed, plain = interpolate(initial, tuned, 0.0), tuned
  start, _ = copy(source, tuned)
  chex.assert_trees_all_equal(mixed, start)
  chex.assert_trees_all_equal(mixed["decoder"]["head"], plain["decoder"]["head"])


def test_adapters_of_a_source_are_merged(tmp_path):
  lora = ov_models.LoraConfig(rank=2, alpha=6.0)
  adapted = jax.tree.map(lambda p: p + 0.1, ov_models.add_adapters(lora, OLD, jax.random.key(0)))
  metadata = {"config": {"lora": {"rank": 2, "alpha": 6.0}}}
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, {"params": adapted}, metadata)
  new = ov_models.add_adapters(lora, fresh(), jax.random.key(1))
  found, report = copy(tmp_path, new)
  # Compiled and eager matmuls differ by float32 rounding.
  merged = ov_models.merge_adapters(lora, adapted)
  chex.assert_trees_all_close({name: found[name] for name in OLD}, merged, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(found["lora"], new["lora"])
  assert report.notes == ("its adapters are merged",) and not report.unused
  assert "unchanged: 24 arrays of adapters" in report.text()


def test_positions_are_resampled_as_the_model_does(source):
  new = fresh(image=64)
  found, report = copy(source, new, position_resize="bicubic")
  expected = ov_models.resample_positions(
    OLD["encoder"]["position_embedding"], (4, 4), (8, 8), 1, "bicubic"
  )
  np.testing.assert_allclose(found["encoder"]["position_embedding"], expected, rtol=1e-6, atol=1e-6)
  assert report.resampled["encoder/position_embedding"].endswith("bicubic")
