"""Tests of the open_clip format: names, shapes, round trips, and outputs of the library."""

import dataclasses
import json
import pathlib
import re

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import open_clip, open_clip_config, parity, testing
from ov_convert.release import Preprocess, Release
import ov_models
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig
from ov_models.testing import random_params

VIT = ViTConfig(width=16, depth=3, mlp_dim=40, num_heads=2, patch_size=4, image_size=14)
TEXT = TextConfig(
  width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=20, max_len=9, padding="attend"
)
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=10)
DECODER = ov_models.DecoderConfig(
  width=8, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_len=9
)
LEARNED = dataclasses.replace(VIT, position="learned", pool="tok")


def with_text(**fields) -> VisionLanguageConfig:
  return dataclasses.replace(TOWERS, text=dataclasses.replace(TEXT, **fields))


CONFIGS = {
  "towers": TOWERS,
  "bias, learned, decoder": dataclasses.replace(
    TOWERS, encoder=LEARNED, bias_init=-3.0, decoder=DECODER
  ),
  "masked padding": with_text(padding="mask"),
  "image tower": VIT,
  "captioner": VisionLanguageConfig(encoder=LEARNED, decoder=DECODER),
  "without text": VisionLanguageConfig(encoder=VIT, text=None, decoder=DECODER, embed_dim=16),
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
  chex.assert_trees_all_equal(got, wanted)


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
    config = VisionLanguageConfig.from_names(
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
    assert open_clip_config.config_mismatches(model) == []


# Fields of text_cfg and vision_cfg in open_clip 2.23; tokenizer_mode was added in 3.0.
_KNOWN_TO_2_23 = {
  "layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre",
  "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs", "context_length", "vocab_size",
  "hf_tokenizer_name", "embed_cls", "pad_id", "no_causal_mask",
}  # fmt: skip


@pytest.mark.parametrize("append_cls", [True, False])
def test_fields_that_older_versions_lack_are_written_only_where_they_are_not_the_default(
  append_cls,
):
  config = TOWERS if append_cls else with_text(pool="argmax", mask="causal")
  words = testing.words(append_cls=append_cls)
  for source in (testing.release(config, words=words), testing.release(VIT)):
    model = open_clip_config.write(source)["model_cfg"]
    newer = (model["text_cfg"].keys() | model["vision_cfg"].keys()) - _KNOWN_TO_2_23
    assert newer == ({"tokenizer_mode"} if append_cls and source.text is not None else set())


# The library's arithmetic against ours. 1e-5 of the largest entry: sums of up to 40 products in
# float32 differ by 2e-6 in the order of their terms.
RUNS = {
  "towers": dict(config=TOWERS, preprocess=Preprocess(14, "squash")),
  "bias, learned, decoder": dict(config=CONFIGS["bias, learned, decoder"], dtype="float16"),
  "masked padding": dict(config=CONFIGS["masked padding"], dtype="bfloat16"),
  "argmax": dict(
    config=with_text(pool="argmax", mask="causal"), words=testing.words(append_cls=False)
  ),
  # Trained at 14 pixels, exported for 23: positions are recomputed.
  "captioner": dict(
    config=VisionLanguageConfig(
      encoder=dataclasses.replace(VIT, pool="tok", image_size=23), decoder=DECODER
    ),
    params=random_params(VisionLanguageConfig(encoder=VIT, decoder=DECODER)),
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
  # Padding must affect the result where it is attended to; otherwise masking it has no effect.
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config, dtype, tmp_path):
  source = testing.release(config, dtype=dtype, preprocess=Preprocess(14, "squash"))
  open_clip.write(tmp_path, source)
  found = open_clip.read(tmp_path)
  config, params = kept(config, source.params)
  assert_same(found.params, params)
  assert found.preprocess == source.preprocess
  assert found.notes == ()
  if isinstance(config, VisionLanguageConfig):
    bias = None if config.bias_init is None else float(params["bias"])
    assert found.config == dataclasses.replace(config, bias_init=bias)
    ids = ("length", "append_cls", "pad_id", "bos_id", "eos_id", "unk_id", "cls_id")
    assert [getattr(found.words, i) for i in ids] == [getattr(source.words, i) for i in ids]
    assert found.words.vocabulary == source.words.vocabulary
  else:
    assert found.config == config and found.words is None


def test_names_in_the_file_of_masked_padding(tmp_path):
  config = CONFIGS["masked padding"]
  source = testing.release(config)
  open_clip.write(tmp_path, source)
  flat = safetensors.numpy.load_file(tmp_path / open_clip.WEIGHTS_FILE)
  text, cls_id = source.params["text"], source.words.cls_id
  np.testing.assert_array_equal(flat["text.cls_emb"], text["embed"]["embedding"][cls_id])
  table = flat["text.positional_embedding"]
  np.testing.assert_array_equal(table[[*range(8), 9]], text["position_embedding"])
  assert {name.split(".")[0] for name in flat} == {"visual", "text", "logit_scale"}
  flat["text.cls_emb"] += 1
  with pytest.raises(ValueError, match=r"cls_emb differs from the embedding of \[CLS\], id 3"):
    open_clip.unmask_padding(flat, cls_id)


def change(folder: pathlib.Path, edit, file=open_clip.CONFIG_FILE) -> None:
  content = json.loads((folder / file).read_text())
  edit(content)
  (folder / file).write_text(json.dumps(content))


def test_reading_published_folders(tmp_path):
  """As hubs hold OpenVision: no tokenizer_mode, a vocab.txt; a tower alone under bare names."""
  source = testing.release(TOWERS)
  open_clip.write(tmp_path, source)
  (tmp_path / "tokenizer.json").unlink()
  (tmp_path / "vocab.txt").write_text("[PAD]\n")
  change(tmp_path, lambda c: c["model_cfg"]["text_cfg"].pop("tokenizer_mode"))
  found = open_clip.read(tmp_path)
  assert found.config == TOWERS and found.words is None
  assert "Tokenizer.from_vocab" in found.notes[0]
  assert_same(found.params, source.params)

  flat = safetensors.numpy.load_file(tmp_path / open_clip.WEIGHTS_FILE)
  bare = {n.removeprefix("visual."): t for n, t in flat.items() if n.startswith("visual.")}
  (tmp_path / open_clip.WEIGHTS_FILE).unlink()
  safetensors.numpy.save_file(bare, tmp_path / "open_clip_pytorch_model.safetensors")

  def alone(content):
    del content["model_cfg"]["text_cfg"]
    content["model_cfg"]["vision_cfg"]["output_tokens"] = True

  change(tmp_path, alone)
  found = open_clip.read(tmp_path)
  assert found.config == VIT
  assert_same(found.params, source.params["encoder"])
  assert found.notes == (
    "visual.proj (16, 10) is not imported: the tower returns the pooled vector before it",
  )


def test_reading_a_clip_in_two_modules_and_without_preprocessing(tmp_path):
  """Towers as `custom_text` names them, learned positions that another library resampled."""
  source = testing.release(with_text(pool="first"), words=testing.words(append_cls=False))
  open_clip.write(tmp_path, source)
  file = tmp_path / open_clip.WEIGHTS_FILE
  flat = safetensors.numpy.load_file(file)
  own = ("visual.", "logit_scale")
  flat = {n if n.startswith(own) else f"text.{n}": tensor for n, tensor in flat.items()}
  flat["logit_scale"] = flat["logit_scale"].reshape(1)
  flat["visual.positional_embedding"][1:] += 0.01
  safetensors.numpy.save_file(flat, file)

  def edit(content):
    content["model_cfg"] |= {"custom_text": True, "nonscalar_logit_scale": True}
    del content["preprocess_cfg"]

  change(tmp_path, edit)
  found = open_clip.read(tmp_path)
  assert found.config.encoder.position == "learned" and found.config.text.pool == "first"
  assert found.params["log_scale"] == source.params["log_scale"]
  assert found.preprocess.fit == "center" and found.preprocess.mean[0] == 0.48145466
  assert found.notes == ()
  table = found.params["encoder"]["position_embedding"]
  np.testing.assert_array_equal(table, flat["visual.positional_embedding"])


def test_unsupported_models_are_rejected_with_all_fields(tmp_path):
  open_clip.write(tmp_path, testing.release(TOWERS))

  def edit(content):
    model = content["model_cfg"]
    model |= {"quick_gelu": True, "multimodal_cfg": {"width": 8}}
    model["vision_cfg"] |= {
      "pool_type": "none", "ls_init_value": "0.1", "norm_kwargs": {"eps": 2},
      "patch_dropout": 0.5, "attentional_pool": True, "act_kwargs": {"approximate": "tanh"},
      "image_size": [14, 28], "in_channels": 4, "qk_norm": True, "block_type": "custom",
    }  # fmt: skip
    model["text_cfg"] |= {
      "hf_model_name": "roberta", "embed_cls": True, "pool_type": "eos", "act_kwargs": None,
      "norm_kwargs": {"eps": "1e-5"}, "proj_bias": True, "proj_type": "none", "something": 1,
    }  # fmt: skip

  change(tmp_path, edit)
  with pytest.raises(ValueError, match="is not a supported model") as error:
    open_clip.read(tmp_path)
  lines = [line.strip() for line in str(error.value).splitlines()[1:]]
  for field in (
    "multimodal_cfg={'width': 8} (unknown)", "vision_cfg.pool_type='none'",
    "vision_cfg.ls_init_value='0.1' (must be a number)", "vision_cfg.attentional_pool=True",
    "vision_cfg.act_kwargs={'approximate': 'tanh'} (none with quick_gelu)",
    "vision_cfg.norm_kwargs.eps=2 (must be a number from 0 to 1)",
    "vision_cfg.image_size=[14, 28]", "vision_cfg.in_channels=4", "vision_cfg.qk_norm=True",
    "vision_cfg.block_type='custom'", "text_cfg.hf_model_name='roberta'", "text_cfg.embed_cls=True",
    "text_cfg.pool_type='eos'", "text_cfg.norm_kwargs.eps='1e-5'",
    "text_cfg.proj_bias=True", "text_cfg.proj_type='none'", "text_cfg.something=1 (unknown)",
  ):  # fmt: skip
    assert sum(line.startswith(field) for line in lines) == 1, field
  assert len(lines) == 17  # a dropout of patches is of training only


def test_tensors_that_do_not_fit_are_listed(tmp_path):
  open_clip.write(tmp_path, testing.release(TOWERS))
  file = tmp_path / open_clip.WEIGHTS_FILE
  flat = safetensors.numpy.load_file(file)
  del flat["visual.ln_post.bias"], flat["text_projection"]
  flat["visual.ln_pre.bias"] = np.zeros(16, np.float32)
  flat["visual.proj"] = np.zeros((10, 16), np.float32)
  safetensors.numpy.save_file(flat, file)
  with pytest.raises(ValueError) as error:
    open_clip.read(tmp_path)
  for line in (
    "missing visual.ln_post.bias", "missing text_projection", "unexpected visual.ln_pre.bias (16,)",
    "visual.proj is (10, 16), expected (16, 10)",
  ):  # fmt: skip
    assert line in str(error.value)


@pytest.mark.parametrize(
  ("config", "fields", "messages"),
  [
    (dataclasses.replace(VIT, pool="map"), {}, ["encoder.pool='map'"]),
    (with_text(pool="mean"), {}, ["text.pool='mean'"]),
    (
      with_text(pool="first", padding="mask"),
      {"words": testing.words(append_cls=False)},
      ["text.padding='mask' with text.pool='first'.*model.preset=openvision_released"],
    ),
    (TOWERS, {"words": None}, ["words=None"]),
    (
      dataclasses.replace(
        with_text(pool="map", max_len=8), encoder=dataclasses.replace(VIT, pool="map")
      ),
      {},
      ["encoder.pool='map'", "text.pool='map'", "words.length=9, text.max_len=8"],
    ),
  ],
)
def test_models_without_counterpart_are_refused(config, fields, messages, tmp_path):
  source = testing.release(config, **fields)
  with pytest.raises(ValueError, match="open_clip does not support this model") as error:
    open_clip.write(tmp_path / "model", source)
  assert len(str(error.value).splitlines()) == 1 + len(messages)
  for message in messages:
    assert re.search(message, str(error.value))
  assert not (tmp_path / "model").exists()


def test_malformed_configs_are_rejected(tmp_path):
  open_clip.write(tmp_path, testing.release(TOWERS))
  change(tmp_path, lambda c: c["model_cfg"]["vision_cfg"].update(head_width=0, layers=[3, 4, 6, 3]))
  with pytest.raises(ValueError, match=r"layers=\[3, 4, 6, 3\] .*\n.*head_width=0 \(must be a pos"):
    open_clip.read(tmp_path)
  change(tmp_path, lambda c: c.update(model_cfg={"embed_dim": "many"}))
  with pytest.raises(ValueError, match=r"embed_dim \(a number\) and vision_cfg \(an object\)"):
    open_clip.read(tmp_path)


def test_image_towers_of_timm_are_published_ones(tmp_path):
  open_clip.write(tmp_path, testing.release(TOWERS))
  timm = {"timm_model_name": "vit_base_patch16_siglip_256", "timm_proj": "mlp"}
  change(tmp_path, lambda content: content["model_cfg"]["vision_cfg"].update(timm))
  with pytest.raises(ValueError, match=r"vision_cfg.timm_proj='mlp' \(supported: null or 'none'\)"):
    open_clip.read(tmp_path)
  timm |= {"timm_model_name": "resnet50", "timm_proj": None}
  change(tmp_path, lambda content: content["model_cfg"]["vision_cfg"].update(timm))
  with pytest.raises(ValueError, match=r"vision_cfg.timm_model_name='resnet50' \(unknown\)"):
    open_clip.read(tmp_path)
