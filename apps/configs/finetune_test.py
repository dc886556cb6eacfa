"""Tests that the fine-tuning recipe keeps the model, texts and preprocessing of its start."""

import dataclasses

import jax
import numpy as np
import pytest

from apps import launch
from apps.configs import base, clip_demo, finetune
from apps.exporter.importer import write_workdir
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.config import model_config
from apps.trainer.parts import build_parts
from ov_convert.release import Imported, Preprocess, TokenizerSpec
import ov_data
import ov_models
import ov_sharding

_BLOCK = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2}
TOKENIZER = ov_data.Tokenizer.train(["a red circle above a blue square"], 40, kind="words")
ENCODER = ov_models.ViTConfig(
  **_BLOCK, patch_size=4, image_size=8, position="learned", position_resize="bicubic", pool="tok",
  pre_norm=True, registers=2,
)  # fmt: skip
TEXT = ov_models.TextConfig(**_BLOCK, vocab_size=40, max_len=8, activation="gelu")
CLIP = ov_models.VisionLanguageConfig(encoder=ENCODER, text=TEXT, embed_dim=8, log_scale_init=4.0)
SIGLIP = dataclasses.replace(
  CLIP, bias_init=-12.0, image_head=False, embed_dim=16, text_head_bias=True
)
PREPROCESS = Preprocess(8, "squash", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")


def imported(folder, config):
  """Write a workdir of an import; return its path."""
  text = getattr(config, "text", None)
  words = TokenizerSpec(
    TOKENIZER.to_json(), 8, True, TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id,
    TOKENIZER.unk_id, TOKENIZER.cls_id,
  )  # fmt: skip
  params = jax.tree.map(np.asarray, ov_models.init(config, jax.random.key(0)))
  found = Imported(config, params, PREPROCESS, words if text else None)
  write_workdir(folder, found, "transformers:some-model", folder.parent)
  return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return imported(tmp_path_factory.mktemp("clip") / "w", CLIP)


def resolved(text):
  return launch.check_config(finetune.get_config(text), "clip_config")


@pytest.mark.parametrize(
  ("config", "loss"), [(CLIP, "clip"), (SIGLIP, "siglip")], ids=["clip", "siglip"]
)
def test_an_import_keeps_everything(tmp_path, config, loss):
  workdir = imported(tmp_path / "w", config)
  settings = resolved(f"init={workdir},batch_size=8,steps=20")
  assert model_config(settings.model, vocab_size=40) == config
  assert settings.input.mean == (0.5, 0.5, 0.5) and settings.input.std == (0.25, 0.25, 0.25)
  assert settings.input.fit == "squash"
  assert settings.tokenizer.path == f"{workdir}/tokenizer"
  assert not settings.tokenizer.canonical_prompts  # as in the other library
  assert settings.init_from.path == str(workdir)
  assert {name: getattr(settings.loss, name) for name in ("clip", "siglip", "caption")} == {
    "clip": float(loss == "clip"), "siglip": float(loss == "siglip"), "caption": 0.0
  }  # fmt: skip
  assert (settings.batch_size, settings.total_steps) == (8, 20)


def test_a_run_passes_on_model_losses_and_texts(tmp_path, clip):
  run = clip_demo.get_config("loss=openvision,runlocal")
  run.model.update(preset="default", embed_dim=32)
  run.input.update(mean=(0.1, 0.2, 0.3))
  saved = base.resolve(run).to_dict()
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    checkpoints.save(3, {"params": {"x": np.zeros(1)}}, {"config": saved})
  (tmp_path / "run" / "tokenizer").symlink_to(clip / "tokenizer")
  settings = resolved(f"init={tmp_path}/run,dtype=bfloat16")
  assert settings.model == dataclasses.replace(base.resolve(run).model, dtype="bfloat16")
  assert settings.loss == base.resolve(run).loss
  assert settings.input.mean == (0.1, 0.2, 0.3) and settings.input.fit == "squash"
  assert settings.input.alt_keys == ("alt",) and settings.input.caption_keys == ("txt",)
  assert not settings.input.demo.train_examples and not settings.input.data_dir


def test_an_image_tower_gets_a_new_text_tower(tmp_path):
  workdir = imported(tmp_path / "w", ENCODER)
  settings = resolved(f"init={workdir},text=Ti,mode=lit")
  found = model_config(settings.model, vocab_size=100)
  assert found.encoder == ENCODER and found.text is not None
  assert (found.image_head, found.embed_dim) == (False, 16)
  assert settings.tokenizer.path == ""  # trained on the captions


@pytest.mark.parametrize(
  ("mode", "trained", "frozen"),
  [
    ("mode=full", ["encoder/patch_embed/kernel", "text/embed/embedding", "log_scale"], []),
    ("mode=lit", ["text/blocks/mlp/up/kernel"], ["encoder/cls", "image_head/kernel"]),
    (
      "mode=lora,rank=2",
      ["lora/encoder/blocks/mlp/up/kernel/a"],
      ["log_scale", "encoder/cls"],
    ),
    (
      "last_blocks=1,layer_decay=0.5",
      ["encoder/norm/scale", "text/embed/embedding"],
      ["encoder/registers", "encoder/pre_norm/scale", "encoder/position_embedding"],
    ),
    ("res=12", ["encoder/position_embedding"], []),
  ],
)
def test_modes_set_the_trained_parameters(clip, mode, trained, frozen):
  settings = resolved(f"init={clip},batch_size=8,{mode}")
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig())
  groups = build_parts(settings, TOKENIZER, mesh).optimizer.groups
  assert {path: groups[path] for path in frozen} == dict.fromkeys(frozen, "frozen")
  assert "frozen" not in [groups[path] for path in trained]
  if mode.startswith("last_blocks"):
    assert groups["encoder/blocks/mlp/up/kernel"] == "decayed, lr x 0..0.5"
  kind = next((name for name in finetune.RATES if f"mode={name}" in mode), "full")
  assert settings.optimizer.learning_rate == finetune.RATES[kind]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "init= is missing"),
    ("init=/nowhere", "init=/nowhere: no intact checkpoint in /nowhere"),
    ("mode=half", "mode='half': expected one of full, lit, lora"),
    ("mode=lora,last_blocks=2", "last_blocks=2 needs mode=full"),
    ("mode=lora,text=Ti", "would not train the new text tower; use lit or full"),
    ("init=CLIP,text=Ti", "text=Ti is for an init that is an image tower alone"),
    ("init=CLIP,vocab_path=/v.txt", "init has its own tokenizer"),
    ("init=VIT", "init has only an image tower; add the variant of a new text tower: text=B"),
    ("init=TEXT", "init has only a text tower"),
    ("init=UNKNOWN", "has no tokenizer; give that of the model as vocab_path="),
  ],
)
def test_wrong_arguments(tmp_path, clip, text, message):
  if "VIT" in text:
    text = text.replace("VIT", str(imported(tmp_path / "w", ENCODER)))
  if "TEXT" in text:
    text = text.replace("TEXT", str(imported(tmp_path / "w", TEXT)))
  if "UNKNOWN" in text:
    workdir = imported(tmp_path / "w", CLIP)
    (workdir / "tokenizer").rename(tmp_path / "tokenizer")
    text = text.replace("UNKNOWN", str(workdir))
  with pytest.raises(ValueError, match=message) as error:
    finetune.get_config(text.replace("CLIP", str(clip)))
  assert "\n" not in str(error.value)
