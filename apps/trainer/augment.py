"""Normalisation, colour jitter and grayscale on the device, as part of the jitted step.

  preprocess = make_preprocess(AugmentConfig(), seed)     # batch -> batch, for make_train_step
  images = Normalization()(batch["image"])                # evaluation: no randomness

The jitter is that of SimCLR v2 (Chen et al. 2020, https://arxiv.org/abs/2006.10029) with the
strengths of the released OpenVision code: with probability 0.8 apply brightness, contrast,
saturation and hue in a random order and clip to [0, 1] after each; then convert to grayscale with
probability 0.2. For x in [0, 1]:

  brightness  x * f                           f ~ U(1 - 0.32, 1 + 0.32)
  contrast    (x - mean) * f + mean           mean over the pixels of each channel
  saturation  S * f, clipped, in HSV
  hue         H + d, in HSV                   d ~ U(-0.08, 0.08) turns
  grayscale   0.2989 R + 0.5870 G + 0.1140 B in all three channels

All random draws of an example use the key fold_in(key(seed), index). They depend only on the seed
and the position of the example in the run, not on the batch, the devices or the hosts.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

MEAN = (0.485, 0.456, 0.406)  # of each channel, in [0, 1]
STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.5870, 0.1140)


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Normalization of images, (x / 255 - mean) / std.

  Attributes:
    mean, std: values of the three channels, for pixels in [0, 1].
  """

  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD

  def __call__(self, images: jax.Array) -> jax.Array:
    """Return normalized float32 for uint8 [B, H, W, 3]."""
    return self.scale(unit_range(images))

  def scale(self, x: jax.Array) -> jax.Array:
    """Return normalized float32 for float32 [..., 3] in [0, 1]."""
    return (x - jnp.array(self.mean, jnp.float32)) / jnp.array(self.std, jnp.float32)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Configuration of the image augmentation on the device.

  Attributes:
    jitter_probability: fraction of examples with colour jitter; 0 disables it.
    brightness, contrast, saturation: half-widths of the ranges of the factors around 1.
    hue: half-width of the range of hue shifts, in turns.
    gray_probability: fraction of examples converted to grayscale; 0 disables it.
    normalization: applied to the augmented images.
  """

  jitter_probability: float = 0.8
  brightness: float = 0.32
  contrast: float = 0.32
  saturation: float = 0.32
  hue: float = 0.08
  gray_probability: float = 0.2
  normalization: Normalization = Normalization()

  def __post_init__(self) -> None:
    for name in ("jitter_probability", "gray_probability", "brightness", "contrast", "saturation"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"augment {name}={getattr(self, name)} must be in [0, 1].")
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f"augment hue={self.hue} must be in [0, 0.5] turns.")


def make_preprocess(
  config: AugmentConfig, seed: int
) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
  """Return a function that augments and normalises the images of a batch.

  It maps `image` uint8 [B, H, W, 3] to float32. `index` [B] (any integer dtype) is the position of
  each example in the run; it must keep increasing across epochs, or each epoch repeats the same
  draws.
  """

  def preprocess(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    x = unit_range(batch["image"])
    if config.jitter_probability or config.gray_probability:
      x = jitter(x, batch["index"], config, seed)
    return {**batch, "image": config.normalization.scale(x)}

  return preprocess


def normalise(images: jax.Array) -> jax.Array:
  """Return (x / 255 - MEAN) / STD as float32 for uint8 [B, H, W, 3]."""
  return Normalization()(images)


def unit_range(images: jax.Array) -> jax.Array:
  """Convert uint8 [..., 3] to float32 in [0, 1].

  Raises:
    ValueError: the dtype is not uint8, so the values may already be scaled.
  """
  if images.dtype != jnp.uint8 or images.shape[-1] != 3:
    raise ValueError(
      f"expected uint8 images [..., 3], got {images.dtype} {images.shape}; the loader delivers "
      "uint8, and normalisation belongs on the device."
    )
  return images.astype(jnp.float32) / 255.0


def jitter(x: jax.Array, index: jax.Array, config: AugmentConfig, seed: int) -> jax.Array:
  """Apply colour jitter and grayscale to float32 [B, H, W, 3] in [0, 1], keyed by index [B]."""
  # A separate stream, so that no draw repeats a step key of the same seed.
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0xFFFF_FFFF)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index.astype(jnp.uint32))
  return jax.vmap(lambda image, key: _jitter_one(image, key, config))(x, keys)


def _jitter_one(x: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
  """Apply colour jitter and grayscale to one example, float32 [H, W, 3] in [0, 1]."""
  factor_key, order_key, apply_key = jax.random.split(key, 3)
  width = jnp.array([config.brightness, config.contrast, config.saturation, config.hue])
  brightness, contrast, saturation, hue = jax.random.uniform(factor_key, (4,), minval=-1.0) * width
  order = jnp.argsort(jax.random.uniform(order_key, (4,)))
  use_jitter, use_gray = jax.random.uniform(apply_key, (2,)) < jnp.array(
    [config.jitter_probability, config.gray_probability]
  )

  def slot(y: jax.Array, operation: jax.Array) -> tuple[jax.Array, None]:
    # One of the four operations is active; the others get their identity factor.
    acts = operation == jnp.arange(4)
    mean = jnp.where(acts[1], y.mean(axis=(1, 2), keepdims=True), 0.0)  # brightness: around 0
    factor = 1.0 + acts[0] * brightness + acts[1] * contrast
    y = jnp.clip((y - mean) * factor + mean, 0.0, 1.0)
    turned = _adjust_hsv(y, 1.0 + acts[2] * saturation, acts[3] * hue)
    return jnp.where(acts[2] | acts[3], turned, y), None

  x = jnp.moveaxis(x, -1, 0)  # channel planes [3, H, W] vectorise better
  y, _ = jax.lax.scan(slot, x, order)
  x = jnp.where(use_jitter, y, x)
  luma = sum(weight * plane for weight, plane in zip(LUMA, x, strict=True))
  return jnp.moveaxis(jnp.where(use_gray, luma, x), 0, -1)


def _adjust_hsv(x: jax.Array, saturation: jax.Array, hue: jax.Array) -> jax.Array:
  """Scale S and rotate H of RGB planes [3, H, W] in [0, 1] without converting to HSV.

  The conversion from HSV to RGB gives each channel as V - V * S * ramp(k), where
  ramp(k) = clip(min(k, 4 - k), 0, 1), k = (n + 6 H) mod 6 and n = 5, 3, 1 for R, G, B. The chroma
  max - min equals V * S.
  """
  r, g, b = x
  v = jnp.maximum(jnp.maximum(r, g), b)
  chroma = v - jnp.minimum(jnp.minimum(r, g), b)
  safe = jnp.where(chroma > 0, chroma, 1.0)
  # Compare pairs of channels, not v: the compiler may round v and r apart, so that v == r fails.
  green_or_blue = jnp.where(g >= b, 2 + (b - r) / safe, 4 + (r - g) / safe)
  h6 = jnp.where((r >= g) & (r >= b), (g - b) / safe, green_or_blue) + 6.0 * hue
  chroma = jnp.minimum(chroma * saturation, v)  # S is clipped to 1

  def channel(n: float) -> jax.Array:
    k = n + h6
    k = k - 6.0 * jnp.floor(k / 6.0)  # k mod 6 in vector instructions
    return v - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

  return jnp.stack([channel(5.0), channel(3.0), channel(1.0)])
