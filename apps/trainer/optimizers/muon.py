"""Muon: orthogonalized momentum for the kernels of the blocks, AdamW for all other parameters."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apps.trainer.optimizers.adamw import AdamW
from apps.trainer.optimizers.update_rule import (
  named_chain,
  require,
  require_choice,
  require_decays,
  require_positive,
)
from apps.trainer.paths import is_stacked, path_str

PyTree = Any

_MATRICES = re.compile(r"/kernel$")


@dataclasses.dataclass(frozen=True)
class Muon:
  """`optax.contrib.scale_by_muon` (Jordan 2024, https://kellerjordan.github.io/posts/muon).

  Muon updates the stacked kernels of the blocks, [L, in, out], separately per layer. Embeddings,
  positions, norms, biases, heads and projections outside the blocks are updated by AdamW.

  Attributes:
    beta: decay rate of the momentum.
    steps: Newton-Schulz iterations.
    nesterov: use Nesterov momentum.
    mu_dtype: dtype of the momentum.
    consistent_rms: scale updates of [in, out] by this times sqrt(max(in, out)), which gives them
      the RMS of AdamW updates, so that both share learning rate and weight decay (Liu et al. 2025,
      https://arxiv.org/abs/2502.16982). 0: scale by sqrt(max(1, out / in)).
    adamw: update rule of the other parameters.
  """

  beta: float = 0.95
  steps: int = 5
  nesterov: bool = True
  mu_dtype: str = "bfloat16"
  consistent_rms: float = 0.2
  adamw: AdamW = AdamW()

  def __post_init__(self) -> None:
    require_decays(self, "beta")
    require(self, "steps", self.steps > 0, "at least 1")
    require_choice(self, "mu_dtype", "bfloat16", "float32")
    if self.consistent_rms:
      require_positive(self, "consistent_rms")

  def build(self) -> optax.GradientTransformation:
    """Return Muon and AdamW, each masked to its parameters."""
    scale_by_muon = optax.contrib.scale_by_muon(
      ns_steps=self.steps,
      beta=self.beta,
      nesterov=self.nesterov,
      mu_dtype=jnp.dtype(self.mu_dtype),
      weight_dimension_numbers=_dimension_numbers,
    )
    return named_chain(
      ("muon", optax.masked(_without_constants(scale_by_muon), _is_matrix)),
      ("shape", optax.masked(optax.stateless_with_tree_map(self._scale), _is_matrix)),
      ("adamw", optax.masked(self.adamw.build(), _is_other)),
    )

  def _scale(self, update: jax.Array, param: jax.Array | None) -> jax.Array:
    del param
    rows, columns = update.shape[-2:]
    if self.consistent_rms:
      return update * (self.consistent_rms * math.sqrt(max(rows, columns)))
    return update * math.sqrt(max(1.0, columns / rows))


def _is_matrix(params: PyTree) -> PyTree:
  """Return True for stacked kernels, [L, in, out]; accepts updates or params."""

  def one(path: Any, param: jax.Array) -> bool:
    text = path_str(path)
    return param.ndim == 3 and is_stacked(text) and bool(_MATRICES.search(text))

  return jax.tree_util.tree_map_with_path(one, params)


def _is_other(params: PyTree) -> PyTree:
  return jax.tree.map(lambda matrix: not matrix, _is_matrix(params))


def _dimension_numbers(updates: PyTree) -> PyTree:
  """Return the dimension numbers of [L, in, out]: the unnamed axis 0 counts matrices."""
  return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), updates)


def _without_constants(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Remove the coefficients of the Newton-Schulz iteration from the state and from checkpoints."""
  coefficients = tx.init({}).ns_coeffs

  def init(params: PyTree) -> Any:
    return tx.init(params)._replace(ns_coeffs=())

  def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
    out, state = tx.update(updates, state._replace(ns_coeffs=coefficients), params)
    return out, state._replace(ns_coeffs=())

  return optax.GradientTransformation(init, update)
