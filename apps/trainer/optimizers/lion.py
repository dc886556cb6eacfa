"""Lion: the sign of an interpolation between gradient and momentum."""

import dataclasses

import jax.numpy as jnp
import optax

from apps.trainer.optimizers.update_rule import require_choice, require_decays


@dataclasses.dataclass(frozen=True)
class Lion:
  """`optax.scale_by_lion` (Chen et al. 2023, https://arxiv.org/abs/2302.06675).

  Every entry of an update is -1, 0 or 1, so the paper uses a learning rate 3 to 10 times smaller
  than for AdamW and a correspondingly larger weight decay.

  Attributes:
    b1: weight of the momentum in the interpolation.
    b2: decay rate of the momentum.
    mu_dtype: dtype of the momentum.
  """

  b1: float = 0.9
  b2: float = 0.99
  mu_dtype: str = "bfloat16"

  def __post_init__(self) -> None:
    require_decays(self, "b1", "b2")
    require_choice(self, "mu_dtype", "bfloat16", "float32")

  def build(self) -> optax.GradientTransformation:
    """Return the sign of the interpolated momentum."""
    return optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.dtype(self.mu_dtype))
