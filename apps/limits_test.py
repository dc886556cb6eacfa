"""Tests of invalid model sizes and options, and of the warning about ignored image borders."""

import jax
import numpy as np
import pytest

from apps.configs import base
from apps.trainer import config as config_lib
from apps.trainer import limits
from apps.trainer.parts import build_parts
from apps.trainer.prepare import open_model
from apps.trainer.progress import Terminal
from apps.trainer.workdir import Workdir
import ov_data
import ov_models
import ov_sharding

TOKENIZER = ov_data.Tokenizer.train(["a dog"], 20)
MESH = ov_sharding.make_mesh(ov_sharding.MeshConfig())


def make_task(tokenizer=TOKENIZER, **model):
  config = (
    base.clip_config() if "text" in model or "text_options" in model else base.caption_config()
  )
  config.model.vocab_size = 0
  config = base.resolve(config).with_settings({f"model.{k}": v for k, v in model.items()})
  return config, config_lib.make_task(config, tokenizer, MESH)


def test_border_note_counts_ignored_pixels():
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
def test_no_border_note_without_border(encoder, size):
  assert limits.border_note(make_task(encoder=encoder, image_size=size)[1]) is None


def test_border_note_of_released_size():
  note = limits.border_note(make_task(encoder="So400m/14", text="So400m", image_size=384)[1])
  assert "the last 6 rows and columns (3.1% of the pixels)" in note
  assert note.endswith("the nearest multiples are 378 and 392")


def test_run_prints_border_note_per_stage(tmp_path, capsys):
  config, _ = make_task(encoder="mu/16", decoder="Ti", image_size=40)
  stages = ({"name": "small"}, {"name": "large", "model.image_size": 48})
  config = config.with_settings({"batch_size": 8, "compile_cache": "", "stages": stages})
  TOKENIZER.save(tmp_path / "tokenizer")
  open_model(config, Workdir(tmp_path), Terminal(active=True))
  printed = capsys.readouterr()
  lines = [line for line in (printed.out + printed.err).splitlines() if "warning" in line]
  assert len(lines) == 1 and "small: warning: config.model.image_size=40 is not a" in lines[0]


def test_too_many_patches():
  config, _ = make_task(encoder="mu/1", image_size=257)
  with pytest.raises(ValueError, match="image_size=257 with patches of 1 px makes 66,049 patches"):
    build_parts(config, TOKENIZER, MESH)


def test_batch_larger_than_memory():
  config, task = make_task(image_size=4096)
  limits.check_batch_memory(config, make_task(image_size=32)[1])
  config = config.with_settings({"batch_size": 2**22})
  with pytest.raises(ValueError, match="config.batch_size=4194304 at 4096 px needs 196,6.* GiB on"):
    limits.check_batch_memory(config, task)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    ({"decoder_options": {"x": 1}}, "config.model.decoder_options has 'x'; valid fields are width"),
    ({"encoder_options": {"dpeth": 1}}, "encoder_options has 'dpeth'; did you mean 'depth'"),
    ({"encoder_options": {"depth": "three"}}, "encoder_options.depth='three'; expected an integer"),
    ({"encoder_options": {"depth": 10**12}}, "depth=1000000000000; expected at most 1,024"),
    ({"encoder_options": {"width": 2**40}}, "width=1099511627776; expected at most 131,072"),
    ({"encoder_options": {"num_heads": 0}}, "num_heads=0; expected at least 1"),
    ({"encoder_options": {"scan": "yes"}}, "scan='yes'; expected True or False"),
    ({"encoder_options": {"pool": 3}}, "pool=3; expected one of gap, mean, tok, last, map, attend"),
    ({"encoder_options": {"mask_ratio": "a"}}, "mask_ratio='a'; expected a finite number"),
    ({"encoder_options": {"rotary_base": 0}}, "rotary_base=0; expected"),
    ({"encoder_options": {"registers": 10**6}}, "registers=1000000; expected at most 4,096"),
    ({"encoder_options": {"image_size": 64}}, "'image_size'; set config.model.image_size instead"),
    ({"decoder_options": {"max_len": 64}}, "'max_len'; set config.model.token_len"),
    ({"text_options": {"pool": "max"}}, "text_options.pool='max'; expected one of last, first"),
    ({"text_options": {"pad_id": 10**9}}, "pad_id=1000000000; expected at most"),
    ({"text": "Ti", "decoder_options": {"mask": "causal"}}, "decoder_options has 'mask'"),
    ({"encoder": "Ti/0"}, "patch_size=0"),
    ({"encoder": f"Ti/{10**30}"}, "is not an integer of at most 8 digits"),
    ({"encoder": "Ti/²"}, "is not an integer of at most 8 digits"),
    ({"encoder": ""}, "ViT variant='' is unknown"),
    ({"preset": "x"}, "preset='x'"),
  ],
)  # fmt: skip
def test_invalid_options(model, message):
  with pytest.raises(ValueError, match=message):
    make_task(**model)


def test_tokenizer_of_siglip(tmp_path):
  """Texts without [bos] and [CLS] are read at their last column, where padding is attended to."""
  path = tmp_path / "tokenizer.json"
  path.write_text(TOKENIZER.to_json(), "utf-8")
  tokenizer = ov_data.Tokenizer.from_file(path, special={"pad": "[PAD]", "eos": "[eos]"})
  given = {
    "model.text": "Ti", "model.decoder": "", "model.vocab_size": 0, "loss.caption": 0.0,
    "model.text_options": {"padding": "attend"},
  }  # fmt: skip
  config = base.resolve(base.clip_config()).with_settings(given)
  task = config_lib.make_task(config, tokenizer, MESH)
  processor = task.text_processor(tokenizer)
  assert (processor.append_cls, processor.pool, processor.padding) == (False, "last", "attend")
  assert task.specs is not None and not dict(task.specs)["alt_ids"].append_cls
  config = config.with_settings({"model.text_options": {}})
  with pytest.raises(ValueError, match='no .CLS. to put there; .* {"padding": "attend"} as in Si'):
    config_lib.make_task(config, tokenizer, MESH)
  with pytest.raises(ValueError, match="the tokenizer have no begin token, which captions need"):
    make_task(tokenizer=tokenizer)
