"""Frozen teacher of a distillation: the image tower of a trained or imported model.

  teacher = read_teacher("/data/teacher")              # a workdir, or a folder of ov_models.save
  embed = teacher.embedder(config, mesh, stage_index)  # parameters on the devices, jitted
  batch["teacher"] = embed(batch)                      # float32 [B, E] of unit length

The teacher is a separate program, and a loss term reads its output from the batch. So there is no
gradient, its parameters are neither trained nor donated nor saved, it runs once per step also with
gradient accumulation, and stored embeddings of the same program are equal bit for bit. Its pixels
are those of the student, with the same crop and colour jitter, normalised with the teacher's own
mean and deviation. It computes with `config.model.dtype`, in `config.accumulate` micro-batches.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np

from apps.trainer.augment import MEAN, STD, Normalization, make_preprocess
from apps.trainer.checkpoint import find_checkpoint, read_metadata
from apps.trainer.checkpoint_metadata import TeacherIdentity
from apps.trainer.config import augment_config, model_config
from apps.trainer.init_source import restore_params
from apps.trainer.paths import flatten_paths
from apps.trainer.run_config import ModelSettings, RunConfig
from apps.trainer.step import split
from ov_convert.release import encoder_of, portable
import ov_models
from ov_models.files import CONFIG_FILE, config_from_dict, read_config
import ov_sharding

Batch = dict[str, jax.Array]
Params = dict[str, Any]
_HEAD_AXES = ("embed", None)


@dataclasses.dataclass(frozen=True)
class Tower:
  """Image tower of a model, without its parameters.

  Attributes:
    encoder: configuration of the encoder, with portable options.
    head_dim: outputs of the projection after the encoder; 0 without one.
    mean, std: normalisation of the three channels in [0, 1].
  """

  encoder: ov_models.ViTConfig
  head_dim: int
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD

  @property
  def dim(self) -> int:
    """Size of an embedding."""
    return self.head_dim or self.encoder.width

  def abstract_params(self) -> Params:
    """Return shapes and dtypes of the parameters."""
    params: Params = {"encoder": ov_models.abstract_params(self.encoder)}
    if self.head_dim:
      shape = (self.encoder.width, self.head_dim)
      params["image_head"] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return params

  def logical_axes(self) -> Params:
    """Return the tree of the parameters with a tuple of logical axis names for each."""
    axes: Params = {"encoder": ov_models.logical_axes(self.encoder)}
    return axes | ({"image_head": {"kernel": _HEAD_AXES}} if self.head_dim else {})

  def embed(self, params: Params, images: jax.Array) -> jax.Array:
    """Return float32 embeddings [B, E] of unit length of normalised images [B, H, W, 3]."""
    raw = ov_models.bind(self.encoder, params["encoder"])(images).pooled.astype(jnp.float32)
    if self.head_dim:
      raw = raw @ params["image_head"]["kernel"]
    return raw / (jnp.linalg.norm(raw, axis=-1, keepdims=True) + 1e-8)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Image tower with its parameters in host memory.

  Attributes:
    tower: configuration.
    params: float32 arrays.
    identity: path, and fingerprint of configuration and parameters.
  """

  tower: Tower
  params: Params
  identity: TeacherIdentity

  def embedder(
    self, config: RunConfig, mesh: jax.sharding.Mesh, stage_index: int
  ) -> Callable[[Batch], jax.Array]:
    """Copy the parameters to the devices, sharded like those of a model.

    Args:
      config: configuration of the stage; sets colour jitter, dtype and micro-batches.
      mesh: devices of the batch.
      stage_index: index of the stage, which changes the draws of the jitter.

    Returns:
      A function from a batch with `image` uint8 [B, S, S, 3] and `index` [B] to float32 [B, E].
    """
    model = config.model
    encoder = dataclasses.replace(self.tower.encoder, dtype=model.dtype, attention=model.attention)
    tower = dataclasses.replace(self.tower, encoder=encoder)
    rows = ov_sharding.batch_sharding(mesh)
    of_params = ov_sharding.tree_shardings(
      tower.logical_axes(), tower.abstract_params(), mesh, ov_models.RULES
    )
    seed = config.seed + stage_index
    augment = dataclasses.replace(
      augment_config(config), normalization=Normalization(tower.mean, tower.std)
    )
    preprocess = make_preprocess(augment, seed)

    def embed(params: Params, batch: Batch) -> jax.Array:
      one = lambda batch: tower.embed(params, preprocess(batch)["image"])
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for shardings of activations
        if config.accumulate == 1:
          return one(batch)
        parts = jax.lax.map(one, split(batch, config.accumulate, rows))
        return rearrange(parts, "k b e -> (b k) e")

    def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
      return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    params = jax.tree.map(place, self.params, of_params)
    program = jax.jit(embed, in_shardings=(of_params, rows), out_shardings=rows)
    return lambda batch: program(params, {name: batch[name] for name in ("image", "index")})


