"""Tests that invalid fields and damaged model files raise one-line errors before any work."""

import json

import pytest

import ov_models
from ov_models import files
from ov_models.testing import random_params

SMALL = {"width": 8, "depth": 1, "mlp_dim": 16, "num_heads": 2}
VIT = ov_models.ViTConfig(**SMALL, patch_size=4, image_size=8)
KINDS = {
  "vit": (ov_models.ViTConfig, SMALL | {"patch_size": 4, "image_size": 8}),
  "text": (ov_models.TextConfig, SMALL | {"vocab_size": 11, "max_len": 5}),
  "decoder": (ov_models.DecoderConfig, SMALL | {"vocab_size": 11, "max_len": 5}),
  "queries": (ov_models.QueryDecoderConfig, SMALL | {"vocab_size": 11, "num_queries": 5}),
}
WRONG = [None, "x", "8", 0, -1, 1.5, float("nan"), float("inf"), True, [], {}, (), 10**12, 10**400]

# Values of WRONG that some fields accept.
FLAGS = ("scan", "parallel", "out_bias", "mlp_bias", "qk_norm", "attention_gate")
FLAGS += ("cls_token", "patch_bias", "patch_norm", "pre_norm")
VALID = {
  "pad_id": (0,), "mask_ratio": (0,), "drop_path": (0,), "registers": (0,), "rotary_base": (1.5,),
  "layer_scale": (None, 0, -1, 1.5), "rotary_rescale": (None,), "pool_heads": (None,),
  "pool_mlp_dim": (None,),
}  # fmt: skip


def one_line(error, *parts):
  text = str(error.value)
  assert "\n" not in text and len(text) < 500
  assert all(part in text for part in parts), text


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_field_checks_its_type(kind, value):
  make, fields = KINDS[kind]
  optional = {f: None for f in make.__dataclass_fields__ if f not in fields}
  for name in [*fields, *optional]:
    if any(value is valid for valid in VALID.get(name, [True] if name in FLAGS else [])):
      continue
    with pytest.raises(ValueError) as error:
      make(**(fields | {name: value}))
    one_line(error, name)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: ov_models.ViTConfig.from_name(7), "ViT variant=7"),
    (lambda: ov_models.ViTConfig.from_name("L/" + "9" * 5000), "patch size"),
    (lambda: ov_models.ViTConfig.from_name("mu/16", colour=1), "field of ViTConfig='colour'"),
    (lambda: ov_models.TextConfig.from_name(None), "text variant=None"),
    (lambda: ov_models.DecoderConfig.from_name(["L"]), "decoder variant=['L']"),
    (
      lambda: ov_models.VisionLanguageConfig.from_names("mu", "Ti", None, decoder_kind=[]),
      "decoder_k",
    ),
    (
      lambda: ov_models.VisionLanguageConfig.from_names("mu", "Ti", "Ti", decoder_options={"x": 1}),
      "x",
    ),
    (lambda: ov_models.ViTConfig.from_name("mu/1", 2**20), "patches; expected at most"),
    (lambda: ov_models.VisionLanguageConfig(encoder=None, decoder=None), "encoder is a NoneType"),
    (
      lambda: ov_models.VisionLanguageConfig(encoder=VIT, text=VIT, decoder=None, embed_dim=8),
      "text is a ViTConfig; expected a TextConfig",
    ),
  ],
)
def test_names_options_and_parts(build, message):
  with pytest.raises(ValueError) as error:
    build()
  one_line(error, message)


@pytest.mark.parametrize(
  "text",
  [
    "[]",
    "7",
    "{",
    '{"format": 1e400, "library": "openvision", "model": {"kind": "ViT"}}',
    '{"format": [], "library": "openvision", "model": {"kind": "ViT"}}',
    '{"format": 1, "library": ["openvision"], "model": {"kind": "ViT"}}',
    '{"format": 1, "library": "openvision", "model": []}',
    '{"format": 1, "library": "openvision", "model": {"kind": []}}',
    '{"format": 1, "library": "openvision", "model": {"kind": "ViT"}}',
    '{"format": 1, "library": "openvision", "model": {"kind": "ViT", "kind": "ViT"}}',
    '{"format": 1, "library": "openvision", "model": {"kind": "Decoder", "width": 8}}',
    "[" * 100_000,
    "\x00",
  ],
)
def test_malformed_configs(tmp_path, text):
  ov_models.save(tmp_path, VIT, random_params(VIT))
  (tmp_path / files.CONFIG_FILE).write_text(text)
  with pytest.raises(ValueError) as error:
    ov_models.load(tmp_path)
  one_line(error, files.CONFIG_FILE)


@pytest.mark.parametrize("field", ["width", "depth", "patch_size", "num_heads", "mask_ratio"])
@pytest.mark.parametrize("value", [10**12, -1, "8", None, [8]])
def test_sizes_in_a_file_are_bounded(tmp_path, field, value):
  ov_models.save(tmp_path, VIT, random_params(VIT))
  file = tmp_path / files.CONFIG_FILE
  content = json.loads(file.read_text())
  content["model"][field] = value
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError) as error:
    ov_models.load(tmp_path)
  one_line(error, files.CONFIG_FILE, field)


def test_decoder_alone_is_not_a_model(tmp_path):
  ov_models.save(tmp_path, VIT, random_params(VIT))
  file = tmp_path / files.CONFIG_FILE
  content = json.loads(file.read_text())
  content["model"] = files.config_to_dict(ov_models.DecoderConfig.from_name("Ti"))
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="DecoderConfig is a part of a model"):
    ov_models.load(tmp_path)


def header(tmp_path, change):
  """Write a model with a modified safetensors header and unchanged data."""
  ov_models.save(tmp_path, VIT, random_params(VIT))
  file = tmp_path / files.WEIGHTS_FILE
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  text = change(data[8 : 8 + size].decode()).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
  "change",
  [
    lambda text: text.replace('"F32"', '"I32"', 1),
    lambda text: text.replace('"cls"', '"cls2"'),
    lambda text: text.replace('"cls"', '"norm/scale"'),
    lambda text: text.replace("[8]", "[8,1]", 1),
    lambda text: text.replace("[8]", "[99999999999999999999]", 1),
    lambda text: text.replace("{", "[", 1),
    lambda text: "",
  ],
)
def test_damaged_headers(tmp_path, change):
  header(tmp_path, change)
  with pytest.raises(ValueError) as error:
    ov_models.load(tmp_path)
  one_line(error, files.WEIGHTS_FILE)


def test_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
  params = random_params(VIT)
  ov_models.save(tmp_path, VIT, params)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="No space left"):
    ov_models.save(tmp_path, VIT, random_params(VIT, seed=1))
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
