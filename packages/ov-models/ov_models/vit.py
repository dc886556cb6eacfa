"""Vision transformer of OpenVision, with the options of other published image towers.

OpenVision: https://arxiv.org/abs/2505.04601. ViT: https://arxiv.org/abs/2010.11929.
"""

import dataclasses
import math
from typing import Any, Literal

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from ov_models import masking
from ov_models.attention import FULL, attend
from ov_models.blocks import (
  Attention,
  BlockStyle,
  Mlp,
  Rotate,
  axes,
  drop_path,
  linear,
  norm_of,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import (
  LARGEST_SIZE,
  Activation,
  TransformerConfig,
  check_choice,
  check_flag,
  check_range,
  check_ratio,
  check_size,
  from_fields,
  shown,
  variant_sizes,
)
from ov_models.contexts import any_mesh
from ov_models.partition import HIDDEN, constrain
from ov_models.positions import check_sincos_dim, resample_positions, sincos2d
from ov_models.rotary import rotation
from ov_models.shapes import AnyArray, Segments
from ov_models.tokens import Tokens, grid_coords, is_valid, mean_of

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


# Values of the fields of ViTConfig with a choice.
_CHOICES = {
  "position": ("sincos2d", "learned", "none"),
  "position_resize": ("bilinear", "bicubic"),
  "rotary": ("none", "dinov3", "pe"),
  "pool": ("gap", "mean", "tok", "last", "map", "attend"),
  "drop_path_rule": ("linear", "constant"),
  "mask_mode": ("random", "grid"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(TransformerConfig):
  """Config of a vision tower.

  Attributes:
    patch_size: patch size P in pixels. Right and bottom pixels of incomplete patches are ignored,
      see `dropped_pixels`.
    image_size: image size in pixels for learned positions. The model accepts any size.
    cls_token: whether a learned token precedes the patches.
    registers: number of learned tokens without position between cls and the patches
      (https://arxiv.org/abs/2309.16588).
    patch_bias: whether the patch embedding has a bias.
    patch_norm: whether embedded patches are normalised before positions are added.
    pre_norm: whether all tokens are normalised before the first block.
    position: "sincos2d" (computed), "learned" (a table for cls and all patches), or "none".
    position_resize: resampling of learned positions to other image sizes, antialiased.
    rotary: rotation of queries and keys by the positions of patches, see `rotary`.
    rotary_base: base of the frequencies of `rotary`.
    rotary_rescale: the coordinates of "dinov3" are multiplied in training by a factor that is
      log-uniform in [1 / r, r]; None for 1.
    pool: "gap" (norm of the mean patch), "mean" (mean of the normalised patches), "tok" (normalised
      cls token), "last" (normalised last patch), "map" (attention pooling over all normalised
      tokens, followed by an MLP, https://arxiv.org/abs/2106.04560), or "attend" (attention pooling
      with a learned query and an output projection, https://arxiv.org/abs/2401.08541).
    pool_heads: attention heads of pool "map" and "attend"; None for num_heads.
    pool_mlp_dim: hidden width of the MLP of pool "map"; None for mlp_dim.
    drop_path: fraction in [0, 1) of the branches dropped in training, per image
      (https://arxiv.org/abs/1603.09382).
    drop_path_rule: "linear": the fraction grows from 0 in the first block to `drop_path` in the
      last one; "constant": it is the same in all blocks.
    mask_ratio: fraction in [0, 1) of the patches dropped before the blocks in training.
    mask_mode: "random" subset, or "grid": a lattice with a random offset. Kept patches stay in
      image order; the released code shuffles them, which does not change the result.
  """

  patch_size: int
  image_size: int
  activation: Activation = "gelu"
  cls_token: bool = True
  registers: int = 0
  patch_bias: bool = False
  patch_norm: bool = False
  pre_norm: bool = False
  position: Literal["sincos2d", "learned", "none"] = "sincos2d"
  position_resize: Literal["bilinear", "bicubic"] = "bilinear"
  rotary: Literal["none", "dinov3", "pe"] = "none"
  rotary_base: float = 100.0
  rotary_rescale: float | None = None
  pool: Literal["gap", "mean", "tok", "last", "map", "attend"] = "gap"
  pool_heads: int | None = None
  pool_mlp_dim: int | None = None
  drop_path: float = 0.0
  drop_path_rule: Literal["linear", "constant"] = "linear"
  mask_ratio: float = 0.0
  mask_mode: Literal["random", "grid"] = "random"

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_positive("patch_size")
    self._check_positive("image_size")
    for name, allowed in _CHOICES.items():
      check_choice(name, getattr(self, name), allowed)
    for name in ("cls_token", "patch_bias", "patch_norm", "pre_norm"):
      check_flag(name, getattr(self, name))
    if self.registers != 0:
      check_size("registers", self.registers, 4096)
    check_ratio("mask_ratio", self.mask_ratio, zero=True, one=False)
    check_ratio("drop_path", self.drop_path, zero=True, one=False)
    if self.position == "sincos2d":
      check_sincos_dim(self.width, 4)
    if self.pool == "tok" and not self.cls_token:
      raise ValueError("pool='tok' reads the cls token, but cls_token=False; use pool='gap'.")
    self._check_rotary()
    self._check_pool()
    if self.num_patches > LARGEST_SIZE:
      raise ValueError(
        f"image_size={self.image_size} with patch_size={self.patch_size} gives "
        f"{self.num_patches} patches; expected at most {LARGEST_SIZE}."
      )

  def _check_rotary(self) -> None:
    check_range("rotary_base", self.rotary_base, 1e-3, 1e9)
    if self.rotary != "none" and self.head_dim % 4:
      raise ValueError(
        f"rotary={self.rotary!r} needs heads of a multiple of 4 channels, but width={self.width} "
        f"with num_heads={self.num_heads} gives {self.head_dim}; change num_heads."
      )
    if self.rotary_rescale is None:
      return
    check_range("rotary_rescale", self.rotary_rescale, 1, 1e3)
    if self.rotary != "dinov3":
      raise ValueError(
        f"rotary_rescale={self.rotary_rescale} with rotary={self.rotary!r}; it requires "
        "rotary='dinov3', otherwise None."
      )

  def _check_pool(self) -> None:
    for name in ("pool_heads", "pool_mlp_dim"):
      if (value := getattr(self, name)) is None:
        continue
      check_size(name, value)
      pools = ("map", "attend") if name == "pool_heads" else ("map",)
      if self.pool not in pools:
        raise ValueError(f"{name}={value} has no effect with pool={self.pool!r}; leave it out.")
    if self.pool_heads is not None and self.width % self.pool_heads:
      raise ValueError(
        f"pool_heads={self.pool_heads} does not divide width={self.width}; choose a divisor."
      )

  @classmethod
  def from_name(cls, name: str, image_size: int = 224, **overrides: Any) -> "ViTConfig":
    """Return the config of a published size, e.g. "L/14"; `overrides` set any field.

    The default patch size is 16.

    Raises:
      ValueError: if the variant is unknown, or the patch size or a field is invalid.
    """
    if not isinstance(name, str):
      raise ValueError(f"ViT variant={shown(name)}; expected a name such as 'L/14'.")
    variant, _, patch = name.partition("/")
    if patch and not (patch.isascii() and patch.isdigit() and len(patch) < 9):
      raise ValueError(
        f"patch size {shown(patch)} in {shown(name)} is not an integer of at most 8 digits; use a "
        "name such as 'L/14'."
      )
    sizes: dict[str, Any] = variant_sizes("ViT", variant, VIT_VARIANTS)
    sizes |= {"patch_size": int(patch or 16), "image_size": image_size}
    return from_fields(cls, sizes | overrides)

  def grid_of(self, height: int, width: int) -> tuple[int, int]:
    """Return the patch grid of an image; raise ValueError if it is smaller than one patch."""
    if min(height, width) < self.patch_size:
      raise ValueError(
        f"image of {height} x {width} pixels is smaller than one patch of {self.patch_size}; "
        "use a larger image or a smaller patch_size."
      )
    return height // self.patch_size, width // self.patch_size

  def dropped_pixels(self, height: int, width: int) -> tuple[int, int]:
    """Return the numbers of bottom rows and right columns of an image that are ignored.

    (0, 0) if both sides are multiples of `patch_size`. Some published models ignore pixels:
    So400m/14 at 384 pixels drops 6 rows and 6 columns.
    """
    rows, columns = self.grid_of(height, width)
    return height - rows * self.patch_size, width - columns * self.patch_size

  @property
  def grid(self) -> tuple[int, int]:
    """Return the patch grid at `image_size`."""
    return self.grid_of(self.image_size, self.image_size)

  @property
  def num_patches(self) -> int:
    """Return the number of patches at `image_size`."""
    return self.grid[0] * self.grid[1]

  @property
  def num_prefix(self) -> int:
    """Return the number of tokens before the patches: cls and registers."""
    return int(self.cls_token) + self.registers

  @property
  def pool_config(self) -> TransformerConfig:
    """Return the config of the attention pooling: blocks without options other than biases."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(TransformerConfig)}
    fields |= {"num_heads": self.pool_heads or self.num_heads, "mlp": "plain"}
    fields |= {"mlp_dim": self.pool_mlp_dim or self.mlp_dim, "layer_scale": None}
    return TransformerConfig(**fields | {"qk_norm": False, "attention_gate": False})

  @property
  def num_unmasked(self) -> int:
    """Return the number of patches that enter the blocks in training."""
    return masking.num_kept(self.num_patches, 1 - self.mask_ratio)


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


class MapPool(nnx.Module):
  """Attention pooling with one learned query."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d = config.width
    self.dtype = config.compute_dtype
    probe = jax.nn.initializers.xavier_uniform(dtype=jnp.float32)(rngs.params(), (1, d))
    self.probe = nnx.Param(probe[0], **axes(None))
    self.attn = Attention(config, style, rngs=rngs)
    self.norm = norm_of(config, rngs)
    self.mlp = Mlp(config, style, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], segments: Segments | None = None
  ) -> Float[Array, "B D"]:
    """Pool the tokens of x that are not padding; `segments` as in Tokens."""
    valid = None if segments is None else is_valid(segments)
    probe = jnp.broadcast_to(self.probe[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    q, k, v = self.attn.qkv(probe, x)
    pooled = self.attn.output(attend(q, k, v, FULL, "xla", valid))
    return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class AttendPool(nnx.Module):
  """Attention pooling with one learned query, keys and values without bias, and no MLP."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d, self.dtype, self.num_heads = config.width, config.compute_dtype, config.num_heads
    self.query = nnx.Param(normal(0.02)(rngs.params(), (d,)), **axes(None))
    project = {"bias": config.qkv_bias == "all"}
    self.key = linear(d, d, style.qkv, ("embed", "mlp"), self.dtype, rngs, **project)
    self.value = linear(d, d, style.qkv, ("embed", "mlp"), self.dtype, rngs, **project)
    self.out = linear(d, d, style.out, ("mlp", "embed"), self.dtype, rngs)

  def __call__(
    self, x: Float[Array, "B T D"], segments: Segments | None = None
  ) -> Float[Array, "B D"]:
    """Pool the tokens of x that are not padding; `segments` as in Tokens."""
    valid = None if segments is None else is_valid(segments)
    q = jnp.broadcast_to(self.query[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    q, k, v = (
      rearrange(a, "b t (n h) -> b t n h", n=self.num_heads)
      for a in (q, self.key(x), self.value(x))
    )
    return self.out(rearrange(attend(q, k, v, FULL, "xla", valid), "b t n h -> b t (n h)"))[:, 0]


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
