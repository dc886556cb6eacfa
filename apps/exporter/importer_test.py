"""Tests that imports are workdirs for training, evaluation and export."""

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from apps.exporter.importer import import_model
from apps.trainer.checkpoint import find_checkpoint, read_metadata
from apps.trainer.init_from import check_tokenizer, plan_init
from apps.trainer.init_source import open_source
from ov_convert import hf_tokenizer, openvision_jax, text_cleaning, torch_module
from ov_convert.release import Preprocess, Release, TokenizerSpec
import ov_data
import ov_data.text_cleaning
import ov_data.tokenizer
import ov_models

TOKENIZER = ov_data.Tokenizer.train(["a red circle above a blue square"], 40, kind="words")
LENGTH = 8
VIT = ov_models.ViTConfig(
  width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=8, position="learned"
)
TOWERS = ov_models.VisionLanguageConfig(
  encoder=ov_models.ViTConfig(
    width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=8
  ),
  text=ov_models.TextConfig(
    width=12, depth=2, mlp_dim=20, num_heads=2, vocab_size=40, max_len=LENGTH, padding="attend"
  ),
  decoder=ov_models.QueryDecoderConfig(
    width=20, depth=1, mlp_dim=28, num_heads=2, vocab_size=40, num_queries=5
  ),
  embed_dim=8,
)
CAPTIONER = ov_models.VisionLanguageConfig(
  encoder=VIT,
  decoder=ov_models.DecoderConfig(
    width=12, depth=1, mlp_dim=20, num_heads=2, vocab_size=40, max_len=LENGTH
  ),
)
PREPROCESS = Preprocess(8, "squash", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  fill = lambda a: rng.normal(size=a.shape).astype(np.float32)
  return jax.tree.map(fill, ov_models.abstract_params(config))


def words(**changes):
  t, length = TOKENIZER, changes.pop("length", LENGTH)
  fields = {
    "append_cls": True, "pad_id": t.pad_id, "bos_id": t.bos_id, "eos_id": t.eos_id,
    "unk_id": t.unk_id, "cls_id": t.cls_id,
  }  # fmt: skip
  return TokenizerSpec(t.to_json(), length, **fields | changes)


def saved(folder, config, texts):
  """Write a folder in our format; return its parameters."""
  params = random_params(config)
  torch_module.write(folder, Release(config, params, PREPROCESS, texts))
  return params


def assert_whole(workdir, config, params):
  """Restore the checkpoint, which must contain exactly the tree of `params`."""
  fresh = jax.tree.map(jnp.zeros_like, params)
  plan = plan_init(open_source(workdir), fresh)
  report = plan.report
  assert len(report.taken) == len(jax.tree.leaves(params))
  assert not (report.resampled or report.fresh or report.unused)
  jax.tree.map(np.testing.assert_array_equal, plan.apply(fresh), params)
  assert ov_models.config_from_dict(read_metadata(find_checkpoint(workdir))["model"]) == config
  return report


def predecessor(folder, params):
  """Return a run of the published code with TOWERS."""
  import orbax.checkpoint as ocp

  tree = {}
  for name, array in openvision_jax.to_theirs(params, TOWERS).items():
    *parents, leaf = name.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = array
  with ocp.CheckpointManager((folder / "checkpoint.npz").absolute()) as manager:
    manager.save(7, args=ocp.args.StandardSave({"params": tree, "opt": {"count": np.array(7)}}))
  return f"openvision_jax:{folder}"


def test_a_checkpoint_of_the_predecessor(tmp_path):
  params = random_params(TOWERS)
  workdir = tmp_path / "imports" / "one"
  spec = predecessor(tmp_path / "run", params)
  lines = import_model(spec, workdir, image_size=8, num_heads=2)
  assert_whole(workdir, TOWERS, params)
  metadata = read_metadata(find_checkpoint(workdir))
  assert metadata["imported"]["from"] == "openvision_jax:run"
  assert metadata["step"] == 0
  assert metadata["config"] is None
  assert metadata["preprocess"]["fit"] == "center"
  assert "tokenizer" not in metadata
  count = ov_models.num_params(TOWERS)
  assert lines[0] == f"imported openvision_jax:run: VisionLanguage of {count:,} parameters"
  assert any("the model has no tokenizer" in line for line in lines)
  assert str(tmp_path) not in str(metadata["imported"])
  assert [path.name for path in workdir.parent.iterdir()] == ["one"]


def test_the_vocabulary_next_to_a_checkpoint(tmp_path):
  spec = predecessor(tmp_path / "run", random_params(TOWERS))
  vocabulary = tmp_path / "run" / "vocab.txt"
  tokens = ["[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "a", "red", "circle"]
  vocabulary.write_text("\n".join(tokens) + "\n")
  options = {"image_size": 8, "num_heads": 2}
  import_model(spec, tmp_path / "workdir", **options)
  processor = ov_data.TextProcessor.load(tmp_path / "workdir" / "tokenizer")
  assert processor.encode(["A red circle?"]).tolist() == [[1, 5, 6, 7, 3, 2, 0, 4]]
  assert (processor.pool, processor.padding) == ("last", "attend")
  metadata = read_metadata(find_checkpoint(tmp_path / "workdir"))
  assert metadata["tokenizer"] == processor.tokenizer.fingerprint

  vocabulary.write_text("\n".join(f"word{i}" for i in range(30)))
  lines = import_model(spec, tmp_path / "without", **options)
  note = "its tokenizer is not imported: vocabulary vocab.txt: no [UNK] token among its 30 lines"
  assert any(line.startswith(f"  note: {note}") for line in lines)
  vocabulary.unlink()
  (tmp_path / "secret.txt").write_text("\n".join(tokens))
  vocabulary.symlink_to("../secret.txt")
  lines = import_model(spec, tmp_path / "link", **options)
  assert any("vocab.txt is a link that points outside its folder" in line for line in lines)
  for workdir in ("without", "link"):
    notes = read_metadata(find_checkpoint(tmp_path / workdir))["imported"]["notes"]
    assert str(tmp_path) not in str(notes)


def test_our_own_format(tmp_path):
  params = saved(tmp_path / "model", TOWERS, words())
  workdir = tmp_path / "workdir"
  workdir.mkdir()  # empty: may be filled
  import_model(f"safetensors:{tmp_path / 'model'}", workdir)
  report = assert_whole(workdir, TOWERS, params)
  metadata = read_metadata(find_checkpoint(workdir))
  assert metadata["preprocess"] == {
    "image_size": 8, "fit": "squash", "mean": [0.5] * 3, "std": [0.25] * 3,
    "interpolation": "bilinear",
  }  # fmt: skip
  processor = ov_data.TextProcessor.load(workdir / "tokenizer")
  assert (processor.length, processor.pool, processor.padding) == (LENGTH, "last", "attend")
  assert metadata["tokenizer"] == processor.tokenizer.fingerprint == TOKENIZER.fingerprint
  check_tokenizer(report, TOKENIZER.fingerprint)
  expected = ov_data.TextProcessor(TOKENIZER, LENGTH, padding="attend")
  np.testing.assert_array_equal(processor.encode(["a red"]), expected.encode(["a red"]))


@pytest.mark.parametrize("kind", ["open_clip", "timm", "transformers"])
def test_importing_our_exports(tmp_path, kind):
  from ov_convert import open_clip, timm_vit, transformers_vit

  writers = {"open_clip": open_clip, "timm": timm_vit, "transformers": transformers_vit}
  params = random_params(VIT)
  params["blocks"]["attn"]["key"]["bias"][:] = 0  # has no effect, and some formats lack it
  writers[kind].write(tmp_path, Release(VIT, params, PREPROCESS))
  import_model(f"{kind}:{tmp_path}", tmp_path / "workdir")
  assert_whole(tmp_path / "workdir", VIT, {"encoder": params})
  metadata = read_metadata(find_checkpoint(tmp_path / "workdir"))
  assert metadata["preprocess"]["fit"] == "squash"
  assert metadata["preprocess"]["mean"] == [0.5] * 3


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_texts_come_along(tmp_path, kind):
  from ov_convert import open_clip, transformers_vit

  config = dataclasses.replace(TOWERS, decoder=None)
  writer = {"open_clip": open_clip, "transformers": transformers_vit}[kind]
  writer.write(tmp_path, Release(config, random_params(config), PREPROCESS, words()))
  import_model(f"{kind}:{tmp_path}", tmp_path / "workdir")
  processor = ov_data.TextProcessor.load(tmp_path / "workdir" / "tokenizer")
  texts = ["a red circle", "", "A BLUE square? " * 9]
  expected = ov_data.TextProcessor(TOKENIZER, LENGTH, padding="attend").encode(texts)
  np.testing.assert_array_equal(processor.encode(texts), expected)
  kept = ov_models.config_from_dict(read_metadata(find_checkpoint(tmp_path / "workdir"))["model"])
  assert kept.text == config.text


def test_a_captioner_has_a_tokenizer_alone(tmp_path):
  params = saved(tmp_path / "model", CAPTIONER, words(append_cls=False))
  import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir")
  assert_whole(tmp_path / "workdir", CAPTIONER, params)
  kept = ov_data.Tokenizer.load(tmp_path / "workdir" / "tokenizer")
  assert kept.fingerprint == TOKENIZER.fingerprint
  assert not (tmp_path / "workdir" / "tokenizer" / "text_processor.json").exists()


def test_a_single_tower_is_stored_under_its_name_in_the_model(tmp_path):
  params = saved(tmp_path / "model", VIT, None)
  import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir")
  assert_whole(tmp_path / "workdir", VIT, {"encoder": params})
  assert not (tmp_path / "workdir" / "tokenizer").exists()
  towers = jax.tree.map(jnp.asarray, random_params(CAPTIONER, 1))
  plan = plan_init(open_source(tmp_path / "workdir"), towers)
  jax.tree.map(np.testing.assert_array_equal, plan.apply(towers)["encoder"], params)
  assert {path.split("/")[0] for path in plan.report.fresh} == {"decoder"}


def test_a_tokenizer_with_other_ids_is_not_imported(tmp_path):
  saved(tmp_path / "model", TOWERS, words(eos_id=9))
  lines = import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir")
  note = "the model was trained with eos_id 9; the vocabulary assigns by name"
  assert any(note in line for line in lines)
  metadata = read_metadata(find_checkpoint(tmp_path / "workdir"))
  assert any(note in line for line in metadata["imported"]["notes"])
  assert not (tmp_path / "workdir" / "tokenizer").exists()


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (
      "keras:{0}/model",
      "is not FORMAT:PATH; formats are openvision_jax, safetensors, open_clip, t",
    ),
    ("{0}/model", "is not FORMAT:PATH"),
    ("timm:", "is not FORMAT:PATH"),
    ("timm:{0}/nowhere", "nowhere does not exist; expected a folder"),
    ("safetensors:{0}/model/config.json", "config.json is a file; expected a folder"),
    ("openvision_jax:{0}/model", "is not a checkpoint: _METADATA is missing"),
    ("open_clip:{0}/model", "open_clip_config.json: no such file"),
  ],
)
def test_invalid_models_are_rejected(tmp_path, spec, message):
  saved(tmp_path / "model", VIT, None)
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    import_model(spec.format(tmp_path), tmp_path / "workdir")
  assert message in str(error.value)
  assert len(str(error.value).splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_options_of_other_formats_are_rejected(tmp_path):
  saved(tmp_path / "model", VIT, None)
  for options in ({"image_size": 16}, {"num_heads": 2}):
    with pytest.raises(
      ValueError, match="applies only to openvision_jax; folders of safetensors contain it"
    ):
      import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir", **options)


def test_a_workdir_is_never_overwritten(tmp_path):
  saved(tmp_path / "model", VIT, None)
  (tmp_path / "workdir").mkdir()
  kept = tmp_path / "workdir" / "notes.txt"
  kept.write_text("mine")
  for workdir in (tmp_path / "workdir", kept):
    with pytest.raises(ValueError, match="exists and is (not empty|a file); choose another folder"):
      import_model(f"safetensors:{tmp_path / 'model'}", workdir)
  assert kept.read_text() == "mine"


def test_a_failed_write_leaves_no_output(tmp_path, monkeypatch):
  saved(tmp_path / "model", VIT, None)

  def full(*args):
    raise OSError("no space left")

  monkeypatch.setattr("apps.exporter.importer.Checkpoints.save", full)
  with pytest.raises(OSError, match="no space left"):
    import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir")
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_training_and_conversion_look_for_special_tokens_by_the_same_names():
  """Tests that import and training agree on the special tokens of a vocabulary."""
  assert hf_tokenizer._USUAL_NAMES == ov_data.tokenizer._SPECIAL_NAMES


@pytest.mark.parametrize("clean", typing.get_args(text_cleaning.Clean))
@pytest.mark.parametrize("own", [None, normalizers.NFKC(), normalizers.Sequence([])])
def test_training_and_conversion_clean_texts_alike(clean, own):
  """Both put the same normalizers in front of those of the file, and only once."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.normalizer = own
  content = json.loads(backend.to_str())
  for _ in range(2):
    content = text_cleaning.add(content, clean)
    ov_data.text_cleaning.add(backend, clean)
    assert content["normalizer"] == json.loads(backend.to_str())["normalizer"]
  assert tokenizers.Tokenizer.from_str(json.dumps(content)).to_str() == backend.to_str()


def test_texts_without_begin_token(tmp_path):
  """A model of our format keeps the special tokens of SigLIP."""
  path = tmp_path / "tokenizer.json"
  path.write_text(TOKENIZER.to_json(), "utf-8")
  special = {"pad": "[eos]", "eos": "[eos]", "unk": "[UNK]"}
  tokenizer = ov_data.Tokenizer.from_file(path, special=special, clean="siglip")
  spec = words(
    append_cls=False, pad_id=tokenizer.pad_id, bos_id=None, eos_id=tokenizer.eos_id, cls_id=None
  )
  spec = dataclasses.replace(spec, tokenizer_json=tokenizer.to_json())
  config = dataclasses.replace(TOWERS, decoder=None)
  saved(tmp_path / "model", config, spec)
  lines = import_model(f"safetensors:{tmp_path / 'model'}", tmp_path / "workdir")
  assert not any("tokenizer" in line for line in lines), lines
  processor = ov_data.TextProcessor.load(tmp_path / "workdir" / "tokenizer")
  assert processor.tokenizer.fingerprint == tokenizer.fingerprint
  assert processor.encode(["A red, SQUARE!"]).tolist() == [
    [*tokenizer.encode("a red square"), *[tokenizer.eos_id] * 5]
  ]
