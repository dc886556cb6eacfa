"""Reading of index folders, damage, and search against brute force."""

import json

import msgspec
import numpy as np
import pytest

import ov_serve
from ov_serve import index, search
from ov_serve.testing.models import write_images, write_model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("built")
  model = ov_serve.Model.load(write_model(folder / "model", caption=False))
  images = write_images(folder / "photos", range(40), captions=True)
  dataset = ov_serve.open_images(str(images))
  ov_serve.embed(model, dataset, folder / "index", batch_size=16, graph=True)
  return model, folder / "index"


@pytest.fixture
def copy(built, tmp_path):
  for file in built[1].iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  return tmp_path


def unit(rng, rows, dim):
  vectors = rng.normal(size=(rows, dim))
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("method", ["exact", "graph", "auto"])
def test_search_equals_brute_force(built, method):
  index = ov_serve.Index.open(built[1])
  queries = unit(np.random.default_rng(0), 5, index.info.dim)
  scores = queries.astype(np.float16).astype(np.float64) @ index.vectors.astype(np.float64).T
  for query, hits in enumerate(index.search(queries, 7, method=method)):
    assert [hit.row for hit in hits] == np.argsort(-scores[query])[:7].tolist()
    # The library sums products of float16 values in float32.
    np.testing.assert_allclose([h.score for h in hits], np.sort(scores[query])[:-8:-1], atol=1e-5)


def test_the_text_of_an_image_is_found_by_its_vector(built):
  model, folder = built
  index = ov_serve.Index.open(folder)
  [hits] = index.search(model.embed_texts(["a red square"]), k=1000)
  assert len(hits) == 40
  assert sorted(hit.row for hit in hits) == list(range(40))


def test_the_graph_has_a_measured_recall(built):
  # 40 vectors with 16 neighbours each: the graph is exact.
  assert ov_serve.Index.open(built[1]).info.recall_at_10 == 1.0


def test_recall_of_a_larger_graph_is_measured_against_brute_force():
  vectors = unit(np.random.default_rng(1), 3000, 32).astype(np.float16)
  graph = search.build_graph(vectors)
  rows = np.arange(0, 3000, 11)[:256]
  scores = vectors[rows].astype(np.float32) @ vectors.astype(np.float32).T
  scores[np.arange(len(rows)), rows] = -2  # not the query itself
  right = np.argsort(-scores, axis=1)[:, :10]
  found = search.with_graph(graph, vectors[rows], 11)[0]
  hits = sum(
    len({*want} & ({*have} - {row}))
    for row, want, have in zip(rows.tolist(), right.tolist(), found.tolist(), strict=True)
  )
  # Vectors with equal scores after rounding to float16 may replace each other.
  assert search.recall(graph, vectors) == pytest.approx(hits / right.size, abs=0.01)
  assert hits / right.size > 0.9


def test_a_graph_built_by_one_thread_is_always_the_same(tmp_path):
  vectors = unit(np.random.default_rng(2), 500, 16).astype(np.float16)
  for name in ("a", "b"):
    search.build_graph(vectors).save(str(tmp_path / name))
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wrong_queries_are_rejected(built):
  index = ov_serve.Index.open(built[1])
  with pytest.raises(ValueError, match="size 7, and the index 24"):
    index.search(np.ones((1, 7)))
  with pytest.raises(ValueError, match="k=0"):
    index.search(np.ones((1, 24)), 0)
  with pytest.raises(IndexError, match="rows 0 to 39"):
    index.record(40)
  with pytest.raises(IndexError):
    index.record(-1)


@pytest.mark.parametrize("name", ["vectors", "records", "errors", "graph"])
def test_a_truncated_file_is_reported(copy, name):
  [file] = copy.glob(f"{name}-*")
  if not file.stat().st_size:
    file.write_bytes(b"more\n")
  else:
    file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=rf"{name}-.* bytes, not .*embed"):
    ov_serve.Index.open(copy)


def test_a_flipped_bit_is_found_by_verification(copy):
  [file] = copy.glob("vectors-*")
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  ov_serve.Index.open(copy)
  with pytest.raises(ValueError, match="checksum differs"):
    ov_serve.Index.open(copy, verify=True)


def test_a_pickle_is_never_loaded(copy):
  [file] = copy.glob("vectors-*")
  size = file.stat().st_size
  np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
  file.write_bytes(file.read_bytes().ljust(size, b"\0")[:size])
  with pytest.raises(ValueError, match="damaged|pickle"):
    ov_serve.Index.open(copy)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": 99}, "format 99; this version reads up to 1"),
    ({"count": 39}, "its checksum differs"),
    ({"dim": "wide"}, "cannot be read"),
    ({"surprise": 1}, "cannot be read"),
  ],
)
def test_a_changed_index_file_is_rejected(copy, change, message):
  content = json.loads((copy / "index.json").read_text())
  (copy / "index.json").write_text(json.dumps(content | change))
  with pytest.raises(ValueError, match=message):
    ov_serve.Index.open(copy)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"count": 39}, "has 39 vectors of size 24, but the files have 40"),
    ({"vectors": index.FileEntry("../x", 1, "")}, "plain name"),
  ],
)
def test_an_index_file_with_wrong_fields_is_rejected(copy, change, message):
  index.write_info(copy, msgspec.structs.replace(index.read_info(copy), **change))
  with pytest.raises(ValueError, match=message):
    ov_serve.Index.open(copy)


def test_an_empty_folder_has_no_index(tmp_path):
  with pytest.raises(FileNotFoundError, match="no index.*embed images first"):
    ov_serve.Index.open(tmp_path)


def test_evaluation_requires_the_model_of_the_index(built, tmp_path):
  other = ov_serve.Model.load(write_model(tmp_path / "other"))
  with pytest.raises(ValueError, match="embed the images again"):
    ov_serve.evaluate(ov_serve.Index.open(built[1]), other)
