"""Suites on small data sets: metrics from predictions, locations, and errors before evaluation."""

import dataclasses
import io
import json
import re
import tarfile
from types import SimpleNamespace

import jax
import numpy as np
from PIL import Image
import pytest

from apps.suite_data import open_suite
from apps.suite_eval import SuiteEvaluator
from apps.trainer.held_out import HeldOut
from apps.trainer.parts import build_parts
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
import ov_data
from ov_data import records
from ov_data import tfds as tfds_folder
import ov_models
import ov_sharding

SIZE = 16
CLASSES = ("cat", "dog", "owl", "bear", "wolf", "seal")
BLOCK = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 1}
SETTINGS = {
  "model.encoder": "mu/16",
  "model.encoder_options": BLOCK,
  "model.text": "Ti",
  "model.text_options": BLOCK,
  "model.decoder": "",
  "model.embed_dim": 8,
  "model.image_size": SIZE,
  "model.token_len": 12,
  "model.vocab_size": 0,
  "loss.caption": 0.0,
  "batch_size": 8,
}


def _image(rng):
  buffer = io.BytesIO()
  # Blocks of one colour differ more for the model than noise.
  pixels = np.kron(rng.integers(0, 255, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


def _npy(values):
  buffer = io.BytesIO()
  np.save(buffer, np.asarray(values))
  return buffer.getvalue()


def _tars(folder, samples, classes=CLASSES, templates=("a {c}",), kind=None):
  (folder / "test").mkdir(parents=True)
  (folder / "test/nshards.txt").write_text("1")
  with tarfile.open(folder / "test/0.tar", "w") as tar:
    for number, sample in enumerate(samples):
      for suffix, data in sample.items():
        info = tarfile.TarInfo(f"s{number:04}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  if classes:
    (folder / "classnames.txt").write_text("\n".join(classes))
  if templates:
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
  if kind:
    (folder / "dataset_type.txt").write_text(kind)


def _labeled(count, rng, classes=6, **more):
  return [
    {"png": _image(rng), "cls": str(rng.integers(0, classes)).encode(), **more}
    for _ in range(count)
  ]


@pytest.fixture(scope="module")
def model():
  """Configuration, parts, mesh, tokenizer and random params of a tiny model."""
  config = RunConfig().with_settings(SETTINGS)
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig())
  words = [*CLASSES, "a photo of the number an owl next to two dogs"]
  tokenizer = ov_data.Tokenizer.train(words, 200)
  task = build_parts(config, tokenizer, mesh).task
  params = jax.tree.map(np.asarray, ov_models.init(task.model, jax.random.key(1)))
  scale = lambda path, leaf: leaf * 4 if path[-1].key == "kernel" else leaf
  return config, task, mesh, tokenizer, jax.tree_util.tree_map_with_path(scale, params)


def _held_out(model, root, suite, file=None, **settings):
  config, task, mesh, tokenizer, _ = model
  settings = {f"eval.{name}": value for name, value in settings.items()}
  config = config.with_settings({"eval.suite": suite, "eval.suite_dir": str(root), **settings})
  terminal = Terminal(file=file or io.StringIO())
  return HeldOut(config, task, tokenizer, mesh, terminal, run="run7")


def _evaluate(model, root, suite, **settings):
  evaluation = SuiteEvaluator(_held_out(model, root, suite, **settings))(model[-1])
  return {result.name: result for result in evaluation.results}, evaluation.files


def test_metrics_of_groups(model, tmp_path):
  rng = np.random.default_rng(0)
  metadata = np.stack([rng.integers(0, 4, 60), rng.integers(14, 17, 60), np.zeros(60, int)], 1)
  for name in ("wds_wilds-fmow_test", "wds_dollar_street_test", "wds_wilds-iwildcam_test"):
    samples = _labeled(60, rng)
    for sample, row in zip(samples, metadata, strict=True):
      sample["npy"] = _npy(row)
    _tars(tmp_path / name, samples)
  found, files = _evaluate(model, tmp_path, "datacomp38", per_example=str(tmp_path / "examples"))
  lines = (tmp_path / "examples/suite_wilds-fmow.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  right = np.array([row["rank"] == 0 for row in rows])
  assert 0 < right.mean() < 1 and [row["index"] for row in rows] == list(range(60))
  by_region = {g: right[metadata[:, 0] == g].mean() for g in range(4)}
  by_year = {g: right[metadata[:, 1] == g].mean() for g in range(14, 17)}
  for group, value in by_region.items():
    assert found[f"wilds/fmow/acc_region:{group}"].value == pytest.approx(value)
  assert found["wilds/fmow/acc_worst_region"].value == pytest.approx(min(by_region.values()))
  assert found["wilds/fmow/acc_worst_year"].value == pytest.approx(min(by_year.values()))
  assert found["wilds/fmow/acc_avg"].value == found["wilds/fmow/acc1"].value
  lines = (tmp_path / "examples/suite_fairness-dollar_street.jsonl").read_text().splitlines()
  five = np.array([json.loads(line)["rank"] < 5 for line in lines])
  worst = min(five[metadata[:, 0] == g].mean() for g in range(4))
  assert found["fairness/dollar_street/acc_top5_wg"].value == pytest.approx(worst)
  lines = (tmp_path / "examples/suite_wilds-iwildcam.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  scores = []
  for c in {row["label"] for row in rows}:
    true, shown = ({i for i, r in enumerate(rows) if r[key] == c} for key in ("label", "predicted"))
    scores.append(2 * len(true & shown) / (len(true) + len(shown)))
  assert found["wilds/iwildcam/F1-macro_all"].value == pytest.approx(np.mean(scores))
  content = json.loads(files["clip_benchmark/wilds-fmow.json"])
  assert content["metrics"]["acc_worst_region"] == min(by_region.values())
  assert (content["dataset"], content["pretrained"]) == ("wds/wilds/fmow", "run7")
  assert len(found["datacomp38/data_sets"].context["missing"]) == 35


def test_associations(model, tmp_path):
  rng = np.random.default_rng(1)
  folder = tmp_path / "winogavil"
  (folder / "images").mkdir(parents=True)
  names = [f"i{number}" for number in range(24)]
  for name in names:
    (folder / f"images/{name}.jpg").write_bytes(_image(rng))
  rows = []
  for number in range(12):
    some = rng.choice(names, 5 if number < 8 else 12, replace=False).tolist()
    rows.append({"cue": CLASSES[number % 6], "candidates": some, "associations": some[:3]})
  (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
  found, _ = _evaluate(model, tmp_path, "datacomp38", suite_datasets=("misc/winogavil",))
  mean, five, twelve = (
    found[f"misc/winogavil/{name}"]
    for name in ("avg_jaccard_score", "jaccard_score_5-6", "jaccard_score_10-12")
  )
  assert (mean.count, five.count, twelve.count) == (12, 8, 4)
  assert mean.value == pytest.approx((8 * five.value + 4 * twelve.value) / 12)
  assert 0 < five.value < 1 and "datacomp38/mean" not in found


def _cifar10(folder, count):
  """Write the test split of cifar10 as TFDS does."""
  tfds = pytest.importorskip("tensorflow_datasets")
  names = [f"animal {number}" for number in range(10)]
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
      "label": tfds.features.ClassLabel(names=names),
    }
  )
  folder.mkdir(parents=True)
  rng = np.random.default_rng(2)
  examples = [
    {"image": rng.integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8), "label": i % 10}
    for i in range(count)
  ]
  data = [features.serialize_example(features.encode_example(e)) for e in examples]
  (folder / "cifar10-test.tfrecord-00000-of-00001").write_bytes(b"".join(map(records.frame, data)))
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name="cifar10", split="test", filetype_suffix="tfrecord"
  )
  split = tfds.core.SplitInfo(
    name="test", shard_lengths=[count], num_bytes=0, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=[split], filename_template=template
  )


def test_tfds(model, tmp_path):
  pytest.importorskip("tensorflow")  # TFDS imports without it, but cannot write
  _cifar10(tmp_path / "cifar10/2.9.0", 10)
  _cifar10(tmp_path / "cifar10/3.0.10", 20)
  held_out = _held_out(model, tmp_path, "clip_benchmark", suite_examples=16)
  opened, missing = open_suite(held_out)
  assert [data.data_set.name for data in opened] == ["vtab/cifar10"] and len(missing) == 46
  assert opened[0].classes[:2] == ("animal 0", "animal 1") and len(opened[0].templates) == 18
  found, files = _evaluate(model, tmp_path, "clip_benchmark", suite_examples=16)
  assert found["vtab/cifar10/acc1"].count == 16  # of the newest version
  with pytest.raises(ValueError, match="no class names for feature 'image'"):
    tfds_folder.label_names(str(tmp_path / "cifar10/3.0.10"), "image")
  assert json.loads(files["clip_benchmark/vtab-cifar10.json"])["dataset"] == "vtab/cifar10"


def test_lists_of_the_wheel_and_mean_of_a_complete_suite(model, tmp_path, monkeypatch):
  rng = np.random.default_rng(3)
  _tars(tmp_path / "wds_vtab-pets", _labeled(6, rng, 37), classes=(), templates=())
  output = io.StringIO()
  held_out = _held_out(model, tmp_path, "vtab", output)
  (opened,), missing = open_suite(held_out)
  assert len(opened.classes) == 37 and opened.classes[0] == "Abyssinian"
  assert opened.templates == ("a photo of a {c}, a type of pet.",)
  SuiteEvaluator(held_out)
  assert re.search(r"suite vtab: 1 of 19 data sets found; missing in .*: vtab/caltech101, ",
                   output.getvalue())  # fmt: skip
  suites = {"vtab": [opened.data_set]}
  monkeypatch.setattr("ov_eval.SUITES", suites)
  found, _ = _evaluate(model, tmp_path, "vtab")
  assert found["vtab/mean"].value == found["vtab/pets/acc1"].value
  assert found["vtab/data_sets"].context["missing"] == []


def _set(folder, name, text):
  (folder / name).write_text(text)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda f: _set(f, "classnames.txt", "a\nb"),
      r"txt has 2 class names, and the sample at",
    ),
    (lambda f: _set(f, "classnames.txt", "a"), "has 1 class names; expected at least two"),
    (
      lambda f: (f / "classnames.txt").unlink(),
      "classnames.txt is missing, and clip-be",
    ),
    (lambda f: _set(f, "classnames.txt", ""), r"classnames\.txt is empty"),
    (
      lambda f: _set(f, "zeroshot_classification_templates.txt", "a {}"),
      "has no {c} for",
    ),
    (
      lambda f: _set(f, "dataset_type.txt", "retrieval"),
      "retrieval, but vtab/dtd is a cla",
    ),
    (
      lambda f: _set(f, "dataset_type.txt", "multilabel"),
      "feature 'npy' is in none of the",
    ),
    (lambda f: _set(f, "test/nshards.txt", "2"), r"1\.tar: the tar is missing"),
    (lambda f: (f / "test/0.tar").write_bytes(b"x" * 900), r"0\.tar: not a readable tar file"),
  ],
)
def test_errors_of_a_data_set(model, tmp_path, change, message):
  folder = tmp_path / "wds_vtab-dtd"
  _tars(folder, _labeled(9, np.random.default_rng(4)))
  open_suite(_held_out(model, tmp_path, "vtab"))
  change(folder)
  with pytest.raises(ValueError, match=message) as raised:
    open_suite(_held_out(model, tmp_path, "vtab"))
  assert "\n" not in str(raised.value)


