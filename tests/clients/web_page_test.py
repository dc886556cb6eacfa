"""Tests of the static web page as a user exports it; apps/exporter/web_test tests its modules."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from apps.exporter import probe
from apps.exporter.formats import web
from apps.exporter.source import load_source
from ov_data import decode
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


def runtime_folder(folder, version=web.RUNTIME):
  """Write a folder with the layout of the npm package."""
  (folder / "dist").mkdir(parents=True)
  for name in web.RUNTIME_FILES:
    (folder / "dist" / name).write_text(name)
  name, _, number = version.partition("@")
  (folder / "package.json").write_text(json.dumps({"name": name, "version": number}))
  return folder


def export(workdir, out, *flags, cache):
  return run(
    f"--workdir={workdir}", "--format=web", f"--out={out}", *flags, cache=cache, app=EXPORT,
    timeout=800,
  )  # fmt: skip


def test_the_page_is_complete(workdir, cache, tmp_path):
  photos = tmp_path / "photos" / "sub"
  photos.mkdir(parents=True)
  for number, data in enumerate(probe.pictures(None, 5)):
    (photos / f"{number} <b>.jpg").write_bytes(data)
  out, runtime = tmp_path / "out", runtime_folder(tmp_path / "package")
  code, printed = export(
    workdir, out, "--web_weights=int8", f"--web_images={photos.parent}", f"--web_runtime={runtime}",
    cache=cache,
  )  # fmt: skip
  assert code == 0, printed
  folder = out / "web"
  page = json.loads((folder / "page.json").read_text())
  assert page["images"] == [f"sub/{number} <b>.jpg" for number in range(5)]
  assert page["texts"] and page["canonical"] and page["runtime"] == web.RUNTIME
  assert json.loads((folder / "parity.json").read_text())["accuracy"]["ok"]
  assert {file.name for file in (folder / "ort").iterdir()} == set(web.RUNTIME_FILES)

  for file in folder.rglob("*"):  # nothing tells where the files came from
    assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file

  # The vectors are the embeddings of the images.
  source = load_source(workdir)
  pre = source.release.preprocess
  images = [decode.whole(data, pre.image_size, pre.fit) for data in probe.pictures(None, 5)]
  inputs = {"pixels": probe.normalise(np.stack(images), pre)}
  assert source.processor is not None
  inputs["ids"] = source.processor.encode(["a"])
  inputs["image/pixels"] = inputs["pixels"]
  want = probe.our_outputs(source.release, inputs, None)["image/embedding"]
  found = np.fromfile(folder / "images/vectors.bin", "<f4").reshape(5, page["dim"])
  np.testing.assert_allclose(found, want, atol=1e-5)  # float32 matmuls in another precision mode
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
  for number in range(5):
    assert max(Image.open(folder / f"images/{number}.jpg").size) == web.THUMBNAIL or number == 2

  # All files that the page loads exist, and none is from another origin.
  html = (folder / "index.html").read_text()
  for name in re.findall(r'(?:src|href)="([^"]+)"', html):
    assert (folder / name).is_file(), name
  for name in re.findall(r'from "\./([^"]+)"', (folder / "backend.js").read_text()):
    assert (folder / name).is_file(), name
  own = ("index.html", "app.js", "backend.js", "preprocess.js", "start.js", "tokenizer.js")
  text = "".join((folder / name).read_text() for name in (*own, "style.css"))
  assert set(re.findall(r"https?://[\w.]+", text)) == {"http://localhost", "http://page"}
  used = set(re.findall(r'\$\("(\w+)"\)', (folder / "app.js").read_text()))
  assert used <= set(re.findall(r'id="(\w+)"', html)), "index.html lacks elements of app.js"


def test_mistakes_give_one_line_errors(workdir, cache, tmp_path):
  (tmp_path / "empty").mkdir()
  old = runtime_folder(tmp_path / "old", "onnxruntime-web@1.2.3")
  for flag, said in (
    (f"--web_images={tmp_path / 'none'}", "--web_images=.*does not exist; expected a folder"),
    (f"--web_images={tmp_path / 'empty'}", "has 0 images, expected 1 to 5,000"),
    (f"--web_runtime={tmp_path / 'empty'}", "no file dist/ort.wasm.min.mjs; run `npm pack onnx"),
    (f"--web_runtime={old}", "is onnxruntime-web@1.2.3, expected onnxruntime-web@"),
    ("--web_weights=int5", "weights='int5'; expected one of"),
  ):
    code, printed = export(workdir, tmp_path / "out", flag, cache=cache)
    expect_one_line(printed, code, said)
  assert not (tmp_path / "out").exists()