def open_tower(path: str) -> Tower:
  """Read the configuration of a model.

  Args:
    path: local workdir of a run or an import, or folder of `ov_models.save`.

  Raises:
    ValueError, OSError: there is no such model, or it has no image tower.
  """
  _, tower = _open(path)
  return tower


def read_teacher(path: str) -> Teacher:
  """Read the image tower of a model, see `open_tower`; of a run, the newest checkpoint.

  Raises:
    ValueError, OSError: there is no such model, or its files are damaged.
  """
  checkpoint, tower = _open(path)
  abstract = tower.abstract_params()
  if checkpoint is None:
    _, found = ov_models.load(path)
    tree = {"encoder": found} if set(abstract) - set(found) else found
    params = {name: tree[name] for name in abstract}
  else:
    where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    target = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), abstract
    )
    params = restore_params(checkpoint, target, "params")
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  return Teacher(tower, params, TeacherIdentity(path, _fingerprint(tower, params)))


def _open(path: str) -> tuple[Any, Tower]:
  """Return the checkpoint of a workdir, or None for a folder of `ov_models.save`; and its tower."""
  if "://" in path:
    raise ValueError("a teacher is read from a local folder; copy it to every host")
  if not os.path.isdir(path):
    raise FileNotFoundError("no such folder; expected a workdir or a folder of ov_models.save")
  if os.path.isfile(os.path.join(path, CONFIG_FILE)) and not _is_run(path):
    content = read_config(path)
    return None, _tower(config_from_dict(content["model"]), content.get("preprocess"))
  checkpoint = find_checkpoint(path)
  metadata = read_metadata(checkpoint)
  if metadata.get("model"):  # an import
    return checkpoint, _tower(config_from_dict(metadata["model"]), metadata.get("preprocess"))
  known = ModelSettings().to_dict()
  saved = {name: value for name, value in metadata["config"]["model"].items() if name in known}
  # The vocabulary does not matter for the image tower.
  model = model_config(ModelSettings.parse(known | saved, path="model"), vocab_size=1)
  given = metadata["config"].get("input", {})
  return checkpoint, _tower(model, given if "mean" in given else None)


def _is_run(path: str) -> bool:
  return os.path.isdir(os.path.join(path, "checkpoints"))


def _tower(config: Any, preprocess: dict[str, Any] | None) -> Tower:
  encoder = encoder_of(portable(config))
  both = isinstance(config, ov_models.VisionLanguageConfig) and config.text is not None
  head_dim = config.embed_dim if both and config.image_head else 0
  if preprocess is None:
    return Tower(encoder, head_dim)
  return Tower(encoder, head_dim, tuple(preprocess["mean"]), tuple(preprocess["std"]))


def _fingerprint(tower: Tower, params: Params) -> str:
  """Return 16 hex digits over configuration, normalisation and parameters."""
  config = ov_models.config_to_dict(tower.encoder)
  about = [config, tower.head_dim, list(tower.mean), list(tower.std)]
  found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for name, array in sorted(flatten_paths(params).items()):
    found.update(f"{name}{array.shape}".encode())
    found.update(np.ascontiguousarray(array).data)
  return found.hexdigest()[:16]
