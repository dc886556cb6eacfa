"""Tests of checkpoints as written by the released code, valid and damaged."""

import functools
import math
import os
import shutil

import jax
import numpy as np
import pytest

from ov_convert import openvision_jax, orbax_folder
import ov_models

# Their trees: a tensor a line, dimensions by letter; of attention also the form split by heads.
BLOCK = """
LayerNorm_0/scale D
LayerNorm_0/bias D
MultiHeadDotProductAttention_0/query/kernel D,D D,N,H
MultiHeadDotProductAttention_0/key/kernel D,D D,N,H
MultiHeadDotProductAttention_0/value/kernel D,D D,N,H
MultiHeadDotProductAttention_0/query/bias D N,H
MultiHeadDotProductAttention_0/key/bias D N,H
MultiHeadDotProductAttention_0/value/bias D N,H
MultiHeadDotProductAttention_0/out/kernel D,D N,H,D
MultiHeadDotProductAttention_0/out/bias D
LayerNorm_1/scale D
LayerNorm_1/bias D
MlpBlock_0/Dense_0/kernel D,F
MlpBlock_0/Dense_0/bias F
MlpBlock_0/Dense_1/kernel F,D
MlpBlock_0/Dense_1/bias D
"""
IMAGE = "embedding/kernel P,P,3,D\ncls 1,1,D\nencoder_norm/scale D\nencoder_norm/bias D"
TEXT = "Embed_0/embedding V,D\npos_embedding 1,T,D\nencoder_norm/scale D\nencoder_norm/bias D"
DECODER = (
  "image_projection_layer/kernel W,D\ndecoder_norm/scale D\ndecoder_norm/bias D\nhead/kernel D,V"
)
HEAD = "head/kernel D,E"
QUERIES = "learnable_tokens Q,D\ntext_projection_layer/kernel X,D"
EMBED = "Embed_0/embedding V,D"

TINY = {"D": 192, "F": 768, "N": 3, "H": 64, "layers": 12}
TINY_TREE = {"P": 16, "V": 32000, "T": 80, "E": 192, "Q": 128, "W": 192, "X": 192}
SMALL = {
  "img": {"D": 16, "F": 24, "N": 4, "H": 4, "layers": 3},
  "txt": {"D": 12, "F": 20, "N": 3, "H": 4, "layers": 2},
  "txt_decoder": {"D": 20, "F": 28, "layers": 2},
}
SMALL_TREE = {"P": 4, "V": 11, "T": 6, "E": 8, "Q": 5, "W": 16, "X": 12}


def rows(tower, table, sizes, form=0):
  """{name: shape} of the lines of a table."""
  found = {}
  for line in table.split("\n"):
    if line:
      name, *forms = line.split(" ")
      letters = forms[min(form, len(forms) - 1)].split(",")
      found[f"{tower}/{name}"] = tuple(sizes[c] if c in sizes else int(c) for c in letters)
  return found


def tower(name, tables, sizes, form=0):
  found = {}
  for table in tables:
    found |= rows(name, table, sizes)
  for layer in range(sizes["layers"]):
    found |= rows(f"{name}/Transformer/encoderblock_{layer}", BLOCK, sizes, form)
  return found


def tree1(img, txt, txt_decoder, sizes, form=0):
  """OpenVision; kernels of its decoder are never split."""
  return (
    tower("img", [IMAGE, HEAD], img | sizes, form)
    | tower("txt", [TEXT, HEAD], txt | sizes, form)
    | tower("txt_decoder", [DECODER, QUERIES], txt_decoder | sizes)
    | {"t": (1,)}
  )


def tree2(img, txt_decoder, sizes, form=0):
  """OpenVision 2."""
  image = tower("img_encoder", [IMAGE], img | sizes, form)
  return image | tower("txt_decoder", [DECODER, EMBED], txt_decoder | sizes)


def small1(form=0):
  return tree1(**SMALL, sizes=SMALL_TREE, form=form)


def small2(form=0):
  return tree2(SMALL["img"], SMALL["txt_decoder"], SMALL_TREE, form)


def values(shapes):
  rng = np.random.default_rng(0)
  return {n: rng.standard_normal(shape, np.float32) * 0.1 for n, shape in shapes.items()}


