"""Models of exported folders: embeddings, classification, captions, damaged folders."""

import json
import shutil

import jax
import numpy as np
import pytest

import ov_data
import ov_models
import ov_serve
from ov_serve.testing.models import jpeg, write_images, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
  return ov_serve.Model.load(folder)


@pytest.fixture(scope="module")
def pixels(model):
  return np.stack([model.decode(jpeg(seed)) for seed in range(5)])


def test_embeddings_are_those_of_the_bound_model(folder, model, pixels):
  config, params = ov_models.load(folder)
  bound = ov_models.bind(config, params)
  normalised = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
  want = bound.encode_image(normalised).unit
  # Other batch sizes and fused programs change the last bits of float32.
  np.testing.assert_allclose(model.embed_images(pixels), want, atol=1e-6)
  texts = ["a red square", "a green circle"]
  ids = ov_data.TextProcessor.load(folder / "tokenizer").encode(texts)
  np.testing.assert_allclose(model.embed_texts(texts), bound.encode_text(ids).unit, atol=1e-6)


def test_padding_does_not_change_rows(model, pixels):
  alone = np.concatenate([model.embed_images(row[None]) for row in pixels])
  np.testing.assert_allclose(model.embed_images(pixels), alone, atol=1e-6)
  assert model.embed_images(pixels[:0]).shape == (0, 24)


def test_classes_are_the_softmax_of_scaled_similarities(folder, model, pixels):
  labels = ["red square", "blue star", "line"]
  vectors = model.embed_images(pixels)
  prompts = model.embed_texts([f"a photo of a {label}" for label in labels])
  scale = np.exp(np.float64(ov_models.load(folder)[1]["log_scale"]))
  logits = scale * vectors.astype(np.float64) @ prompts.astype(np.float64).T
  want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(model.classify(vectors, labels), want, atol=1e-5)


def test_sigmoid_models_give_independent_probabilities(tmp_path, folder):
  config, params = ov_models.load(folder)
  config = ov_models.config_from_dict(ov_models.config_to_dict(config) | {"bias_init": -3.0})
  params = params | {"bias": np.float32(-3)}
  extra = {"preprocess": ov_models.read_config(folder)["preprocess"]}
  ov_models.save(tmp_path, config, params, extra=extra)
  shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
  model = ov_serve.Model.load(tmp_path)
  vectors = model.embed_images(np.stack([model.decode(jpeg(0))]))
  logits = np.exp(params["log_scale"]) * vectors @ model.embed_texts(["a photo of a dog"]).T - 3
  np.testing.assert_allclose(
    model.classify(vectors, ["dog"]), 1 / (1 + np.exp(-np.float64(logits))), atol=1e-6
  )


