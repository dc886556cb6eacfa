"""What every evaluator does with the pictures of a frozen model: vectors, compiled once.

Functions made here take host batches (rows of this process) and return numpy rows of this process.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from apps.trainer.augment import normalise
from apps.trainer.held_out import HostBatch
from apps.trainer.task import Params
import ov_models
import ov_sharding

EmbedImages = Callable[[HostBatch], np.ndarray]


def image_embedder(
  model: ov_models.VisionLanguageConfig, params: Params, mesh: jax.sharding.Mesh
) -> EmbedImages:
  """Batch -> unit vectors float32 [b, E] of the shared space."""
  return _on_rows(functools.partial(_embed_images, model), params, mesh)


def feature_extractor(
  encoder: ov_models.ViTConfig, params: Params, mesh: jax.sharding.Mesh
) -> EmbedImages:
  """Batch -> pooled features float32 [b, D] of a vision tower with these params."""
  return _on_rows(functools.partial(_pooled, encoder), params, mesh)


def text_embedder(
  model: ov_models.VisionLanguageConfig, params: Params, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """ids int32 [N, T], the same on every process -> unit vectors float32 [N, E] on every process.

  N must be a multiple of the devices.
  """
  rows, whole = ov_sharding.batch_sharding(mesh), ov_sharding.replicated(mesh)

  def embed(ids: np.ndarray) -> np.ndarray:
    ids = np.ascontiguousarray(ids)
    placed = jax.make_array_from_callback(ids.shape, rows, lambda index: ids[index])
    return np.asarray(jax.device_get(_embed_texts(model, whole, params, placed)))

  return embed


def _on_rows(compute: Callable[..., Any], params: Params, mesh: Any) -> EmbedImages:
  rows = ov_sharding.batch_sharding(mesh)

  def embed(batch: HostBatch) -> np.ndarray:
    images = ov_sharding.global_batch({"image": batch["image"]}, mesh)["image"]
    return ov_sharding.local_rows(compute(rows, params, images))

  return embed


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_images(
  model: ov_models.VisionLanguageConfig, rows: NamedSharding, params: Params, images: jax.Array
) -> jax.Array:
  unit = ov_models.bind(model, params).encode_image(normalise(images)).unit
  return jax.lax.with_sharding_constraint(unit, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(
  encoder: ov_models.ViTConfig, rows: NamedSharding, params: Params, images: jax.Array
) -> jax.Array:
  pooled = ov_models.bind(encoder, params)(normalise(images)).pooled
  return jax.lax.with_sharding_constraint(pooled.astype("float32"), rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_texts(
  model: ov_models.VisionLanguageConfig, whole: NamedSharding, params: Params, ids: jax.Array
) -> jax.Array:
  unit = ov_models.bind(model, params).encode_text(ids).unit
  return jax.lax.with_sharding_constraint(unit, whole)
