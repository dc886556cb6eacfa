"""The vision transformer of OpenVision: patches to one pooled vector and to patch features.

OpenVision: https://arxiv.org/abs/2505.04601. ViT: https://arxiv.org/abs/2010.11929.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models import masking
from ov_models.attention import FULL, Mask, attend
from ov_models.blocks import (
  Attention,
  BlockStyle,
  Mlp,
  axes,
  block_outputs,
  layer_norm,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import (
  LARGEST_SIZE,
  TransformerConfig,
  check_choice,
  check_ratio,
  from_fields,
  shown,
  variant_sizes,
)
from ov_models.contexts import any_mesh
from ov_models.partition import constrain
from ov_models.positions import check_sincos_dim, resample_positions, sincos2d

# name: (width, depth, mlp_dim, num_heads)
VIT_VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "So400m": (1152, 27, 4304, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
  "g-opt": (1536, 40, 6144, 16),
  "G": (1664, 48, 8192, 16),
  "G-opt": (1536, 48, 8192, 16),
  "e": (1792, 56, 15360, 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(TransformerConfig):
  """A vision tower.

  Attributes:
    patch_size: P, pixels; right and bottom pixels that fill no patch are ignored, see
      `dropped_pixels`.
    image_size: pixels, the size learned positions are made for. Forward takes any size.
    position: "sincos2d" computed and never stored, "learned" a table [1 + T, D].
    pool: "gap" norm of the mean patch, "tok" the normed cls token, "map" attention pooling over
      all normed tokens.
    mask_ratio: share of patches dropped in training, before the blocks; in [0, 1).
    mask_mode: "random" subset, or "grid": a lattice with random offset. Kept patches stay in image
      order; the published code shuffles them, which the blocks cannot tell.
  """

  patch_size: int
  image_size: int
  position: Literal["sincos2d", "learned"] = "sincos2d"
  pool: Literal["gap", "tok", "map"] = "gap"
  mask_ratio: float = 0.0
  mask_mode: Literal["random", "grid"] = "random"

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_positive("patch_size")
    self._check_positive("image_size")
    check_choice("position", self.position, ("sincos2d", "learned"))
    check_choice("pool", self.pool, ("gap", "tok", "map"))
    check_choice("mask_mode", self.mask_mode, ("random", "grid"))
    check_ratio("mask_ratio", self.mask_ratio, zero=True, one=False)
    if self.position == "sincos2d":
      check_sincos_dim(self.width, 4)
    if self.num_patches > LARGEST_SIZE:
      raise ValueError(
        f"image_size={self.image_size} with patch_size={self.patch_size} makes "
        f"{self.num_patches} patches; expected at most {LARGEST_SIZE}."
      )

  @classmethod
  def from_name(cls, name: str, image_size: int = 224, **overrides: Any) -> "ViTConfig":
    """A published size, e.g. "L/14" (patch 16 when not given); `overrides` set any field.

    Raises:
      ValueError: unknown variant, patch that is no number, or an impossible combination.
    """
    if not isinstance(name, str):
      raise ValueError(f"ViT variant={shown(name)}; expected a name such as 'L/14'.")
    variant, _, patch = name.partition("/")
    if patch and not (patch.isascii() and patch.isdigit() and len(patch) < 9):
      raise ValueError(
        f"patch size {shown(patch)} in {shown(name)} is no number of at most 8 digits; write e.g. "
        "'L/14'."
      )
    sizes: dict[str, Any] = variant_sizes("ViT", variant, VIT_VARIANTS)
    sizes |= {"patch_size": int(patch or 16), "image_size": image_size}
    return from_fields(cls, sizes | overrides)

  def grid_of(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of an image; ValueError if it is smaller than one patch."""
    if min(height, width) < self.patch_size:
      raise ValueError(
        f"image of {height} x {width} pixels is smaller than one patch of {self.patch_size}; "
        "give a larger image or a smaller patch_size."
      )
    return height // self.patch_size, width // self.patch_size

  def dropped_pixels(self, height: int, width: int) -> tuple[int, int]:
    """Rows at the bottom and columns at the right of an image that fill no patch and are ignored.

    (0, 0) where both sides are multiples of `patch_size`. Published models are trained at sizes
    where it is not: So400m/14 at 384 pixels ignores 6 rows and 6 columns.
    """
    rows, columns = self.grid_of(height, width)
    return height - rows * self.patch_size, width - columns * self.patch_size

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches at `image_size`."""
    return self.grid_of(self.image_size, self.image_size)

  @property
  def num_patches(self) -> int:
    """Patches at `image_size`."""
    return self.grid[0] * self.grid[1]

  @property
  def num_unmasked(self) -> int:
    """Patches that enter the blocks in training."""
    return masking.num_kept(self.num_patches, 1 - self.mask_ratio)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViTOutput:
  """pooled [B, D]; tokens [B, T, D], patches after the last block, before any norm, no cls."""

  pooled: jax.Array
  tokens: jax.Array


def _style(width: int) -> BlockStyle:
  return BlockStyle(
    gelu_tanh=False,
    qkv=normal(0.02),
    out=normal(0.02),
    up=normal(0.02),
    # std sqrt(0.3072 / D): 0.02 at D = 768.
    down=jax.nn.initializers.variance_scaling(
      0.3072, "fan_out", "truncated_normal", dtype=jnp.float32
    ),
  )


class MapPool(nnx.Module):
  """Attention pooling by one learned query: [B, T, D] -> [B, D]."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d = config.width
    self.dtype = config.compute_dtype
    probe = jax.nn.initializers.xavier_uniform(dtype=jnp.float32)(rngs.params(), (1, d))
    self.probe = nnx.Param(probe[0], **axes(None))
    self.attn = Attention(config, style, rngs=rngs)
    self.norm = layer_norm(d, self.dtype, rngs)
    self.mlp = Mlp(config, style, rngs=rngs)

  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Pools x, of the tokens in `keys` bool [B, T] only (None: of all)."""
    probe = jnp.broadcast_to(self.probe[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    q, k, v = self.attn.project(probe, x)
    pooled = self.attn.merge(attend(q, k, v, Mask(keys=keys), "xla"))
    return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class ViT(nnx.Module):
  """Vision tower. Build it by `init` and `bind`, not by hand."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    d, p = config.width, config.patch_size
    self.patch_embed = nnx.Conv(
      3, d, (p, p), strides=(p, p), padding="VALID", use_bias=False, dtype=jnp.float32,
      kernel_init=jax.nn.initializers.variance_scaling(2.0, "fan_in", "uniform"),
      kernel_metadata=axes(None, None, None, "embed"), rngs=rngs,
    )  # fmt: skip
    self.cls = nnx.Param(normal(1e-6)(rngs.params(), (d,)), **axes(None))
    if config.position == "learned":
      table = normal(0.02)(rngs.params(), (1 + config.num_patches, d))
      self.position_embedding = nnx.Param(table, **axes(None, "embed"))
    self.blocks = stack_blocks(config, _style(d), rngs=rngs)
    self.norm = layer_norm(d, config.compute_dtype, rngs)
    if config.pool == "map":
      self.pool = MapPool(config, _style(d), rngs=rngs)

  @any_mesh()
  def __call__(self, images: jax.Array, key: jax.Array | None = None) -> ViTOutput:
    """Encodes images.

    Args:
      images: float32 [B, H, W, 3], already normalised; any H, W of at least one patch.
      key: randomness of training. Without it no patch is dropped.

    Returns:
      ViTOutput in compute dtype; T = patches of the image, fewer with a key and mask_ratio > 0.

    Raises:
      ValueError: images of another rank, channel count or below one patch.
    """
    config = self.config
    x, grid = self._embed(images)
    if key is not None and config.mask_ratio > 0:
      x = jnp.concatenate([x[:, :1], self._drop(x[:, 1:], grid, key)], axis=1)
    x = run_blocks(self.blocks, x, FULL, config)
    return ViTOutput(pooled=self._pool(x), tokens=x[:, 1:])

  @any_mesh(axis=1)
  def hidden_states(self, images: jax.Array) -> jax.Array:
    """[L + 1, B, 1 + T, D] in compute dtype: what enters the blocks, and what leaves each of them.

    The cls token comes first; no norm is applied. `[-2]` is the penultimate layer that multimodal
    models read; `[-1][:, 1:]` are the tokens of a call.
    """
    x, _ = self._embed(images)
    return block_outputs(self.blocks, x, FULL, self.config)

  def _embed(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
    """cls and patches with positions: [B, 1 + T, D] in compute dtype, and the grid."""
    config = self.config
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, H, W, 3].")
    grid = config.grid_of(images.shape[1], images.shape[2])
    # float32 up to here whatever the compute dtype: pixels and positions need the bits.
    x = self.patch_embed(images.astype(jnp.float32))
    x = constrain(x.reshape(x.shape[0], grid[0] * grid[1], config.width))
    cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, config.width))
    if config.position == "learned":
      table = resample_positions(self.position_embedding[...], config.grid, grid)
      x = jnp.concatenate([cls, x], axis=1) + table
    else:
      x = jnp.concatenate([cls, x + sincos2d(*grid, config.width)], axis=1)
    return x.astype(config.compute_dtype), grid

  def _drop(self, patches: jax.Array, grid: tuple[int, int], key: jax.Array) -> jax.Array:
    batch, total = patches.shape[:2]
    keep = masking.num_kept(total, 1 - self.config.mask_ratio)
    if self.config.mask_mode == "grid":
      index = masking.grid_index(key, batch, grid, keep)
    else:
      index = masking.random_index(key, batch, total, keep, ordered=True)
    return masking.take_tokens(patches, index)

  def _pool(self, x: jax.Array) -> jax.Array:
    if self.config.pool == "gap":
      return self.norm(x[:, 1:].mean(axis=1))
    if self.config.pool == "tok":
      return self.norm(x[:, 0])
    return self.pool(self.norm(x))