def nested(flat):
  tree = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[leaf] = value
  return tree


def save(workdir, flat, *, steps=(7,)):
  """Writes checkpoints as the predecessors do; the optimizer's part is only hinted at."""
  import orbax.checkpoint as ocp

  moments = {"mu": {"img": {"cls": np.ones(3, np.float32)}}, "count": np.array(7)}
  state = {"params": nested(flat), "opt": {"0": None, "1": {"inner_state": moments}}}
  with ocp.CheckpointManager((workdir / "checkpoint.npz").absolute()) as manager:
    for step in steps:
      manager.save(step, args=ocp.args.StandardSave(state))
  return workdir


def forward(config, params):
  """All outputs of a model on random inputs."""
  rng = np.random.default_rng(1)
  size = config.encoder.image_size
  images = rng.normal(size=(2, size, size, 3)).astype(np.float32)

  def run(params):
    model = ov_models.bind(config, params)
    if config.text is None:
      out = model(images, np.ones((2, 5), np.int32))
      return [out.image.pooled, model.logits(out.hidden)]
    text = model.encode_text(np.ones((2, config.text.max_len), np.int32))
    image = model.encode_image(images)
    hidden = model.caption_hidden(image.tokens, text_tokens=text.tokens)
    return [image.unit, text.unit, hidden @ model.head_kernel]

  return [np.asarray(x) for x in jax.jit(run)(params)]


def read(workdir, **options):
  # The small decoders are no published size, and their kernels are never split.
  return orbax_folder.read(workdir, **{"image_size": 8, "num_heads": 2} | options)


@pytest.mark.parametrize("form", [0, 1], ids=["2-D", "3-D"])
@pytest.mark.parametrize("tree", [small1, small2], ids=["OpenVision", "OpenVision 2"])
def test_every_tensor_lands(tmp_path, tree, form):
  flat = values(tree(form))
  found = read(save(tmp_path, flat))
  config = found.config
  assert config.encoder.num_heads == (4 if form else 2)
  assert sum(a.size for a in flat.values()) == ov_models.num_params(config)
  back = openvision_jax.to_theirs(found.params, config, split_heads=bool(form))
  assert back.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  for array in forward(config, found.params):
    assert np.isfinite(array).all()
    assert array.std() > 0


def test_inferred_configs(tmp_path):
  found = read(save(tmp_path / "1", values(small1(1))))
  assert found.config == ov_models.VisionLanguageConfig(
    encoder=ov_models.ViTConfig(
      width=16, depth=3, mlp_dim=24, num_heads=4, patch_size=4, image_size=8
    ),
    text=ov_models.TextConfig(
      width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=11, max_len=6,
      pool="last", mask="full", padding="attend",
    ),
    decoder=ov_models.QueryDecoderConfig(
      width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=11, num_queries=5
    ),
    embed_dim=8,
  )  # fmt: skip
  assert found.preprocess.image_size == 8
  assert found.preprocess.fit == "center"
  found = read(save(tmp_path / "2", values(small2())))
  assert found.config.keep_order == "random"
  assert found.config.decoder == ov_models.DecoderConfig(
    width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=11, max_len=127,
    mask="causal", position="none",
  )  # fmt: skip


PUBLISHED = {
  "OpenVision": (tree1(TINY, TINY, TINY, TINY_TREE, form=1), 28_639_297),
  "OpenVision 2": (tree2(TINY, TINY, TINY_TREE), 23_150_016),
}


