"""Tests that programs of model cards return the features and similarities of ov_models."""

import contextlib
import inspect
import io
import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

from apps.exporter import card, snippets, testing_pictures
from apps.exporter.card import CardFacts
from apps.exporter.formats.table import EXPORTS
from ov_convert import client_env, testing
from ov_convert.release import Preprocess
import ov_data
from ov_data import decode
import ov_models

SIZE = 32
TEXTS = ["a red circle", "cafe of it"]  # words that the tokenizer of the test knows
VOCABULARY = len(testing.words().vocabulary)  # one less without [CLS]
SMALL = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4}
PREPROCESS = Preprocess(SIZE, "squash", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def _pair(preset, **options):
  return ov_models.VisionLanguageConfig.from_names(
    "mu/8", "Ti", None, image_size=SIZE, vocab_size=VOCABULARY, text_len=testing.LENGTH,
    embed_dim=24, preset=preset, encoder_options=SMALL, text_options=SMALL, **options,
  )  # fmt: skip


MODELS = {
  "released": _pair("openvision_released"),
  "sigmoid": _pair("default", bias_init=-1.0),  # and masks padding
  "clip": _pair("clip"),  # no [CLS] ends a text
  "captioner": ov_models.VisionLanguageConfig.openvision2(
    "mu/8", "Ti", image_size=SIZE, vocab_size=VOCABULARY, max_len=7,
    encoder_options=SMALL, decoder_options=SMALL,
  ),
}  # fmt: skip
SEEDS = {"captioner": 11}  # one that writes words
SOME = ("open_clip", "transformers", "safetensors")  # whose programs differ by the text tower
RUNS = [
  *(("released", kind) for kind in EXPORTS),
  *(("sigmoid", kind) for kind in SOME),
  *(("clip", kind) for kind in SOME),
  *(("captioner", kind) for kind in ("safetensors", "stablehlo", "open_clip")),
]
# Kinds of images for which a plain conversion to RGB is wrong; all programs run with all of them.
PICTURES = ("jpeg orientation 6", "png rgba, turned", "png 16-bit gray", "png wide")
OURS = ("safetensors", "stablehlo")  # what runs with jax; the rest with the clients' libraries
TOLERANCE = 1e-4  # absolute, as for every export: features here are normed, similarities below 3


def run_programs(programs):
  """Run programs by name in separate namespaces; return their arrays and printed lines."""
  kept = {}
  for name, code in programs.items():
    scope, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile(code, name, "exec"), scope)
    kept[f"{name}/printed"] = np.array(printed.getvalue())
    image = scope.get("image")
    image = image["pooled"] if isinstance(image, dict) else getattr(image, "pooled", None)
    for what in ("pooled", "similarity", "logits"):
      value = scope.get(what, image if what == "pooled" else None)
      if value is not None:
        kept[f"{name}/{what}"] = np.asarray(value)
  return kept