def test_errors_of_settings(model, tmp_path):
  for root, settings, message in (
    ("", {}, "config.eval.suite=vtab requires config.eval.suite_dir, the folder"),
    ("gs://bucket/sets", {}, "config.eval.suite_dir=gs://bucket/sets is remote; copy the data"),
    (tmp_path / "none", {}, "config.eval.suite_dir=.*none: no such folder"),
    (
      tmp_path,
      {},
      "contains none of the 19 data sets of vtab; expected folders such as wds_",
    ),
    (tmp_path, {"suite_datasets": ("mnist",)}, "'mnist' is not a data set of vtab, but of clip"),
  ):
    with pytest.raises(ValueError, match=message):
      open_suite(_held_out(model, root, "vtab", **settings))
  with pytest.raises(ValueError, match="expected one of clip_benchmark, datacomp38, vtab"):
    _held_out(model, tmp_path, "vtap")
  with pytest.raises(ValueError, match="'vtab/petz'; expected a data set of a suite"):
    _held_out(model, tmp_path, "vtab", suite_datasets=("vtab/petz",))


def test_a_model_without_text_tower(model, tmp_path):
  held_out = _held_out(model, tmp_path, "vtab")
  captioner = ov_models.VisionLanguageConfig.openvision2("mu/16", "Ti", image_size=SIZE)
  other = dataclasses.replace(held_out, task=SimpleNamespace(model=captioner))
  with pytest.raises(ValueError, match="config.eval.suite=vtab requires a model with a text tower"):
    SuiteEvaluator(other)


def test_multilabel_with_a_wrong_number_of_labels(model, tmp_path):
  rng = np.random.default_rng(5)
  samples = [{"png": _image(rng), "npy": _npy([1, 0, 1])} for _ in range(5)]
  _tars(tmp_path / "voc2007_multilabel", samples, kind="multilabel")
  with pytest.raises(ValueError, match="has 6 class names, and the sample at byte .* has 3 labels"):
    open_suite(_held_out(model, tmp_path, "clip_benchmark"))
