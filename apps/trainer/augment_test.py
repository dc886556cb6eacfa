"""Tests of the device augmentation against a per-pixel reference with `colorsys`."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.trainer import augment
from apps.trainer.augment import AugmentConfig

S = 6
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (32, S, S, 3), np.uint8)
IMAGES[0] = 0
IMAGES[1] = 255
IMAGES[2] = 77  # grey: hue is undefined
IMAGES[3, ..., 1] = IMAGES[3, ..., 0]  # two channels equal: on the border of two hue sectors
INDEX = np.arange(32)


def naive_brightness(x, f):
  return x * f


def naive_contrast(x, f):
  mean = x.mean(axis=(0, 1))
  return (x - mean) * f + mean


def naive_hsv(x, f, d):
  def pixel(rgb):
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    return colorsys.hsv_to_rgb((h + d) % 1.0, min(s * f, 1.0), v)

  return np.array([[pixel(p) for p in row] for row in x])


def draws(index, config, seed):
  """Return the random draws of one example from the documented keys."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0xFFFF_FFFF), index)
  factors, order, apply = jax.random.split(key, 3)
  width = np.array([config.brightness, config.contrast, config.saturation, config.hue])
  factors = np.array(jax.random.uniform(factors, (4,), minval=-1.0)) * width
  order = np.argsort(np.array(jax.random.uniform(order, (4,))))
  use = np.array(jax.random.uniform(apply, (2,)))
  return (
    factors,
    order,
    use[0] < config.jitter_probability,
    use[1] < config.gray_probability,
  )


def naive_jitter(image, index, config, seed):
  (b, c, s, h), order, jittered, gray = draws(index, config, seed)
  operations = [
    lambda x: naive_brightness(x, 1 + b),
    lambda x: naive_contrast(x, 1 + c),
    lambda x: naive_hsv(x, 1 + s, 0.0),
    lambda x: naive_hsv(x, 1.0, h),
  ]
  x = image / 255.0
  if jittered:
    for i in order:
      x = np.clip(operations[i](x), 0, 1)
  if gray:
    x = np.repeat((x * np.array(augment.LUMA)).sum(-1, keepdims=True), 3, axis=-1)
  return x


def test_jitter_matches_reference():
  config = AugmentConfig()
  ours = jax.jit(lambda x, i: augment.jitter(x / 255.0, i, config, 7))(IMAGES, INDEX)
  expected = [naive_jitter(image, i, config, 7) for i, image in enumerate(IMAGES)]
  # Float32 against float64; a turn of hue has slope 6 in a unit range.
  np.testing.assert_allclose(ours, expected, atol=5e-6)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_operation_alone(name):
  off = dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, gray_probability=0.0)
  config = AugmentConfig(jitter_probability=1.0, **{**off, name: 0.3})
  ours = np.array(augment.jitter(IMAGES / np.float32(255), INDEX, config, 1))
  expected = [naive_jitter(image, i, config, 1) for i, image in enumerate(IMAGES)]
  np.testing.assert_allclose(ours, expected, atol=5e-6)
  assert np.abs(ours - IMAGES / 255.0).mean() > 0.01


def test_fraction_of_jittered_and_gray_examples():
  many = np.repeat(IMAGES[4:5], 4000, axis=0)
  x = np.array(
    jax.jit(lambda x, i: augment.jitter(x / 255.0, i, AugmentConfig(), 0))(many, np.arange(4000))
  )
  gray = np.ptp(x, axis=-1).max(axis=(1, 2)) == 0
  untouched = np.abs(x - many[:1] / 255.0).max(axis=(1, 2, 3)) < 1e-6
  # Standard deviations: sqrt(.2 * .8 / 4000) = 0.0063, so 4 of them.
  assert abs(gray.mean() - 0.2) < 0.025
  assert abs(untouched.mean() - 0.2 * 0.8) < 0.025


def test_draws_depend_on_seed_and_index_only():
  preprocess = jax.jit(augment.make_preprocess(AugmentConfig(), 3))
  whole = np.array(preprocess({"image": IMAGES, "index": INDEX})["image"])
  order = RNG.permutation(32)
  shuffled = preprocess({"image": IMAGES[order], "index": INDEX[order]})["image"]
  np.testing.assert_array_equal(shuffled, whole[order])
  alone = preprocess({"image": IMAGES[9:10], "index": INDEX[9:10]})["image"]
  np.testing.assert_allclose(alone, whole[9:10], atol=1e-5)
  later = preprocess({"image": IMAGES, "index": INDEX + 32})["image"]
  assert np.abs(later - whole).max(axis=(1, 2, 3)).astype(bool).mean() > 0.5
  other = jax.jit(augment.make_preprocess(AugmentConfig(), 4))
  assert np.abs(other({"image": IMAGES, "index": INDEX})["image"] - whole).max() > 0.1


def test_normalise_matches_released_code():
  mean, std = np.array(augment.MEAN), np.array(augment.STD)
  expected = (IMAGES.astype(np.float64) - 255 * mean) / (255 * std)
  np.testing.assert_allclose(augment.normalise(jnp.array(IMAGES)), expected, atol=2e-6)


def test_preprocess_without_randomness_only_normalises():
  config = AugmentConfig(jitter_probability=0, gray_probability=0)
  batch = {"image": jnp.array(IMAGES), "ids": np.arange(5)}  # no index needed
  out = augment.make_preprocess(config, 0)(batch)
  np.testing.assert_array_equal(out["image"], augment.normalise(batch["image"]))
  assert out["ids"] is batch["ids"]


def test_error_messages():
  with pytest.raises(ValueError, match="uint8"):
    augment.normalise(jnp.zeros((2, 4, 4, 3)))
  with pytest.raises(ValueError, match="jitter_probability=1.5"):
    AugmentConfig(jitter_probability=1.5)
  with pytest.raises(ValueError, match="hue=0.6"):
    AugmentConfig(hue=0.6)
