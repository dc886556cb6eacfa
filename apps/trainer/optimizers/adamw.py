"""Adam part of AdamW; the chain that all optimizers share adds the decoupled weight decay."""

import dataclasses

import jax.numpy as jnp
import optax

from apps.trainer.optimizers import moments
from apps.trainer.optimizers.update_rule import require_choice, require_decays, require_positive
from apps.trainer.paths import is_stacked, path_str


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with bias correction (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101).

  Attributes:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: constant added to the square root of the second moment.
    mu_dtype: dtype of the first moment. Relative to "bfloat16", "float32" needs 2 more bytes per
      parameter and "int8" (block-wise quantized) 1 byte less. With "bfloat16" the compiler decides
      whether b1 * mu is rounded to bfloat16 (xla_allow_excess_precision), which changes single
      updates by up to 0.4%.
    second_moment: "full", 4 bytes per parameter; "factored", means of rows and columns, almost no
      memory; "int8", block-wise quantized, 1 byte. Small arrays are always kept in full.
  """

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  mu_dtype: str = "bfloat16"
  second_moment: str = "full"

  def __post_init__(self) -> None:
    require_decays(self, "b1", "b2")
    require_positive(self, "eps")
    require_choice(self, "mu_dtype", "bfloat16", "float32", "int8")
    require_choice(self, "second_moment", "full", "factored", "int8")

  def build(self) -> optax.GradientTransformation:
    """Return Adam; memory-efficient variants are in `moments`."""
    rates = self.b1, self.b2, self.eps
    if self.second_moment == "full" and self.mu_dtype != "int8":
      return optax.scale_by_adam(*rates, mu_dtype=jnp.dtype(self.mu_dtype))
    stacked = lambda path: is_stacked(path_str(path))
    return moments.scale_by_adam(*rates, self.mu_dtype, self.second_moment, stacked)