def test_caption_log_likelihood_is_the_mean_over_words_and_end(folder, model, pixels):
  config, params = ov_models.load(folder)
  bound = ov_models.bind(config, jax.device_put(params))
  texts = ["a red square", "a", "two yellow lines at night, and many more words than fit", "", "x"]
  normalised = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
  found = model.caption_log_likelihood(pixels, texts)
  _, tokens = bound.encode(normalised)
  ids, mask = model.tokenizer.encode_batch(texts, 8)
  logits = np.asarray(bound.logits(bound.caption_hidden(tokens, ids=ids)), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  lengths = mask.sum(1)
  assert lengths.min() == 2 and lengths.max() == 8  # only the end token, and a text that is cut
  want = [
    np.mean([log_probs[row, i - 1, ids[row, i]] for i in range(1, lengths[row])])
    for row in range(5)
  ]
  # Other batch sizes and fused programs change the last bits of float32.
  np.testing.assert_allclose(found, want, atol=1e-5)
  with pytest.raises(ValueError, match="5 images and 1 texts: expected equal numbers"):
    model.caption_log_likelihood(pixels, ["a"])


def test_sampled_captions_depend_on_image_and_seed_only(model, pixels):
  seeds = [7, 1 << 63, 7 + (1 << 40), 7, 8]
  options = {"temperature": 2.0, "top_k": 20}
  found = model.sample_captions(pixels, seeds, **options)
  again = model.sample_captions(pixels[::-1], seeds[::-1], **options)[::-1]
  assert [caption.text for caption in again] == [caption.text for caption in found]
  same = model.sample_captions(np.repeat(pixels[:1], 5, 0), seeds, **options)
  assert same[0].text == same[3].text == found[0].text
  assert len({caption.text for caption in same}) == 4  # also seeds with equal lower or upper words
  assert model.sample_captions(pixels[:0], []) == []


def test_captions_are_those_of_generate(folder, model, pixels):
  config, params = ov_models.load(folder)
  words = model.tokenizer
  normalised = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
  want = ov_models.generate(
    ov_models.bind(config, jax.device_put(params)), normalised, max_len=8,
    bos_id=words.bos_id, eos_id=words.eos_id, pad_id=words.pad_id,
  )  # fmt: skip
  found = model.caption(pixels)
  assert [caption.text for caption in found] == words.decode_batch(np.asarray(want.ids))
  assert [caption.tokens for caption in found] == want.length.tolist()
  np.testing.assert_allclose([caption.log_prob for caption in found], want.log_prob, atol=1e-4)


def test_a_model_without_text_embeds_images_only(tmp_path, pixels):
  model = ov_serve.Model.load(write_model(tmp_path, text=False))
  assert (model.can_embed_text, model.can_caption) == (False, True)
  np.testing.assert_allclose(np.linalg.norm(model.embed_images(pixels), axis=1), 1, atol=1e-5)
  with pytest.raises(ValueError, match="no text tower"):
    model.embed_texts(["a"])


def test_a_model_without_decoder_writes_no_captions(tmp_path, pixels):
  model = ov_serve.Model.load(write_model(tmp_path, caption=False))
  assert (model.can_embed_text, model.can_caption) == (True, False)
  with pytest.raises(ValueError, match="writes no captions"):
    model.caption(pixels)


def test_an_image_tower_alone_embeds_its_pooled_vector(tmp_path, pixels, folder):
  config = ov_models.ViTConfig.from_name("mu/16", image_size=32)
  params = ov_models.init(config, jax.random.key(1))
  extra = {"preprocess": ov_models.read_config(folder)["preprocess"]}
  ov_models.save(tmp_path, config, params, extra=extra)
  model = ov_serve.Model.load(tmp_path)
  normalised = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
  pooled = np.asarray(ov_models.bind(config, params)(normalised).pooled)
  want = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
  np.testing.assert_allclose(model.embed_images(pixels), want, atol=1e-6)


def test_the_fingerprint_depends_on_every_file(folder, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  before = ov_serve.Model.load(copy).fingerprint
  assert before == ov_serve.Model.load(folder).fingerprint
  config, params = ov_models.load(copy)
  params = params | {"log_scale": np.float32(1)}
  extra = {"preprocess": ov_models.read_config(folder)["preprocess"]}
  ov_models.save(copy, config, params, extra=extra)
  assert ov_serve.Model.load(copy).fingerprint != before


@pytest.mark.parametrize(
  ("preprocess", "message"),
  [
    (None, "has no preprocessing; export the model"),
    ({"image_size": 32}, "preprocess is invalid"),
    ({"image_size": 0, "fit": "center", "mean": [0] * 3, "std": [1] * 3}, "is invalid"),
    ({"image_size": 32, "fit": "crop", "mean": [0] * 3, "std": [1] * 3}, "is invalid"),
    ({"image_size": 32, "fit": "center", "mean": [0] * 3, "std": [0] * 3}, "is invalid"),
  ],
)
def test_wrong_preprocessing_is_reported(folder, tmp_path, preprocess, message):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  content = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(content | {"preprocess": preprocess}))
  with pytest.raises(ValueError, match=message):
    ov_serve.Model.load(copy)


def test_wrong_labels_are_reported(model, pixels):
  vectors = model.embed_images(pixels)
  with pytest.raises(ValueError, match="at least one label"):
    model.classify(vectors, [])
  with pytest.raises(ValueError, match="expected a text with {}"):
    model.classify(vectors, ["a"], "a photo")


def test_the_model_of_an_index_is_checked(model, folder, tmp_path):
  images = write_images(tmp_path / "photos", range(3))
  dataset = ov_serve.open_images(str(images))
  ov_serve.embed(model, dataset, tmp_path / "index", model_folder=folder)
  index = ov_serve.Index.open(tmp_path / "index")
  assert ov_serve.Model.of_index(index).fingerprint == model.fingerprint
  other = write_model(tmp_path / "other", caption=False)
  with pytest.raises(ValueError, match="was embedded by"):
    ov_serve.Model.of_index(index, other)
