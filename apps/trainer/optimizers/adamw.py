"""Adam, for AdamW: weight decay is decoupled and added by the chain that all optimizers share."""

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
    eps: added to the square root of the second moment.
    mu_dtype: dtype of the first moment; "float32" costs 2 more bytes a parameter, "int8" (codes
      with a scale for each block) 1 less. With "bfloat16" the compiler decides whether the product
      b1 * mu is rounded to it (xla_allow_excess_precision); that moves single updates by up to
      0.4%.
    second_moment: "full", 4 bytes a parameter; "factored", means of rows and columns, next to
      nothing; "int8", codes with a scale for each block, 1 byte. Small arrays are kept in full.
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
    """Return Adam; `moments` has the versions that keep less than a float32 of v."""
    rates = self.b1, self.b2, self.eps
    if self.second_moment == "full" and self.mu_dtype != "int8":
      return optax.scale_by_adam(*rates, mu_dtype=jnp.dtype(self.mu_dtype))
    stacked = lambda path: is_stacked(path_str(path))
    return moments.scale_by_adam(*rates, self.mu_dtype, self.second_moment, stacked)
