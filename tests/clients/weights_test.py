"""Tests of ONNX exports with smaller weights, as a user runs them."""

import json

import pytest

from tests.clients.random_models import TINY_CLIP, make_workdir
from tests.end_to_end.runner import CAPTION_TRAIN, expect_one_line, run

EXPORT = CAPTION_TRAIN.parent / "export.py"  # importing it would define --workdir twice


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "workdir"
  make_workdir(folder, TINY_CLIP)
  return folder


def export(workdir, out, *flags, cache):
  return run(
    f"--workdir={workdir}", "--format=onnx", f"--out={out}", *flags, cache=cache, app=EXPORT,
    timeout=800,
  )  # fmt: skip


def test_int8_is_measured_on_many_images_and_texts(workdir, cache, tmp_path):
  out = tmp_path / "out"
  code, printed = export(workdir, out, "--onnx_weights=int8", cache=cache)
  assert code == 0, printed
  facts = json.loads((out / "onnx/parity.json").read_text())
  assert facts["weights"] == "int8" and facts["min_cosine"] == 0.98
  found = facts["accuracy"]
  assert found["ok"] and found["count"] == {"image": 64, "text": 64}
  assert 0 < found["overlap"] <= 1 and 0 < found["zero_shot_agreement"] <= 1
  assert found["size"] < found["float32_size"]
  card = (out / "onnx/README.md").read_text()
  assert "smallest cosine of 64 image embeddings" in card and "dtype of the files | int8" in card
  assert "overlap of the 10 nearest images" in card and "speed of the text tower" in card


def test_weights_below_the_bar_are_refused_and_leave_no_folder(workdir, cache, tmp_path):
  out = tmp_path / "out"
  code, printed = export(
    workdir, out, "--onnx_weights=int4", "--onnx_min_cosine=0.99999", cache=cache
  )
  assert code == 1 and "Traceback" not in printed
  last = printed.strip().splitlines()[-1]
  assert "no folder was kept: onnx: the smallest cosine of" in last
  assert "expected at least 0.99999" in last and "choose a larger type with --onnx_weights" in last
  assert list(tmp_path.iterdir()) == []


def test_mistakes_give_one_line_errors(workdir, cache, tmp_path):
  for flags, said in (
    (["--onnx_weights=int5"], "weights='int5'; expected one of float32, float16, int8, int4"),
    (["--onnx_min_cosine=0.9"], "--onnx_min_cosine=0.9 has no effect without --onnx_weights"),
    (["--onnx_weights=int8", "--onnx_min_agreement=2"], "min_agreement=2.0; expected a fraction"),
    (["--onnx_weights=int8", "--onnx_min_cosine=2"], "min_cosine=2.0; expected a cosine from"),
  ):
    code, printed = export(workdir, tmp_path / "out", *flags, cache=cache)
    expect_one_line(printed, code, said)
  assert list(tmp_path.iterdir()) == []
