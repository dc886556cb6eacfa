"""Compiled embedding functions of a frozen model, for the evaluators.

They take host batches (rows of this process) and return NumPy arrays for the rows of this process.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from apps.trainer.augment import Normalization
from apps.trainer.held_out import HostBatch
from apps.trainer.task import Params, Task
import ov_models
import ov_sharding

EmbedImages = Callable[[HostBatch], np.ndarray]


def image_embedder(task: Task, params: Params, mesh: jax.sharding.Mesh) -> EmbedImages:
  """Return a function from a batch to unit vectors float32 [b, E] of the shared space."""
  return _on_rows(functools.partial(_embed_images, task.model, task.normalization), params, mesh)


def feature_extractor(task: Task, params: Params, mesh: jax.sharding.Mesh) -> EmbedImages:
  """Return a function from a batch to pooled features float32 [b, D] of the vision tower."""
  compute = functools.partial(_pooled, task.model.encoder, task.normalization)
  return _on_rows(compute, params["encoder"], mesh)


def text_embedder(
  model: ov_models.VisionLanguageConfig, params: Params, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """Return a function from ids int32 [N, T] to unit vectors float32 [N, E].

  Ids and vectors are the same on every process. N must be a multiple of the devices.
  """
  rows, replicated = ov_sharding.batch_sharding(mesh), ov_sharding.replicated(mesh)

  def embed(ids: np.ndarray) -> np.ndarray:
    ids = np.ascontiguousarray(ids)
    placed = jax.make_array_from_callback(ids.shape, rows, lambda index: ids[index])
    with jax.set_mesh(mesh):
      return np.asarray(jax.device_get(_embed_texts(model, replicated, params, placed)))

  return embed


def _on_rows(compute: Callable[..., Any], params: Params, mesh: Any) -> EmbedImages:
  rows = ov_sharding.batch_sharding(mesh)

  def embed(batch: HostBatch) -> np.ndarray:
    images = ov_sharding.global_batch({"image": batch["image"]}, mesh)["image"]
    with jax.set_mesh(mesh):
      computed = compute(rows, params, images)
    return ov_sharding.local_rows(computed)

  return embed


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_images(
  model: ov_models.VisionLanguageConfig,
  normalise: Normalization,
  rows: NamedSharding,
  params: Params,
  images: jax.Array,
) -> jax.Array:
  unit = ov_models.bind(model, params).encode_image(normalise(images)).unit
  return jax.lax.with_sharding_constraint(unit, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(
  encoder: ov_models.ViTConfig,
  normalise: Normalization,
  rows: NamedSharding,
  params: Params,
  images: jax.Array,
) -> jax.Array:
  pooled = ov_models.bind(encoder, params)(normalise(images)).pooled
  return jax.lax.with_sharding_constraint(pooled.astype("float32"), rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_texts(
  model: ov_models.VisionLanguageConfig,
  replicated: NamedSharding,
  params: Params,
  ids: jax.Array,
) -> jax.Array:
  unit = ov_models.bind(model, params).encode_text(ids).unit
  return jax.lax.with_sharding_constraint(unit, replicated)
