"""Config of a vision tower."""

import dataclasses
from typing import Any, Literal

from ov_models import masking
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
from ov_models.pooling import pool_config
from ov_models.positions import check_sincos_dim

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
  "rotary": ("none", "dinov3", "pe", "mrope"),
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
  rotary: Literal["none", "dinov3", "pe", "mrope"] = "none"
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
    """Return the config of the attention pooling, see `pooling.pool_config`."""
    return pool_config(self, self.pool_heads, self.pool_mlp_dim)

  @property
  def num_unmasked(self) -> int:
    """Return the number of patches that enter the blocks in training."""
    return masking.num_kept(self.num_patches, 1 - self.mask_ratio)