_SCRIPT = f"""\
import contextlib, io, json, sys
import numpy as np
{inspect.getsource(run_programs)}
np.savez(sys.argv[2], **run_programs(json.load(open(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def releases():
  return {
    name: testing.release(
      config,
      preprocess=PREPROCESS,
      params=testing.random_params(config, SEEDS.get(name, 0)),
      words=testing.words(append_cls=name != "clip"),
    )
    for name, config in MODELS.items()
  }


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  """Return an image of the size of the model: resizing is compared elsewhere."""
  file = tmp_path_factory.mktemp("pictures") / "picture.png"
  for name, data in testing_pictures.every_kind().items():
    file.with_name(name).write_bytes(data)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)
  return file


@pytest.fixture(scope="module")
def results(releases, picture, tmp_path_factory):
  """Return the outputs of all programs of all cards, by "model/format/number/what"."""
  scratch = tmp_path_factory.mktemp("exports")
  programs = {True: {}, False: {}}
  for name, kind in RUNS:
    folder, release = scratch / name / kind, releases[name]
    folder.mkdir(parents=True)
    EXPORTS[kind].write(folder, release)
    if kind == "safetensors":
      _save_tokenizer(folder, release)
    card.write_card(folder, CardFacts(kind, release, "mit"))
    found = snippets.extract((folder / "README.md").read_text("utf-8"))
    for number, (_, library, code) in enumerate(found):
      code = code.replace(snippets.FOLDER, str(folder)).replace(snippets.PICTURE, str(picture))
      code = code.replace("a photo of a dog", TEXTS[0]).replace("a photo of a cat", TEXTS[1])
      programs[library in OURS][f"{name}/{kind}/{number}"] = code
      if name == "released":
        for other in PICTURES:
          changed = code.replace(str(picture), str(picture.with_name(other)))
          programs[library in OURS][f"{other}/{kind}/{number}"] = changed
  (scratch / "programs.json").write_text(json.dumps(programs[False]))
  (scratch / "run.py").write_text(_SCRIPT)
  # Absolute: not one of the scripts of ov_convert.
  client_env.run_client(
    str(scratch / "run.py"), [scratch / "programs.json", scratch / "results.npz"]
  )
  return dict(np.load(scratch / "results.npz")) | run_programs(programs[True])


def _save_tokenizer(folder, release):
  """Write tokenizer/ in the format of ov_data, as the app does."""
  tokenizer, text = ov_data.Tokenizer.from_file(folder / "tokenizer.json"), release.text
  if text is None:
    tokenizer.save(folder / "tokenizer")
  else:
    words = release.words
    processor = ov_data.TextProcessor(
      tokenizer, words.length, words.append_cls, text.pool, text.padding
    )
    processor.save(folder / "tokenizer")


def _pixels(picture):
  mean, std = np.float32(PREPROCESS.mean), np.float32(PREPROCESS.std)
  return (np.asarray(Image.open(picture), np.float32)[None] / 255 - mean) / std


def _ids(release):
  words = release.words
  rows = np.full((len(TEXTS), words.length), words.pad_id)
  for row, text in zip(rows, TEXTS):
    pieces = [words.vocabulary[word] for word in text.split()]
    row[: len(pieces) + 2] = [words.bos_id, *pieces, words.eos_id]
  if words.append_cls:
    rows[:, -1] = words.cls_id
  return rows


def _compared(release, picture):
  """Return ours [1, 2]: similarities, biased similarities, and printed probabilities."""
  model = ov_models.bind(release.config, release.params)
  with jax.default_matmul_precision("highest"):
    image = model.encode_image(_pixels(picture)).unit
    text = model.encode_text(_ids(release)).unit
    similarity = np.asarray(np.exp(release.params["log_scale"]) * image @ text.T)
  logits = similarity + release.params.get("bias", 0)
  sigmoid = "bias" in release.params
  probabilities = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
  return {"similarity": similarity, "logits": logits}, np.asarray(probabilities)


@pytest.fixture(scope="module")
def pooled(releases, picture):
  """Return our features [1, D] by model."""
  return {
    name: np.asarray(ov_models.bind(r.encoder, r.image_params)(_pixels(picture)).pooled)
    for name, r in releases.items()
  }


@pytest.mark.parametrize("name, kind", RUNS)
def test_programs_run_and_give_our_features(results, pooled, name, kind):
  printed = [key for key in results if key.startswith(f"{name}/{kind}/") and "printed" in key]
  assert printed and all(str(results[key]).strip() for key in printed)
  features = [
    value for key, value in results.items() if key.startswith(f"{name}/{kind}/") and "pooled" in key
  ]
  # open_clip returns no features before a head.
  assert features or (kind == "open_clip" and name != "captioner")
  for found in features:
    np.testing.assert_allclose(found, pooled[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name, kind", [r for r in RUNS if r[0] != "captioner" and r[1] != "timm"])
def test_programs_compute_our_similarities(results, releases, picture, name, kind):
  ours, probabilities = _compared(releases[name], picture)
  assert np.ptp(ours["logits"]) > 50 * TOLERANCE  # the texts differ
  found = [
    key.rpartition("/") for key in results
    if key.startswith(f"{name}/{kind}/") and key.endswith(tuple(ours))
  ]  # fmt: skip
  assert len(found) == (2 if kind == "safetensors" else 1)  # JAX and PyTorch
  for program, _, what in found:
    value, printed = results[f"{program}/{what}"], str(results[f"{program}/printed"])
    np.testing.assert_allclose(value, ours[what], atol=TOLERANCE, rtol=0)
    numbers = [float(number) for number in re.findall(r"\d\.\d+", printed)][-2:]
    np.testing.assert_allclose([numbers], probabilities, atol=2e-4, rtol=0)  # of 4 digits


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("kind", EXPORTS)
def test_programs_give_our_features_of_every_kind_of_image(results, releases, picture, name, kind):
  release = releases["released"]
  ours = decode.whole(picture.with_name(name).read_bytes(), SIZE, "squash")
  mean, std = np.float32(PREPROCESS.mean), np.float32(PREPROCESS.std)
  model = ov_models.bind(release.config, release.params)
  out = model.encode_image((ours[None] / np.float32(255) - mean) / std)
  text = model.encode_text(_ids(release)).unit
  expected = {
    "pooled": out.pooled,
    "similarity": np.exp(release.params["log_scale"]) * out.unit @ text.T,
  }
  keys = [key for key in results if key.startswith(f"{name}/{kind}/")]
  found = [
    (results[key], expected[what]) for what in expected for key in keys if key.endswith(what)
  ]
  assert found
  exact = "jpeg" not in name  # whose pixels differ by a level or two: Pillow has no fast DCT
  for theirs, value in found:
    value = np.asarray(value)
    cosine = (theirs * value).sum() / np.linalg.norm(theirs) / np.linalg.norm(value)
    assert cosine > (0.99999 if exact else 0.9995)
    np.testing.assert_allclose(theirs, value, atol=TOLERANCE if exact else 0.1, rtol=0)


def test_all_programs_write_our_caption(results, releases, picture):
  release = releases["captioner"]
  words = release.words
  captions = ov_models.generate(
    ov_models.bind(release.config, release.params), _pixels(picture),
    max_len=release.config.decoder.max_len,
    bos_id=words.bos_id, eos_id=words.eos_id, pad_id=words.pad_id,
  )  # fmt: skip
  ids = [int(i) for i in np.asarray(captions.ids)[0]]
  assert not {words.bos_id, words.eos_id, words.cls_id} & set(ids)  # words all through
  expected = " ".join(words.token(i) for i in ids).replace(" ##", "")
  keys = [f"captioner/{name}/printed" for name in ("safetensors/0", "safetensors/1", "stablehlo/0")]
  lines = [str(results[key]).splitlines()[-1] for key in keys]
  assert lines == [str([expected]), expected, expected]
