"""Random parameters for tests, created on the host without compiling initialisers."""

from typing import Any

import jax
import numpy as np

from ov_models.functional import Config, Params, abstract_params


def random_params(config: Config, seed: int = 0) -> Params:
  """Return random parameters of `config`, including biases and norm scales.

  All have a standard deviation of 0.1; norm scales have mean 1, all others mean 0.
  """
  return random_like(abstract_params(config), seed)


def random_like(shapes: Params, seed: int = 0) -> Params:
  """Return random parameters with the shapes of a tree of jax.ShapeDtypeStruct."""
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jax.numpy.asarray(rng.normal(centre, 0.1, leaf.shape).astype(leaf.dtype))

  return jax.tree_util.tree_map_with_path(draw, shapes)
