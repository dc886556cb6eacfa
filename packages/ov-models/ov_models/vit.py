"""Vision transformer of OpenVision, with the options of other published image towers.

OpenVision: https://arxiv.org/abs/2505.04601. ViT: https://arxiv.org/abs/2010.11929.
"""

import dataclasses
import math

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from ov_models import masking
from ov_models.attention import FULL
from ov_models.blocks import (
  BlockStyle,
  Rotate,
  axes,
  drop_path,
  norm_of,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.contexts import any_mesh
from ov_models.partition import HIDDEN, constrain
from ov_models.pooling import AttendPool, MapPool
from ov_models.positions import resample_positions, sincos2d
from ov_models.rotary import rotation
from ov_models.shapes import AnyArray
from ov_models.tokens import Tokens, grid_coords, mean_of
from ov_models.vit_config import ViTConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViTOutput:
  """Output of a vision tower.

  Attributes:
    pooled: pooled vector after the norm.
    tokens: patch features of the last block, before any norm and without cls.
  """

  pooled: Float[Array, "B D"]
  tokens: Float[Array, "B T D"]


def _style(width: int) -> BlockStyle:
  return BlockStyle(
    qkv=normal(0.02),
    out=normal(0.02),
    up=normal(0.02),
    # std sqrt(0.3072 / D): 0.02 at D = 768.
    down=jax.nn.initializers.variance_scaling(
      0.3072, "fan_out", "truncated_normal", dtype=jnp.float32
    ),
  )


class ViT(nnx.Module):
  """Vision tower. Create it with `init` and `bind`."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    d, p = config.width, config.patch_size
    self.patch_embed = nnx.Conv(
      3, d, (p, p), strides=(p, p), padding="VALID", use_bias=config.patch_bias, dtype=jnp.float32,
      kernel_init=jax.nn.initializers.variance_scaling(2.0, "fan_in", "uniform"),
      kernel_metadata=axes(None, None, None, "embed"), bias_metadata=axes(None), rngs=rngs,
    )  # fmt: skip
    f32 = jnp.dtype("float32")
    if config.cls_token:
      self.cls = nnx.Param(normal(1e-6)(rngs.params(), (d,)), **axes(None))
    if config.registers:
      registers = normal(1e-6)(rngs.params(), (config.registers, d))
      self.registers = nnx.Param(registers, **axes(None, "embed"))
    if config.patch_norm:
      self.patch_norm = norm_of(config, rngs, dtype=f32)
    if config.pre_norm:
      self.pre_norm = norm_of(config, rngs, dtype=f32)
    if config.position == "learned":
      table = normal(0.02)(rngs.params(), (config.cls_token + config.num_patches, d))
      self.position_embedding = nnx.Param(table, **axes(None, "embed"))
    self.blocks = stack_blocks(config, _style(d), rngs=rngs)
    self.norm = norm_of(config, rngs)
    if config.pool == "map":
      self.pool: MapPool | AttendPool = MapPool(config.pool_config, _style(d), rngs=rngs)
    elif config.pool == "attend":
      self.pool = AttendPool(config.pool_config, _style(d), rngs=rngs)

  @any_mesh()
  def __call__(
    self, images: Float[AnyArray, "B H W 3"], key: PRNGKeyArray | None = None
  ) -> ViTOutput:
    """Encode images.

    Args:
      images: normalised images of at least one patch.
      key: random key for training; None disables patch masking, drop path and rotary rescaling.

    Returns:
      ViTOutput in compute dtype. T is the number of patches, or fewer with patch masking.

    Raises:
      ValueError: if the rank, the number of channels or the size of the images is invalid.
    """
    config = self.config
    tokens = self._embed(images)
    if key is not None and config.mask_ratio > 0:
      tokens = self._drop(tokens, key)
    keep = None
    if key is not None and config.drop_path > 0:
      path_key = jax.random.fold_in(key, 1)  # `_drop` uses the key itself
      keep = drop_path(path_key, self._drop_rates(), tokens.x.shape[0], config.compute_dtype)
    rotate = self._rotate(tokens, key)
    x = run_blocks(self.blocks, tokens.x, FULL, config, tokens.segments, rotate, keep=keep)
    tokens = dataclasses.replace(tokens, x=x)
    return ViTOutput(pooled=self._pool(tokens), tokens=tokens.patches.x)

  @any_mesh(axis=1)
  def hidden_states(self, images: Float[AnyArray, "B H W 3"]) -> Float[Array, "L B T D"]:
    """Return the input of the first block and the outputs of all blocks, in compute dtype.

    The `num_prefix` prefix tokens (cls) come first. No norm is applied. `[-2]` is the penultimate
    layer that multimodal models use; `[-1][:, num_prefix:]` equals `ViTOutput.tokens`.
    """
    tokens, config = self._embed(images), self.config
    rotate = self._rotate(tokens, None)
    return run_blocks(self.blocks, tokens.x, FULL, config, tokens.segments, rotate, all_layers=True)

  def _embed(self, images: Float[AnyArray, "B H W 3"]) -> Tokens:
    """Embed prefix and patches with positions, in compute dtype."""
    config = self.config
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, H, W, 3].")
    grid = config.grid_of(images.shape[1], images.shape[2])
    # Pixels and positions need float32 precision for any compute dtype.
    x = rearrange(self.patch_embed(images.astype(jnp.float32)), "b h w d -> b (h w) d")
    x = constrain(x, *HIDDEN)
    if config.patch_norm:
      x = self.patch_norm(x)
    if config.position == "sincos2d":
      x = x + sincos2d(*grid, config.width)
    tokens = Tokens(x, grid_coords(grid), grid)
    if config.registers:
      tokens = tokens.with_prefix(self._rows(self.registers[...], x.shape[0]))
    if config.cls_token:
      tokens = tokens.with_prefix(self._rows(self.cls[...], x.shape[0]))
    x = tokens.x
    if config.position == "learned":
      # The table has a row for cls, but none for registers.
      table = resample_positions(
        self.position_embedding[...], config.grid, grid, int(config.cls_token),
        config.position_resize,
      )  # fmt: skip
      if config.registers:
        table = jnp.insert(table, np.full(config.registers, int(config.cls_token)), 0.0, axis=0)
      x = x + table
    if config.pre_norm:
      x = self.pre_norm(x)
    return dataclasses.replace(tokens, x=x.astype(config.compute_dtype))

  def _rows(self, vectors: Float[AnyArray, "*R D"], batch: int) -> Float[Array, "B R D"]:
    """Return learned tokens for every image."""
    shape = (batch, 1 if vectors.ndim == 1 else vectors.shape[0], self.config.width)
    return jnp.broadcast_to(vectors, shape)

  def _rotate(self, tokens: Tokens, key: PRNGKeyArray | None) -> Rotate | None:
    config, scale = self.config, None
    if config.rotary == "none":
      return None
    if key is not None and config.rotary_rescale is not None:
      limit = math.log(config.rotary_rescale)
      draw = jax.random.uniform(jax.random.fold_in(key, 2), (), jnp.float32, -limit, limit)
      scale = jnp.exp(draw)
    return rotation(
      config.rotary, tokens, config.head_dim, config.rotary_base,
      offset=int(config.cls_token), scale=scale,
    )  # fmt: skip

  def _drop_rates(self) -> np.ndarray:
    rate, depth = self.config.drop_path, self.config.depth
    if self.config.drop_path_rule == "constant":
      return np.full(depth, rate)
    return np.linspace(0.0, rate, depth)

  def _drop(self, tokens: Tokens, key: PRNGKeyArray) -> Tokens:
    batch, total = tokens.x.shape[0], tokens.x.shape[1] - tokens.num_prefix
    keep = masking.num_kept(total, 1 - self.config.mask_ratio)
    if self.config.mask_mode == "grid":
      assert isinstance(tokens.grid, tuple)  # all images have one size
      return tokens.take(masking.grid_index(key, batch, tokens.grid, keep))
    return tokens.take(masking.random_index(key, batch, total, keep, ordered=True))

  def _pool(self, tokens: Tokens) -> Float[Array, "B D"]:
    pool, patches = self.config.pool, tokens.patches
    if pool == "gap":
      return self.norm(mean_of(patches.x, patches.segments))
    if pool == "mean":
      return mean_of(self.norm(patches.x), patches.segments)
    if pool == "tok":
      return self.norm(tokens.x[:, 0])
    if pool == "last":
      return self.norm(tokens.x[:, -1])
    return self.pool(self.norm(tokens.x), tokens.segments)