@pytest.mark.parametrize(("shapes", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_size(tmp_path, shapes, count):
  assert sum(math.prod(shape) for shape in shapes.values()) == count
  flat = values(shapes)
  found = orbax_folder.read(save(tmp_path, flat), image_size=32)  # heads are known by the size
  config, params = found.config, found.params
  assert ov_models.num_params(config) == count
  vit = ov_models.ViTConfig.from_name("Ti/16", image_size=32)
  assert config.encoder == vit
  name = next(iter(flat)).split("/")[0]
  block = f"{name}/Transformer/encoderblock_7"
  query = flat[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].reshape(192, 192)
  np.testing.assert_array_equal(params["encoder"]["blocks"]["attn"]["query"]["kernel"][7], query)
  np.testing.assert_array_equal(
    params["encoder"]["blocks"]["mlp"]["down"]["bias"][7], flat[f"{block}/MlpBlock_0/Dense_1/bias"]
  )
  np.testing.assert_array_equal(params["encoder"]["cls"], flat[f"{name}/cls"][0, 0])
  np.testing.assert_array_equal(
    params["decoder"]["head"]["kernel"][:, -1], flat["txt_decoder/head/kernel"][:, -1]
  )
  for array in forward(config, params):
    assert np.isfinite(array).all()


def under(flat, *tops):
  return {name: array for name, array in flat.items() if name.split("/")[0] in tops}


def test_parts_are_models(tmp_path):
  flat = values(small1())
  found = read(save(tmp_path / "image", under(flat, "img")))
  assert isinstance(found.config, ov_models.ViTConfig)
  assert found.notes == ("img/head/kernel is not imported: a single tower has no head",)
  np.testing.assert_array_equal(found.params["cls"], flat["img/cls"][0, 0])
  found = read(save(tmp_path / "text", under(flat, "txt")))
  assert isinstance(found.config, ov_models.TextConfig)
  assert found.preprocess is None
  found = read(save(tmp_path / "towers", under(flat, "img", "txt", "t")))
  assert found.config.decoder is None
  np.testing.assert_array_equal(found.params["log_scale"], flat["t"][0])
  second = under(values(small2()), "img_encoder")
  found = read(save(tmp_path / "second", second))
  np.testing.assert_array_equal(found.params["cls"], second["img_encoder/cls"][0, 0])
  assert found.notes == ()


def test_learned_positions_fix_the_resolution(tmp_path):
  flat = under(values(small1()), "img") | {"img/pos_embedding": np.ones((1, 10, 16), np.float32)}
  found = read(save(tmp_path, flat))
  assert (found.config.position, found.config.image_size) == ("learned", 12)
  assert "img has learned positions for 12 pixels" in found.notes


def refused(flat, *lines, **options):
  """Each line is in the message; the arrays need not be saved for it."""
  shapes = {name: array.shape for name, array in flat.items()}
  with pytest.raises(ValueError) as error:
    config, _ = orbax_folder.infer_config(shapes, 8, **{"num_heads": 2} | options)
    openvision_jax.to_ours(flat, config)
  for line in lines:
    assert line in str(error.value)


def test_wrong_missing_and_extra_tensors_are_named(tmp_path):
  flat = values(small1())
  attention = "img/Transformer/encoderblock_1/MultiHeadDotProductAttention_0"
  flat[f"{attention}/out/kernel"] = np.zeros((16, 15), np.float32)
  flat["txt/Transformer/encoderblock_0/LayerNorm_0/scale"] = np.zeros(13, np.float32)
  del flat["txt/Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias"], flat["t"]
  flat["txt/head/bias"] = np.zeros(8, np.float32)
  flat["b"] = np.zeros(1, np.float32)
  with pytest.raises(ValueError) as error:
    read(save(tmp_path, flat))
  for line in (
    f"{attention}/out/kernel is (16, 15), expected (16, 16) or (2, 8, 16)",
    "txt/Transformer/encoderblock_0/LayerNorm_0/scale is (13,), expected (12,)",
    "missing txt/Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias",
    "missing t\n",
    "unexpected txt/head/bias (8,)",
    "unexpected b (1,)",
  ):
    assert line in f"{error.value}\n"
  assert len(str(error.value).splitlines()) == 1 + 6


def test_tensors_that_tell_the_sizes():
  flat = values(small1())
  for name in ("img/embedding/kernel", "txt/pos_embedding", "txt_decoder/learnable_tokens"):
    refused({n: a for n, a in flat.items() if n != name}, f"missing {name}")
  refused(
    flat | {"txt/pos_embedding": np.zeros((6, 12))}, "pos_embedding is (6, 12), expected 3 dim"
  )
  refused(flat | {"img/head/kernel": np.zeros((16, 0))}, "img/head/kernel is (16, 0)")
  second = values(small2())
  del second["txt_decoder/Embed_0/embedding"]
  refused(second, "missing txt_decoder/Embed_0/embedding")
  refused({"model/cls": np.zeros(3)}, "the parameters are model; expected img, txt, txt_decoder")


def without(shapes, tower, *layers):
  lost = tuple(f"{tower}/Transformer/encoderblock_{layer}/" for layer in layers)
  return {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items() if not n.startswith(lost)}


def test_missing_layers():
  refused(without(small1(), "txt", 0), "missing txt/Transformer/encoderblock_0")
  refused(
    without(small1(), "img", 0, 1), "encoderblock_0", "missing img/Transformer/encoderblock_1"
  )
  refused(without(small1(), "img", 0, 1, 2), "missing img/Transformer/encoderblock_0 and all other")
  for (
    shapes,
    _,
  ) in PUBLISHED.values():  # the last ones: detected from the published size, split or not
    name = next(iter(shapes)).split("/")[0]
    refused(
      without(shapes, name, 10, 11),
      f"{name} has 10 layers of width 192 and mlp 768, but the published model has 12 layers: "
      "encoderblock_10 and later ones are missing",
      num_heads=None,
    )
  shapes = {n: a.shape for n, a in without(PUBLISHED["OpenVision"][0], "img", 11).items()}
  config, _ = orbax_folder.infer_config(shapes, num_heads=3)  # if the model has this depth
  assert config.encoder.depth == 11


def test_unpublished_sizes_require_num_heads():
  refused(
    values(small2()),
    "img_encoder has 3 layers of width 16 and mlp 24, which is not a published size; set num_heads",
    "txt_decoder has 2 layers of width 20",
    num_heads=None,
  )
  refused(values(small2()), "width=20 is not a multiple of num_heads=8", num_heads=8)


def test_which_folder_and_step(tmp_path):
  flat = under(values(small1()), "img")
  workdir = save(tmp_path / "run", flat, steps=(3, 12))
  folder = workdir / "checkpoint.npz"
  newest = folder / "12" / "default"
  for path in (workdir, folder, folder / "12", newest):
    assert orbax_folder.find(path) == newest
  assert orbax_folder.find(workdir, 3) == folder / "3" / "default"
  hub = tmp_path / "repository"
  shutil.copytree(workdir, hub / "jax_orbax_weight")
  assert read(hub).config == read(newest).config
  with pytest.raises(ValueError, match="has no step 4; it has 3, 12"):
    orbax_folder.find(workdir, 4)
  with pytest.raises(ValueError, match="step=3, but .*default contains no steps"):
    orbax_folder.find(newest, 3)


def test_broken_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    read(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="_METADATA is missing. Expected the folder of a run"):
    read(tmp_path / "empty")
  good = orbax_folder.find(save(tmp_path / "good", under(values(small1()), "img")))

  def broken(name, damage, match):
    copy = tmp_path / name
    shutil.copytree(good, copy)
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
      read(copy)
    assert len(str(error.value).splitlines()) == 1

  broken("no_metadata", lambda p: (p / "_METADATA").unlink(), "_METADATA is missing")
  broken("no_json", lambda p: (p / "_METADATA").write_text("{"), "is damaged")
  broken("deep", lambda p: (p / "_METADATA").write_text('{"a":' * 10**5), "is damaged")
  broken(
    "huge", lambda p: os.truncate(p / "_METADATA", 1 << 40), "_METADATA has 1099511627776 bytes"
  )
  broken("no_manifest", lambda p: (p / "manifest.ocdbt").unlink(), "is damaged")
  broken("half", lose_data, "is damaged")
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((tmp_path / "other").absolute(), {"weights": np.ones(3)})
  with pytest.raises(
    ValueError, match="other contains no params; expected a checkpoint with params"
  ):
    read(tmp_path / "other")
  nan = under(values(small1()), "img")
  nan["img/cls"][0, 0, 3] = np.nan
  with pytest.raises(ValueError, match="img/cls contains NaN or Inf"):
    read(save(tmp_path / "nan", nan))


def lose_data(folder):
  """Deletes the larger half of the files with data."""
  files = sorted(folder.glob("**/d/*"), key=lambda path: path.stat().st_size)
  for path in files[len(files) // 2 :]:
    path.unlink()
