"""Parameters of one run in the model of another: what is taken, resampled, left fresh, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.trainer.checkpoint import CheckpointError, Checkpoints
from apps.trainer.init_from import check_tokenizer, init_from, resize_patches
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
  """A workdir whose newest checkpoint holds OLD, with an average that is twice as large."""
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


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.array(x) for p, x in leaves}


def assert_equal(a, b):
  for (path, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=path)


def test_the_same_model_is_taken_whole(source):
  params, report = init_from(source, fresh())
  assert_equal(params, OLD)
  assert not report.resampled and not report.fresh and not report.unused
  assert len(report.taken) == len(jax.tree.leaves(OLD)) and report.source.endswith("/2")


def test_an_earlier_step_and_the_average_can_be_taken(source):
  twice = jax.tree.map(lambda p: 2 * p, OLD)
  assert_equal(init_from(source, fresh(), step=1)[0], twice)
  assert_equal(init_from(source, fresh(), part="ema")[0], twice)


def test_another_resolution_and_text_length_resample_the_positions(source):
  new = fresh(image=48, max_len=20)
  params, report = init_from(source, new)
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


def test_other_vocabulary_depth_and_width_stay_fresh_and_are_told(source, tmp_path):
  new = fresh(vocab=50, decoder={**SMALL, "depth": 3})
  params, report = init_from(source, new)
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


def test_what_only_one_side_has(source):
  new = {"encoder": fresh()["encoder"], "probe": {"kernel": jnp.ones(3)}}
  _, report = init_from(source, new)
  assert report.fresh == {"probe/kernel": "not in the source"}
  assert "decoder/head/kernel" in report.unused and len(report.unused) > 10


def test_include_and_exclude(source):
  params, report = init_from(source, fresh(), include=["^encoder/"], exclude=["cls$"])
  assert report.fresh["encoder/cls"] == "excluded"
  assert report.fresh["decoder/head/kernel"] == "not included"
  assert all(path.startswith("encoder/") for path in report.taken)
  np.testing.assert_array_equal(params["encoder"]["cls"], fresh()["encoder"]["cls"])


def test_patches_of_another_size_are_resized(source):
  params, report = init_from(source, fresh(image=64, patch=16))
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


def test_pseudoinverse_of_smaller_patches_is_closest_and_bilinear_is_the_predecessors():
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
    (dict(include=["^encdoer/"]), "include='.encdoer/' matches no parameter; paths are such as"),
    (dict(exclude=["nothing"]), "exclude='nothing' matches no parameter"),
    (dict(step=1, part="ema"), "holds no 'ema'; it holds params, step"),
  ],
)
def test_errors_name_value_and_remedy(source, kwargs, message):
  with pytest.raises(ValueError, match=message):
    init_from(source, fresh(), **kwargs)


def test_nothing_that_fits_is_an_error(source, tmp_path):
  with pytest.raises(ValueError, match="nothing in .* fits the model: it holds decoder/"):
    init_from(source, {"image": {"kernel": jnp.ones(3)}})
  with pytest.raises(CheckpointError, match="no intact checkpoint"):
    init_from(tmp_path, fresh())


def test_rows_of_tokens_come_only_from_a_run_with_the_same_tokenizer(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, {"params": OLD, "step": jnp.int32(1)}, {"tokenizer": "a1b2"})
  _, everything = init_from(tmp_path, fresh())
  check_tokenizer(everything, "a1b2")
  with pytest.raises(ValueError, match="decoder/embed/embedding.*another tokenizer .a1b2.*c3d4"):
    check_tokenizer(everything, "c3d4")
  _, tower = init_from(tmp_path, fresh(), include=("^encoder/",))
  check_tokenizer(tower, "c3d4")
  _, rest = init_from(tmp_path, fresh(), exclude=("embed/embedding$|decoder/head/kernel$",))
  check_tokenizer(rest, "c3d4")
