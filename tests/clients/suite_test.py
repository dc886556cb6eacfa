"""Benchmark suites against CLIP_benchmark, which evaluates the open_clip export of the same model.

The model has random weights, the data sets are drawn, and both sides read the same files. The
images have the size of the model or are resized by both sides.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from apps.trainer.sinks import read_metrics
from ov_convert import client_env
import ov_eval
import ov_models
from tests.clients.drawn_benchmarks import write_all
from tests.clients.random_models import make_workdir
from tests.end_to_end.runner import CLIP_DEMO, CLIP_TRAIN, run

EXPORT = CLIP_TRAIN.parent / "export.py"
CLIENT = Path(__file__).with_name("run_clip_benchmark.py")
SIZE = 32
SETS = (
  "vtab/dtd", "vtab/pcam", "voc2007_multilabel", "flickr8k", "sugar_crepe/swap_att", "winoground",
)  # fmt: skip
# CLIP_benchmark sums in float32; its mean of up to 100 values has an error below 1e-6.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """Evaluate the same model with both sides; return the folders of their JSON files."""
  root = tmp_path_factory.mktemp("suite")
  imported, run_dir, cache = root / "imported", root / "run", root / "home"
  cache.mkdir()
  config = ov_models.VisionLanguageConfig.from_names(
    "mu/16", "Ti", None, image_size=SIZE, text_len=24, vocab_size=400, preset="openvision_released"
  )
  block = {"width": 64, "depth": 4, "mlp_dim": 128, "num_heads": 4}
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, **block))
  make_workdir(imported, config, kernel_scale=3.0)
  entries = write_all(root / "data", SIZE)
  assert tuple(entry["name"] for entry in entries) == SETS
  code, printed = run(
    f"--workdir={run_dir}", f"--config={CLIP_DEMO}:runlocal,loss=clip", "--config.eval_only=True",
    "--config.input.demo.train_examples=0", "--config.input.fit=crop",
    f"--config.init_from.path={imported}", f"--config.tokenizer.path={imported}/tokenizer",
    "--config.model.encoder=mu/16", "--config.model.encoder_options={}",
    "--config.model.text=Ti", f"--config.model.text_options={block}", "--config.model.embed_dim=0",
    f"--config.model.image_size={SIZE}", "--config.model.token_len=24",
    "--config.model.vocab_size=400", "--config.model.preset=openvision_released",
    "--config.eval.batch_size=16",
    "--config.eval.suite=clip_benchmark", f"--config.eval.suite_dir={root}/data",
    cache=cache, app=CLIP_TRAIN,
  )  # fmt: skip
  assert code == 0, printed
  assert "6 of 47 data sets found; missing in" in printed and "imagenet1k, " in printed
  code, printed = run(
    f"--workdir={imported}", "--format=open_clip", f"--out={root}/out",
    cache=cache, app=EXPORT, timeout=800,
  )  # fmt: skip
  assert code == 0, printed
  theirs = root / "theirs"
  theirs.mkdir()
  client_env.run_client(
    str(CLIENT), ["evaluate", f"local-dir:{root}/out/open_clip", root / "data", theirs]
  )
  return run_dir, theirs


@pytest.mark.parametrize("name", SETS)
def test_metrics_equal_those_of_clip_benchmark(name, both):
  run_dir, theirs = both
  file = name.replace("/", "-") + ".json"
  own = json.loads((run_dir / "clip_benchmark" / file).read_text())
  other = json.loads((theirs / file).read_text())
  for key, value in other["metrics"].items():
    if math.isnan(value):
      assert own["metrics"][key] is None
    else:
      assert own["metrics"][key] == pytest.approx(value, abs=TOLERANCE), key
  if name != "winoground":  # read without the command line of CLIP_benchmark
    assert {k: own[k] for k in ("dataset", "task", "language")} == {
      k: other[k] for k in ("dataset", "task", "language")
    }
  values = [value for value in own["metrics"].values() if value is not None]
  assert any(0 < value < 1 for value in values)  # metrics of a constant prediction prove little


def test_results_of_the_run(both):
  run_dir, _ = both
  found = ov_eval.read_results(run_dir / "evaluation.json")
  by_name = {result.name: result for result in found.results}
  files = (run_dir / "clip_benchmark").iterdir()
  for path in files:
    content = json.loads(path.read_text())
    name = content["dataset"].removeprefix("wds/")
    for key, value in content["metrics"].items():
      assert value is None or by_name[f"{name}/{key}"].value == value
  count = by_name["clip_benchmark/data_sets"]
  assert count.value == len(SETS) and len(count.context["missing"]) == 47 - len(SETS)
  assert "clip_benchmark/mean" not in by_name  # the suite is not complete
  assert by_name["vtab/dtd/acc1"].count == 70
  assert all(0 < by_name[f"vtab/{name}/acc1"].value < 1 for name in ("dtd", "pcam"))
  assert not (run_dir / "metrics.jsonl").exists() or not read_metrics(run_dir / "metrics.jsonl")


def test_functions_equal_those_of_clip_benchmark(tmp_path):
  rng = np.random.default_rng(0)
  images, texts = rng.normal(size=(2, 40, 8)).astype(np.float32)
  texts = np.concatenate([texts, rng.normal(size=(30, 8)).astype(np.float32)])
  owner = np.concatenate([np.arange(40), rng.integers(0, 40, 30)])
  arrays = {
    "scores": rng.normal(size=(60, 9)).astype(np.float32),
    "labels": rng.integers(0, 9, 60),
    "targets": rng.integers(0, 2, (60, 9)) * (np.arange(9) < 8),  # the last class has no image
    "similarity": texts @ images.T,
    "positive": owner[:, None] == np.arange(40),
  }
  np.savez(tmp_path / "arrays.npz", **arrays)
  client_env.run_client(str(CLIENT), ["functions", tmp_path / "arrays.npz", tmp_path / "out.json"])
  theirs = json.loads((tmp_path / "out.json").read_text())
  np.testing.assert_allclose(
    ov_eval.average_precision(arrays["scores"], arrays["targets"]),
    theirs["average_precision"],
    rtol=0,
    atol=TOLERANCE,
  )
  own = ov_eval.Classification.of(arrays["scores"], arrays["labels"], np.ones(60, bool))
  assert [own.top1.value, own.top5.value] == pytest.approx(theirs["accuracy"], abs=1e-12)
  ranks = ov_eval.retrieval(images, texts, owner)
  for i, k in enumerate((1, 5, 10)):
    np.testing.assert_array_equal(ranks.txt2img.hits(k), theirs["image_recall"][i])
    np.testing.assert_array_equal(ranks.img2txt.hits(k), theirs["text_recall"][i])

  # The suites contain the collections of the library.
  collections = {name: set(members) for name, members in theirs["collections"].items()}
  suites = {name: {s.name for s in sets} for name, sets in ov_eval.SUITES.items()}
  assert suites["vtab"] == collections["vtab"]
  joined = set().union(*(collections[name] for name in ("vtab+", "retrieval", "sugar_crepe")))
  assert suites["clip_benchmark"] == joined | {"winoground"}
