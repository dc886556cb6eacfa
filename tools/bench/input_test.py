"""The ways to make batches make the same ones, and what runs in processes answers for its part."""

from pathlib import Path

import numpy as np
import pytest

from tools.bench import input as loading
from tools.bench import input_data, input_peers, input_process
from tools.bench.input_data import BATCH, Kind

_KIND = Kind((64, 48), "JPEG", 2 * BATCH, 4)
_PX = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> input_data.Data:
  return input_data.Data(tmp_path_factory.mktemp("data"))


def _pass(batches) -> tuple[np.ndarray, np.ndarray]:
  """Pictures and texts of a pass, the latter sorted: every way has an order of its own."""
  batches = list(batches)
  assert len(batches) == _KIND.records // BATCH
  ids = np.concatenate([batch["ids"] for batch in batches])
  return np.concatenate([batch["image"] for batch in batches]), ids[np.lexsort(ids.T)]


@pytest.mark.parametrize("peer", ["pillow", "tf_data"])
def test_peers_make_the_same_batches(peer, data):
  if peer == "tf_data" and not input_peers.has_tensorflow():
    pytest.skip("TensorFlow is not installed")
  folder = data.of(_KIND)
  loader = input_data.open_loader(folder, data.tokenizer, image_size=_PX, passes=1)
  image, ids = _pass(loader)
  one_pass = getattr(input_peers, peer)(folder, _PX, 2, data.tokenizer)
  for _ in range(2):  # as often as wanted
    peer_image, peer_ids = _pass(one_pass())
    np.testing.assert_array_equal(peer_ids, ids)
    assert peer_image.shape == image.shape and peer_image.dtype == image.dtype
    # Crops of 40% and more of the same pictures: their means differ by a few of 255, where pictures
    # in floats of 0 to 1 or in another order of channels and sides would not.
    np.testing.assert_allclose(peer_image.mean((0, 1, 2)), image.mean((0, 1, 2)), atol=8)


def test_pictures_are_of_their_format_and_size():
  for kind, begin in {"JPEG": b"\xff\xd8", "WebP": b"RIFF", "PNG": b"\x89PNG"}.items():
    pictures = input_data.encoded(Kind((64, 48), kind, BATCH, 2))
    assert len(set(pictures)) == 2
    assert all(picture.startswith(begin) for picture in pictures)
    assert input_peers.full_decode(pictures, 6, threads=2) == 6


def test_processes_load_their_rows(data):
  places = {"folder": str(data.of(_KIND)), "tokenizer": str(data.tokenizer), "image_size": _PX}
  arguments = [{**places, "rows": rows} for rows in [(0, 16), (16, BATCH)]]
  found, clock = input_process.run("one_pass", arguments)
  assert [one["images"] for one in found] == [2 * 16, 2 * (BATCH - 16)]
  assert clock > 0 and all(one["cpu_s"] > 0 and one["resident_mib"] > 1 for one in found)
  (found,), _ = input_process.run("first_batch", [places], imported=False)
  assert found["cpu_s"] > 0


def test_a_process_that_fails_is_told(data, capfd):
  places = {"folder": "nowhere", "tokenizer": str(data.tokenizer), "image_size": _PX}
  with pytest.raises(RuntimeError, match="first_batch.* ended with 1"):
    input_process.run("first_batch", [places])
  assert "no shards at nowhere" in capfd.readouterr().err


def test_resuming_and_many_steps(monkeypatch, tmp_path: Path):
  for module in (loading, input_data):
    monkeypatch.setattr(module, "TINY_RECORDS", 1000)
  data = input_data.Data(tmp_path)
  real = loading._resume(data, shards=3, copies=1)  # raises where the row is another
  simulated = loading._resume(data, shards=1, copies=5)
  for found in (real, simulated, loading._many_steps(data, 3)):
    assert found["resident_mib"] > 1


@pytest.mark.parametrize("tensorflow", [True, False])
def test_what_is_declared_fits_together(tensorflow, monkeypatch, tmp_path: Path):
  monkeypatch.setattr(input_peers, "has_tensorflow", lambda: tensorflow)
  for make in (loading.make, loading.make_memory):
    benchmark = make(tmp_path)
    names = [case.name for case in benchmark.cases]
    assert len(set(names)) == len(names)
    assert benchmark.only(lambda _: True) == benchmark  # every ratio, goal and point has its row
    if make is loading.make:
      assert any("tf.data" in name for name in names) == tensorflow
      assert bool(benchmark.notes) != tensorflow
  assert not any(tmp_path.iterdir())  # nothing is written before it is wanted
