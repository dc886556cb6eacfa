"""Sizes and options of a model that cannot be, and the warning of a border that no patch covers."""

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from apps.caption_task import CaptionTask
from apps.clip_task import ClipTask
from apps.configs import base
from apps.trainer import limits
from apps.trainer.parts import App, build_parts
from apps.trainer.prepare import open_model
from apps.trainer.progress import Terminal
from apps.trainer.workdir import Workdir
import ov_data
import ov_models
import ov_sharding

TOKENIZER = ov_data.Tokenizer.train(["a dog"], 20)
MESH = ov_sharding.make_mesh(ov_sharding.MeshConfig())


def make_task(**model):
  config = (
    base.clip_config() if "text" in model or "text_options" in model else base.caption_config()
  )
  config.model.vocab_size = 0
  for name, value in model.items():
    config.model[name] = ConfigDict(value) if isinstance(value, dict) else value
  make = ClipTask.from_config if "text" in config.model else CaptionTask.from_config
  return config, make(config, TOKENIZER, MESH)


def test_pixels_of_the_border_are_ignored_and_the_note_counts_them():
  """A tower with patches of 16 px reads 32 x 32 of 40 x 40 pixels."""
  _, task = make_task(encoder="mu/16", image_size=40)
  encoder = task.model.encoder
  params = ov_models.init(encoder, jax.random.key(0))
  pooled = jax.jit(lambda x: ov_models.bind(encoder, params)(x).pooled)
  image = np.random.default_rng(0).normal(size=(1, 40, 40, 3)).astype(np.float32)
  other = image.copy()
  other[:, 32:], other[:, :, 32:] = 99, -99
  inside = image.copy()
  inside[:, 31, 31] = 99
  np.testing.assert_array_equal(pooled(image), pooled(other))
  assert not np.array_equal(pooled(image), pooled(inside))
  assert limits.border_note(task) == (
    "warning: config.model.image_size=40 is not a multiple of the patch size 16: the last 8 rows "
    "and columns (36.0% of the pixels) are ignored; the nearest multiples are 32 and 48"
  )


@pytest.mark.parametrize(("encoder", "size"), [("mu/16", 32), ("So400m/14", 224)])
def test_no_note_where_patches_cover_the_image(encoder, size):
  assert limits.border_note(make_task(encoder=encoder, image_size=size)[1]) is None


def test_note_of_the_released_size_that_is_not_divisible():
  note = limits.border_note(make_task(encoder="So400m/14", text="So400m", image_size=384)[1])
  assert "the last 6 rows and columns (3.1% of the pixels)" in note
  assert note.endswith("the nearest multiples are 378 and 392")


def test_a_run_prints_the_note_of_each_stage(tmp_path, capsys):
  config = base.caption_config()
  config.batch_size, config.model.encoder, config.model.decoder = 8, "mu/16", "Ti"
  config.model.update(vocab_size=0, image_size=40)
  config.stages = ({"name": "small"}, {"name": "large", "model.image_size": 48})
  config.compile_cache = ""
  TOKENIZER.save(tmp_path / "tokenizer")
  app = App(CaptionTask.from_config, lambda held_out: None)
  open_model(config, Workdir(tmp_path), app, Terminal(active=True))
  printed = capsys.readouterr()
  lines = [line for line in (printed.out + printed.err).splitlines() if "warning" in line]
  assert len(lines) == 1 and "small: warning: config.model.image_size=40 is not a" in lines[0]


def test_too_many_patches():
  config, _ = make_task(encoder="mu/1", image_size=257)
  with pytest.raises(ValueError, match="image_size=257 with patches of 1 px makes 66,049 patches"):
    build_parts(config, CaptionTask.from_config, TOKENIZER, MESH)


def test_a_batch_larger_than_memory():
  config, task = make_task(image_size=4096)
  limits.check_batch_memory(config, make_task(image_size=32)[1])
  config.batch_size = 2**22
  with pytest.raises(ValueError, match="config.batch_size=4194304 at 4096 px needs 196,6.* GiB on"):
    limits.check_batch_memory(config, task)


@pytest.mark.parametrize(
  ("model", "said"),
  [
    ({"decoder_options": {"x": 1}}, "config.model.decoder_options has 'x'; it may have width, de"),
    ({"encoder_options": {"dpeth": 1}}, "encoder_options has 'dpeth'; did you mean 'depth'"),
    ({"encoder_options": {"depth": "three"}}, "encoder_options.depth='three'; expected a whole"),
    ({"encoder_options": {"depth": 10**12}}, "depth=1000000000000; expected at most 1,024"),
    ({"encoder_options": {"width": 2**40}}, "width=1099511627776; expected at most 131,072"),
    ({"encoder_options": {"num_heads": 0}}, "num_heads=0; expected at least 1"),
    ({"encoder_options": {"scan": "yes"}}, "scan='yes'; expected True or False"),
    ({"encoder_options": {"pool": 3}}, "pool=3; expected one of gap, tok, map"),
    ({"encoder_options": {"mask_ratio": "a"}}, "mask_ratio='a'; expected a finite number"),
    ({"encoder_options": {"image_size": 64}}, "'image_size'; set config.model.image_size instead"),
    ({"decoder_options": {"max_len": 64}}, "'max_len'; set config.model.token_len"),
    ({"text_options": {"pool": "max"}}, "text_options.pool='max'; expected one of last, first"),
    ({"text_options": {"pad_id": 10**9}}, "pad_id=1000000000; expected at most"),
    ({"text": "Ti", "decoder_options": {"mask": "causal"}}, "decoder_options has 'mask'"),
    ({"encoder": "Ti/0"}, "patch_size=0"),
    ({"encoder": f"Ti/{10**30}"}, "is no number of at most 8 digits"),
    ({"encoder": "Ti/²"}, "no number"),
    ({"encoder": ""}, "ViT variant='' is unknown"),
    ({"preset": "x"}, "preset='x'"),
  ],
)  # fmt: skip
def test_options_that_cannot_be(model, said):
  with pytest.raises(ValueError, match=said):
    make_task(**model)
