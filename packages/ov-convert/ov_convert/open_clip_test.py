"""Folders of open_clip: names, shapes and round trips here; numbers by the library itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import open_clip, open_clip_config, parity, testing
from ov_convert.release import Preprocess, Release
import ov_models
from ov_models import CaptionerConfig, TextConfig, TwoTowersConfig, ViTConfig
from ov_models.testing import random_params

VIT = ViTConfig(width=16, depth=3, mlp_dim=40, num_heads=2, patch_size=4, image_size=14)
TEXT = TextConfig(
  width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=20, max_len=9, padding="attend"
)
TOWERS = TwoTowersConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=10)
DECODER = ov_models.DecoderConfig(
  width=8, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_len=9
)
LEARNED = dataclasses.replace(VIT, position="learned", pool="tok")


def with_text(**fields) -> TwoTowersConfig:
  return dataclasses.replace(TOWERS, text=dataclasses.replace(TEXT, **fields))


CONFIGS = {
  "towers": TOWERS,
  "bias, learned, decoder": dataclasses.replace(
    TOWERS, encoder=LEARNED, bias_init=-3.0, decoder=DECODER
  ),
  "masked padding": with_text(padding="mask"),
  "image tower": VIT,
  "captioner": CaptionerConfig(encoder=LEARNED, decoder=DECODER),
  "without text": TwoTowersConfig(encoder=VIT, text=None, decoder=DECODER, embed_dim=16),
}
# Name, text width, depth and heads, E and resolutions of the 26 published models.
PUBLISHED = [
  (size, patch, *text, resolution)
  for size, patches, text, resolutions in (
    ("Ti", (16, 8), (192, 12, 3, 192), (160, 224, 384)),
    ("S", (16, 8), (384, 12, 6, 384), (160, 224, 384)),
    ("B", (16, 8), (512, 12, 8, 512), (160, 224, 384)),
    ("L", (14,), (768, 12, 12, 768), (84, 224, 336)),
    ("So400m", (14,), (1152, 27, 16, 1152), (84, 224, 384)),
    ("H", (14,), (1024, 24, 16, 1024), (84, 224)),
  )
  for patch in patches
  for resolution in resolutions
]


def kept(config, params):
  """What open_clip has a place for: no decoder, and without texts the image tower alone."""
  if isinstance(config, ViTConfig):
    return config, params
  if getattr(config, "text", None) is None:
    return config.encoder, params["encoder"]
  params = {name: value for name, value in params.items() if name != "decoder"}
  return dataclasses.replace(config, decoder=None), params


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_exact(config):
  params = random_params(config)
  flat = open_clip.name_map(config).to_theirs(params, config)
  config, params = kept(config, params)
  assert_same(open_clip.name_map(config).to_ours(flat, config), params)


def test_layers_and_parts_land_where_they_belong():
  params = random_params(TOWERS)
  flat = open_clip.name_map(TOWERS).to_theirs(params, TOWERS)
  ours = params["encoder"]["blocks"]["attn"]
  joined = flat["visual.transformer.resblocks.2.attn.in_proj_weight"]
  assert joined.shape == (48, 16)
  for i, name in enumerate(("query", "key", "value")):
    np.testing.assert_array_equal(joined[16 * i : 16 * (i + 1)], ours[name]["kernel"][2].T)
  conv = flat["visual.conv1.weight"]
  assert conv.shape == (16, 3, 4, 4)
  np.testing.assert_array_equal(
    conv[5, 2, 1, 3], params["encoder"]["patch_embed"]["kernel"][1, 3, 2, 5]
  )
  np.testing.assert_array_equal(flat["visual.proj"], params["image_head"]["kernel"])
  np.testing.assert_array_equal(flat["text_projection"], params["text_head"]["kernel"])
  np.testing.assert_array_equal(
    flat["visual.positional_embedding"][1:], ov_models.sincos2d(3, 3, 16)
  )
  assert not flat["visual.positional_embedding"][0].any()


def test_published_architectures():
  """Names, counts and fields of the published models; nothing but positions is allocated."""
  assert len(PUBLISHED) == 26
  source = dataclasses.replace(testing.words(), length=80)
  for size, patch, width, depth, heads, embed_dim, pixels in PUBLISHED:
    config = TwoTowersConfig.openvision(
      f"{size}/{patch}", size, size, image_size=pixels, preset="openvision_released"
    )
    found = open_clip.name_map(config)
    if pixels in (160, 84):  # resolutions have the same parameters
      found.check_complete(config)
    names = [line.theirs for line in (*found.entries, *found.fixed)]
    layers = config.encoder.depth + depth
    assert len(names) == len(set(names)) == 12 * layers + 12  # 300 of 12 layers each
    (table,) = found.fixed
    assert table.value.shape == (1 + (pixels // patch) ** 2, config.encoder.width)
    content = Release(config, {}, Preprocess(pixels, "squash"), words=source)
    model = open_clip_config.write(content)["model_cfg"]
    text, image = model["text_cfg"], model["vision_cfg"]
    assert model["embed_dim"] == embed_dim
    assert (text["width"], text["layers"], text["heads"]) == (width, depth, heads)
    assert image["head_width"] == {"So400m": 72, "H": 80}.get(size, 64)
    assert int(image["width"] * image["mlp_ratio"]) == config.encoder.mlp_dim
    assert int(width * text["mlp_ratio"]) == config.text.mlp_dim
    assert open_clip_config.misfits(model) == []


# The library's arithmetic against ours. 1e-5 of the largest entry: sums of up to 40 products in
# float32 differ by 2e-6 in the order of their terms.
RUNS = {
  "towers": dict(config=TOWERS, preprocess=Preprocess(14, "squash")),
  "bias, learned, decoder": dict(config=CONFIGS["bias, learned, decoder"], dtype="float16"),
  "masked padding": dict(config=CONFIGS["masked padding"], dtype="bfloat16"),
  "argmax": dict(
    config=with_text(pool="argmax", mask="causal"), words=testing.words(append_cls=False)
  ),
  # Trained at 14 pixels, written for 23: positions are made anew.
  "captioner": dict(
    config=CaptionerConfig(
      encoder=dataclasses.replace(VIT, pool="tok", image_size=23), decoder=DECODER
    ),
    params=random_params(CaptionerConfig(encoder=VIT, decoder=DECODER)),
  ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_library_computes_the_same(name, tmp_path):
  source = testing.release(**RUNS[name])
  open_clip.write(tmp_path / "model", source)
  testing.write_probe(tmp_path / "probe", source)
  ours = testing.ours(source, tmp_path / "probe")
  theirs = testing.run("run_open_clip.py", tmp_path / "model", tmp_path / "probe")
  rows = parity.compare(ours, theirs, required=ours)
  assert len(rows) == len(ours)
  for row in rows:
    assert row.ok and row.measured <= row.tolerance / 10, parity.explain(row)
  size = source.encoder.image_size
  assert theirs.arrays["image/pixels"].shape == (3, size, size, 3)
  squashed = "CenterCrop" not in theirs.facts["preprocessing"]
  assert squashed == (source.preprocess.fit == "squash")
  # Padding must have a say where it is attended to, or the masked run shows nothing.
  if name == "towers":
    masked = ov_models.bind(CONFIGS["masked padding"], source.params)
    other = masked.encode_text(testing.expected_ids(source.words)).unit
    assert np.abs(ours["text/embedding"] - other).max() > 1e-2


def test_mistakes_show(tmp_path):
  source = testing.release(TOWERS)
  open_clip.write(tmp_path / "model", source)
  testing.write_probe(tmp_path / "probe", source)
  ours = testing.ours(source, tmp_path / "probe")

  # A square kernel the wrong way round, which every shape check lets through; another crop.
  file = tmp_path / "model" / open_clip.WEIGHTS_FILE
  flat = safetensors.numpy.load_file(file)
  name = "visual.transformer.resblocks.1.attn.out_proj.weight"
  wrong = {**flat, name: np.ascontiguousarray(flat[name].T)}
  safetensors.numpy.save_file(wrong, file, metadata={"format": "pt"})
  theirs = testing.run("run_open_clip.py", tmp_path / "model", tmp_path / "probe")
  row = parity.first_failure(parity.compare(ours, theirs))
  assert row.name == "image/block_02" and row.max_abs > 1e-2
  pixels = theirs.arrays["image/pixels"]

  # Settings that the weights know nothing of.
  safetensors.numpy.save_file(flat, file, metadata={"format": "pt"})
  config = tmp_path / "model" / open_clip.CONFIG_FILE
  content = json.loads(config.read_text())
  del content["model_cfg"]["text_cfg"]["act_kwargs"]
  content["model_cfg"]["vision_cfg"]["norm_kwargs"]["eps"] = 1e-5
  content["preprocess_cfg"]["resize_mode"] = "squash"
  config.write_text(json.dumps(content))
  theirs = testing.run("run_open_clip.py", tmp_path / "model", tmp_path / "probe")
  problems = {row.name: row.problem for row in parity.compare(ours, theirs) if row.problem}
  assert problems["setting image/ln_post: layer norm eps"] == "is 1e-05, expected 1e-06"
  activation = "setting text/transformer.resblocks.0.mlp.gelu: activation"
  assert problems[activation] == "is gelu, expected gelu tanh"
  assert parity.first_failure([*parity.compare({"image/pixels": pixels}, theirs)][:1]) is not None
