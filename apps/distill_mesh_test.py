"""Tests of distillation: the teacher's embeddings, its bits, devices, accumulation, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.configs import base
from apps.trainer.augment import make_preprocess
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.config import augment_config
from apps.trainer.parts import build_parts, build_step
from apps.trainer.state import init_state
from apps.trainer.stored_teacher import add_teacher, open_teacher
from apps.trainer.teacher import open_tower, read_teacher
from ov_convert.release import portable
import ov_data
import ov_models
import ov_sharding

ROWS = 16
TOKENIZER = ov_data.Tokenizer.train(["a red square", "a blue dot"], 40)
BLOCK = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}
PREPROCESS = {"image_size": 32, "fit": "squash", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
TOWERS = ov_models.VisionLanguageConfig(
  encoder=ov_models.ViTConfig(**BLOCK | {"width": 48, "num_heads": 3}, patch_size=8, image_size=32),
  text=ov_models.TextConfig(**BLOCK, vocab_size=50, max_len=7),
  embed_dim=24,
)


def make_params(config, seed=0):
  """Return params without zeros, so that every one of them affects the output."""
  draw = np.random.default_rng(seed)
  fill = lambda p: (1 + draw.normal(size=p.shape)).astype(np.float32) / 8
  return jax.tree.map(fill, ov_models.abstract_params(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return the folder of a teacher with two towers and its own normalisation."""
  path = tmp_path_factory.mktemp("teacher") / "saved"
  ov_models.save(path, TOWERS, make_params(TOWERS), extra={"preprocess": PREPROCESS})
  return str(path)


def make_config(more, **settings):
  config = base.clip_config()
  config.model.update(encoder="mu/16", image_size=32, vocab_size=0, token_len=9, decoder="")
  config.model.encoder_options, config.model.text_options = BLOCK, BLOCK
  config.batch_size, config.optimizer.learning_rate = ROWS, 1e-3
  settings = {"loss.caption": 0.0, "loss.more": more, "optimizer.eps": 1.0} | settings
  return base.resolve(config).with_settings(settings)


def one_device():
  return ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])


def make_batch(task, seed=0):
  """Return random images and texts; every fourth row is invalid."""
  draw = np.random.default_rng(seed)
  batch = {
    "image": draw.integers(0, 256, (ROWS, 32, 32, 3), np.uint8),
    "valid": np.arange(ROWS) % 4 != 1,
    "index": np.arange(ROWS, dtype=np.int32) + ROWS * seed,
  }
  for name in task.text_specs or {"ids": None}:
    length = task.text_specs[name].length if task.text_specs else task.text_len
    batch[name] = draw.integers(5, TOKENIZER.vocab_size, (ROWS, length), np.int32)
  return batch


def train(config, devices=1, steps=2):
  """Return the params after some steps, the metrics of each step, and the teacher."""
  mesh = ov_sharding.make_mesh(
    ov_sharding.MeshConfig(fsdp=2 if devices > 1 else 1), jax.devices()[:devices]
  )
  parts = build_parts(config, TOKENIZER, mesh)
  teacher = open_teacher(parts.task, {})
  add = add_teacher(teacher, config, mesh, 0)
  state = init_state(parts.task.init, jax.random.key(0), parts.optimizer.tx, parts.shardings)
  step = build_step(config, parts, mesh, 0)
  lines = []
  for number in range(steps):
    host = make_batch(parts.task, number)
    batch = add(jax.device_put(host, ov_sharding.batch_sharding(mesh)), host)
    assert not batch["teacher"].sharding.is_fully_replicated or devices == 1
    state, metrics = step(state, batch)
    lines.append({name: float(value) for name, value in metrics.items()})
  return jax.device_get(state), lines, teacher


MIXES = {  # names of further losses, and whether the contrastive loss is used
  "a mean over rows": (("distill",), 0.0),
  "both": (("distill", "affinity"), 1.0),
}


def mix_config(folder, mix, **settings):
  names, clip = MIXES[mix]
  more = {name: {"weight": 0.5, "teacher": folder} for name in names}
  return make_config(more, **{"loss.clip": clip} | settings)


@functools.cache
def trained(folder, mix, devices=1, accumulate=1):
  return train(mix_config(folder, mix, accumulate=accumulate), devices)


@pytest.mark.parametrize("mix", MIXES)
def test_devices_and_accumulation_do_not_change_training(folder, mix):
  expected, got = trained(folder, mix), trained(folder, mix, devices=8, accumulate=2)
  # different float32 summation order.
  chex.assert_trees_all_close(got[0]["params"], expected[0]["params"], rtol=1e-4, atol=1e-6)
  for a, b in zip(got[1], expected[1], strict=True):
    for name in ("loss", "grad_norm", "weight"):
      np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)


def test_teacher_keeps_its_bits_and_is_not_in_the_state(folder):
  state, lines, teacher = trained(folder, "both")
  before = read_teacher(folder)
  chex.assert_trees_all_equal(teacher.params, before.params)
  assert teacher.identity == before.identity
  task = build_parts(mix_config(folder, "both"), TOKENIZER, one_device()).task
  own = state["params"]["losses"]
  assert own.keys() == {"distill"} and own["distill"]["kernel"].shape == (32, 24)
  start = task.init(jax.random.key(0))["losses"]
  assert np.abs(own["distill"]["kernel"] - start["distill"]["kernel"]).max() > 0
  model = jax.tree.structure(ov_models.abstract_params(task.model))
  assert jax.tree.structure(task.model_params(state["params"])) == model
  expected = lines[0]["clip_loss"] + 0.5 * (lines[0]["distill_loss"] + lines[0]["affinity_loss"])
  np.testing.assert_allclose(lines[0]["loss"], expected, rtol=1e-6)


