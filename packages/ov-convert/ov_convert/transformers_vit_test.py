"""Tests of the transformers format: names, shapes, round trips, and outputs of the library."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import name_map as maps
from ov_convert import parity, testing, transformers_vit
from ov_convert.release import Preprocess
import ov_models
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig

VIT = ViTConfig(width=16, depth=3, mlp_dim=40, num_heads=2, patch_size=4, image_size=14)
TOK = dataclasses.replace(VIT, pool="tok", position="learned")
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=20, max_len=testing.LENGTH)
CLIP_TEXT = dataclasses.replace(TEXT, mask="causal", pool="argmax", padding="attend")
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=10, bias_init=-3.0)
DECODER = ov_models.DecoderConfig(
  width=8, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_len=testing.LENGTH
)
CONFIGS = {
  "towers": TOWERS,
  "tok, learned, causal": VisionLanguageConfig(
    encoder=TOK, text=CLIP_TEXT, decoder=None, embed_dim=10
  ),
  "tower": VIT,
  "tok": dataclasses.replace(VIT, pool="tok"),
  "captioner": VisionLanguageConfig(encoder=VIT, decoder=DECODER),
}


def source(name, **fields):
  """A release of CONFIGS; [eos] has the largest id where that is what is pooled."""
  config = CONFIGS[name]
  text = getattr(config, "text", None)
  words = testing.words(append_cls=text is None or text.pool == "last")
  return testing.release(config, **({"words": words} | fields))


def without_key_bias(params):
  """Parameters after a round trip: biases without effect on the softmax are 0."""
  flat = maps.flatten(params)
  return maps.unflatten(
    {n: np.zeros_like(v) if n.endswith("blocks/attn/key/bias") else v for n, v in flat.items()}
  )


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, dtype, tmp_path):
  model = source(name, dtype=dtype, preprocess=Preprocess(14, "squash", (0.5, 0.4, 0.3)))
  transformers_vit.write(tmp_path / "model", model)
  found = transformers_vit.read(tmp_path / "model")
  assert found.preprocess == model.preprocess
  assert found.notes == ()
  if model.text is None:
    assert found.config == model.encoder
    keeps = without_key_bias(model.image_params) if name != "tok" else model.image_params
    assert_same(found.params, keeps)
    return
  bias = model.params.get("bias")
  assert found.config == dataclasses.replace(
    model.config, bias_init=None if bias is None else float(bias)
  )
  expected = dict(model.params)
  if model.encoder.pool == "gap":
    expected["encoder"] = without_key_bias(model.params["encoder"])
  assert_same(found.params, expected)
  assert dataclasses.replace(found.words, tokenizer_json="") == dataclasses.replace(
    model.words, tokenizer_json=""
  )
  assert found.words.vocabulary == model.words.vocabulary


def test_key_biases_have_no_effect():
  """Why they may be dropped: the tower computes the same without, but for rounding."""
  params = testing.random_params(VIT)
  pixels = np.random.default_rng(2).normal(size=(2, 14, 14, 3)).astype(np.float32)
  found = [ov_models.bind(VIT, p)(pixels) for p in (params, without_key_bias(params))]
  # 2e-6 of the largest entry: the sums of up to 40 float32 products differ by their rounding.
  for ours, theirs in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1])):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(ours).max())
  # Other biases do have one.
  params["blocks"]["attn"]["query"]["bias"] = np.zeros((3, 16), np.float32)
  other = ov_models.bind(VIT, params)(pixels)
  assert np.abs(other.tokens - found[0].tokens).max() > 1e-3


def test_tensors_land_where_they_belong(tmp_path):
  model = source("towers")
  transformers_vit.write(tmp_path, model)
  flat = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  encoder = model.params["encoder"]
  blocks = encoder["blocks"]
  layer = "beit.encoder.layer.2"
  np.testing.assert_array_equal(
    flat[f"{layer}.attention.attention.key.weight"], blocks["attn"]["key"]["kernel"][2].T
  )
  np.testing.assert_array_equal(
    flat[f"{layer}.intermediate.dense.weight"], blocks["mlp"]["up"]["kernel"][2].T
  )
  np.testing.assert_array_equal(flat[f"{layer}.layernorm_after.bias"], blocks["norm2"]["bias"][2])
  conv = flat["beit.embeddings.patch_embeddings.projection.weight"]
  assert conv.shape == (16, 3, 4, 4)
  assert conv[5, 2, 1, 3] == encoder["patch_embed"]["kernel"][1, 3, 2, 5]
  np.testing.assert_array_equal(flat["beit.pooler.layernorm.weight"], encoder["norm"]["scale"])
  np.testing.assert_array_equal(flat["classifier.weight"], model.params["image_head"]["kernel"].T)
  positions = flat["beit.embeddings.position_embeddings"]
  np.testing.assert_array_equal(positions[0, 1:], ov_models.sincos2d(3, 3, 16))
  assert not positions[0, 0].any()
  # 15 a layer; cls, patches and their bias, positions, norm; head and its bias.
  assert len(flat) == 15 * 3 + 6 + 2
  assert f"{layer}.attention.attention.key.bias" not in flat


def test_16_bit_files_keep_fixed_tensors_in_float32(tmp_path):
  transformers_vit.write(tmp_path, source("tower", dtype="bfloat16"))
  with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
    dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
  assert {name for name, dtype in dtypes.items() if dtype != "BF16"} == {
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.bias",
  }


def test_sizes_of_published_towers():
  """Of widths whose heads are no power of two, too; nothing but the fixed tensors is allocated."""
  for size, image_size, tensors in (
    ("Ti/16", 160, 186),
    ("B/16", 224, 186),
    ("So400m/14", 224, 411),
  ):
    config = ViTConfig.from_name(size, image_size)
    found = transformers_vit.name_map(config)
    found.check_complete(config)
    assert len(found.entries) + len(found.fixed) == tensors  # 15 a layer, and 6


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"encoder": dataclasses.replace(VIT, pool="map")}, ["encoder.pool='map'"]),
    (
      {
        "encoder": dataclasses.replace(VIT, pool="map"),
        "text": dataclasses.replace(TEXT, pool="mean"),
      },
      ["encoder.pool='map'", "text.mask='full' with text.pool='mean'"],
    ),
    (
      {"text": dataclasses.replace(TEXT, mask="causal")},
      ["text.mask='causal' with text.pool='last'", "mask='causal' with pool='argmax'"],
    ),
  ],
)
def test_models_without_a_class_are_rejected(changes, named, tmp_path):
  model = testing.release(dataclasses.replace(TOWERS, **changes))
  for refuse in (
    lambda: transformers_vit.check(model), lambda: transformers_vit.write(tmp_path / "x", model)
  ):  # fmt: skip
    with pytest.raises(ValueError, match="transformers has no class for this model") as caught:
      refuse()
    assert all(part in str(caught.value) for part in named)
  assert not list(tmp_path.iterdir())


def test_a_text_tower_needs_a_tokenizer(tmp_path):
  with pytest.raises(ValueError, match="words=None"):
    transformers_vit.write(tmp_path / "x", source("towers", words=None))


def test_tensors_that_do_not_fit_are_named(tmp_path):
  transformers_vit.write(tmp_path, source("towers"))
  file = tmp_path / "model.safetensors"
  flat = safetensors.numpy.load_file(file)
  flat["beit.stranger"] = flat.pop("beit.encoder.layer.1.output.dense.bias")
  flat["classifier.bias"] += 1
  flat["beit.pooler.layernorm.bias"] = np.zeros(5, np.float32)
  safetensors.numpy.save_file(flat, file)
  with pytest.raises(ValueError) as caught:
    transformers_vit.read(tmp_path)
  for part in (
    "missing beit.encoder.layer.1.output.dense.bias", "unexpected beit.stranger",
    "classifier.bias differs by 1.0e+00", "beit.pooler.layernorm.bias is (5,), expected (16,)",
  ):  # fmt: skip
    assert part in str(caught.value)


def test_invalid_logit_scales_are_rejected(tmp_path):
  transformers_vit.write(tmp_path, source("towers"))
  config = tmp_path / "config.json"
  content = json.loads(config.read_text())
  config.write_text(json.dumps(content | {"openvision": {"logit_scale": -1, "logit_bias": 0}}))
  with pytest.raises(ValueError, match="expected logit_scale above 0"):
    transformers_vit.read(tmp_path)


# The library's arithmetic against ours. 1e-5 of the largest entry: sums of up to 40 products in
# float32 differ by 2e-6 in the order of their terms.
RUNS = {
  "towers": dict(),
  "tok, learned, causal": dict(dtype="float16"),
  # Trained at 14 pixels, exported for 23: positions are recomputed.
  "captioner": dict(
    config=VisionLanguageConfig(
      encoder=dataclasses.replace(VIT, image_size=23), decoder=DECODER
    ),
    params=testing.random_params(CONFIGS["captioner"]),
    preprocess=Preprocess(23, "squash"),
    dtype="bfloat16",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_library_computes_the_same(name, tmp_path):
  fields = dict(RUNS[name])
  model = testing.release(fields.pop("config"), **fields) if "config" in fields else source(
    name, **fields
  )  # fmt: skip
  transformers_vit.write(tmp_path / "model", model)
  testing.write_probe(tmp_path / "probe", model)
  ours = testing.ours(model, tmp_path / "probe")
  theirs = testing.run("run_transformers.py", tmp_path / "model", tmp_path / "probe")
  rows = parity.compare(ours, theirs, required=ours)
  for row in rows:
    assert row.ok and row.measured <= row.tolerance / 10, parity.explain(row)
  assert len(rows) == len(ours)
  size = model.encoder.image_size
  pixels = theirs.arrays["image/pixels"]
  assert pixels.shape == (3, size, size, 3)
  assert theirs.facts["image/class"] == ("ViTModel" if model.encoder.pool == "tok" else "BeitModel")
  # The third image already has this size, so it is only normalized.
  raw = (tmp_path / "probe/images/2.ppm").read_bytes()[-3 * size * size :]
  picture = np.frombuffer(raw, np.uint8).reshape(size, size, 3) / 255
  mean, std = np.array(model.preprocess.mean), np.array(model.preprocess.std)
  np.testing.assert_allclose(pixels[2], (picture - mean) / std, atol=1e-5)
  if name == "towers":  # padding must affect the result, or masking it has no effect
    seen = dataclasses.replace(model.config, text=dataclasses.replace(TEXT, padding="attend"))
    other = ov_models.bind(seen, model.params)
    other = other.encode_text(testing.expected_ids(model.words)).unit
    assert np.abs(ours["text/embedding"] - other).max() > 1e-2


def test_mistakes_show(tmp_path):
  model = source("towers")
  transformers_vit.write(tmp_path / "model", model)
  testing.write_probe(tmp_path / "probe", model)
  # A square kernel the wrong way round, which every check of shapes lets through, and settings
  # that the weights know nothing of.
  file = tmp_path / "model/model.safetensors"
  flat = safetensors.numpy.load_file(file)
  name = "beit.encoder.layer.1.attention.output.dense.weight"
  flat[name] = np.ascontiguousarray(flat[name].T)
  safetensors.numpy.save_file(flat, file, metadata={"format": "pt"})
  for config, change in (
    ("config.json", {"layer_norm_eps": 1e-12}), ("text/config.json", {"hidden_act": "gelu"})
  ):  # fmt: skip
    path = tmp_path / "model" / config
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

  theirs = testing.run("run_transformers.py", tmp_path / "model", tmp_path / "probe")
  rows = parity.compare(testing.ours(model, tmp_path / "probe"), theirs)
  problems = {row.name: row.problem for row in rows if row.problem}
  epsilon = "setting image/layers.0.layernorm_before: layer norm eps"
  assert problems[epsilon] == "is 1e-12, expected 1e-06"
  activation = "setting text/encoder.layers.0.mlp.activation_fn: activation"
  assert problems[activation] == "is gelu, expected gelu tanh"
  failing = [row for row in rows if not row.ok and row.name.startswith("image/")]
  assert failing[0].name == "image/block_02" and failing[0].max_abs > 1e-2
  # Both are unsupported towers.
  with pytest.raises(ValueError, match=r"layer_norm_eps=1e-12 \(expected 1e-06\)"):
    transformers_vit.read(tmp_path / "model")