def test_initial_params_of_the_model_do_not_depend_on_the_loss(folder):
  configs = make_config({}, **{"loss.clip": 1.0}), mix_config(folder, "both")
  tasks = [build_parts(config, TOKENIZER, one_device()).task for config in configs]
  plain, with_teacher = (task.init(jax.random.key(3)) for task in tasks)
  chex.assert_trees_all_equal(tasks[1].model_params(with_teacher), plain)


@pytest.mark.parametrize("jitter", [False, True])
def test_embeddings_are_those_of_the_augmented_pixels(folder, jitter):
  """The teacher reads the pixels of the student, normalised with its own mean and deviation."""
  config = mix_config(folder, "both", **{"input.color_jitter": jitter})
  mesh = one_device()
  batch = make_batch(build_parts(config, TOKENIZER, mesh).task, 3)
  found = read_teacher(folder).embedder(config, mesh, 0)(jax.device_put(batch))
  images = make_preprocess(augment_config(config), config.seed)(batch)["image"]
  mean, std = (jnp.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
  pixels = images * std + mean  # of the student, in [0, 1]
  images = (pixels - jnp.array(PREPROCESS["mean"])) / jnp.array(PREPROCESS["std"])
  model = ov_models.bind(*ov_models.load(folder))
  expected = model.encode_image(images).unit
  # float32 rounding of the pixels, of order 1e-7, through one block.
  np.testing.assert_allclose(found, expected, atol=2e-5)
  other = read_teacher(folder).embedder(config, mesh, 1)(jax.device_put(batch))
  assert (np.abs(found - other).max() > 1e-3) == jitter  # another stage, other draws


def test_workdir_and_export_are_the_same_teacher(folder, tmp_path):
  params = ov_models.load(folder)[1]
  metadata = {
    "model": ov_models.config_to_dict(portable(TOWERS)),
    "preprocess": PREPROCESS | {"interpolation": "bilinear"},
  }
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(0, {"params": params}, metadata)
  fingerprint = lambda path: read_teacher(str(path)).identity.fingerprint
  assert fingerprint(tmp_path) == fingerprint(folder)
  ov_models.save(tmp_path / "plain", TOWERS, params)  # normalised as in this repository
  params["image_head"]["kernel"] = params["image_head"]["kernel"] + 1e-3
  ov_models.save(tmp_path / "other", TOWERS, params, extra={"preprocess": PREPROCESS})
  others = [fingerprint(path) for path in (folder, tmp_path / "plain", tmp_path / "other")]
  assert len(set(others)) == 3


def test_image_tower_alone(tmp_path):
  encoder = TOWERS.encoder
  params = make_params(encoder)
  ov_models.save(tmp_path, encoder, params)
  tower = open_tower(str(tmp_path))
  assert tower.dim == 48
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  pooled = ov_models.bind(encoder, params)(images).pooled
  expected = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
  # float32 rounding: 1e-8 is added to the norm.
  np.testing.assert_allclose(
    tower.embed(read_teacher(str(tmp_path)).params, images), expected, atol=1e-6
  )


@pytest.mark.parametrize(
  ("fields", "settings", "message"),
  [
    ({}, {}, "teacher='' and embeddings=''; set exactly one"),
    ({"teacher": "a", "embeddings": "b"}, {}, "teacher='a' and embeddings='b'; set exactly one"),
    ({"teacher": "/no/such"}, {}, "distill.teacher=/no/such: no such folder; expected a workdir"),
    ({"teacher": "gs://b/x"}, {}, "distill.teacher=gs://b/x: a teacher is read from a"),
    ({"embeddings": "/no/such"}, {}, "distill.embeddings=/no/such: it has no teacher.json"),
    (
      {"teacher": "FOLDER"},
      {"model.image_size": 48},
      "reads images of 32 px, and the run has config.model.image_size=48; export it with",
    ),
    (
      {"teacher": "FOLDER"},
      {"loss.more": {"affinity": {"weight": 1.0, "teacher": "x"}}},
      "two teachers, .*set the same for both losses",
    ),
  ],
)  # fmt: skip
def test_invalid_teachers(folder, fields, settings, message):
  fields = {name: folder if value == "FOLDER" else value for name, value in fields.items()}
  more = {"distill": {"weight": 1.0} | fields} | settings.pop("loss.more", {})
  mesh = one_device()
  with pytest.raises(ValueError, match=message) as caught:
    build_parts(make_config(more, **settings), TOKENIZER, mesh)
  assert "\n" not in str(caught.value)


def test_temperature_must_be_positive(folder):
  more = {"affinity": {"weight": 1.0, "teacher": folder, "temperature": 0.0}}
  with pytest.raises(ValueError, match=r"affinity.temperature=0.0; expected a number above 0"):
    build_parts(make_config(more), TOKENIZER, one_device())
