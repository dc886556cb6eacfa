"""Embedding of folders: resume, incremental updates, bad images, several hosts."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import ov_data
import ov_eval
import ov_serve
from ov_serve.testing.models import jpeg, write_images, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
  return ov_serve.Model.load(folder)


def contents(index):
  """Return the SHA-256 of every file of an index, by name."""
  return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in index.iterdir()}


def embed(model, images, out, **options):
  source = ov_serve.find_source(str(images))
  return ov_serve.embed(model, source, out, batch_size=4, part_records=8, **options)


def test_vectors_are_those_of_the_model_in_order_of_the_source(model, tmp_path):
  images = write_images(tmp_path / "photos", range(19), captions=True)
  summary = embed(model, images, tmp_path / "index")
  assert (summary.count, summary.embedded, summary.bad) == (19, 19, {})
  index = ov_serve.Index.open(tmp_path / "index", verify=True)
  for row, entry in enumerate(index.records()):
    assert (entry.record, entry.key) == (row, f"{row:03}.jpg")
    assert entry.captions[0].endswith(f", {row}")
    vector = model.embed_images(model.decode(jpeg(row))[None])[0]
    # float16 rounds to 11 bits, and another batch size may change the last bits of float32.
    np.testing.assert_allclose(index.vectors[row].astype(np.float32), vector, atol=6e-4)


def test_images_without_captions_in_subfolders(model, tmp_path):
  write_images(tmp_path / "photos", range(3))
  write_images(tmp_path / "photos" / "deep", range(3, 5))
  summary = embed(model, tmp_path / "photos", tmp_path / "index")
  keys = [entry.key for entry in ov_serve.Index.open(tmp_path / "index").records()]
  assert summary.count == 5
  assert keys == ["000.jpg", "001.jpg", "002.jpg", "deep/003.jpg", "deep/004.jpg"]


def test_class_folders_keep_their_class(model, tmp_path):
  write_images(tmp_path / "photos" / "cat", range(3))
  write_images(tmp_path / "photos" / "dog", range(3, 5))
  embed(model, tmp_path / "photos", tmp_path / "index")
  found = {
    e.key: (e.label, e.class_name) for e in ov_serve.Index.open(tmp_path / "index").records()
  }
  assert found["cat/001.jpg"] == (0, "cat")
  assert found["dog/004.jpg"] == (1, "dog")


def test_bad_images_are_counted_with_their_location(model, tmp_path):
  images = write_images(tmp_path / "photos", range(30))
  (images / "007.jpg").write_bytes(b"not an image")
  (images / "009.heic").write_bytes(b"unsupported")
  summary = embed(model, images, tmp_path / "index")
  assert summary.count == 29
  assert sum(summary.bad.values()) == 2
  info = ov_serve.Index.open(tmp_path / "index").info
  lines = (tmp_path / "index" / info.errors.name).read_text().splitlines()
  errors = [json.loads(line) for line in lines]
  assert "007.jpg at byte 0" in errors[0]["location"]
  assert errors[1]["location"] == "009.heic"
  assert info.bad == 2


def test_too_many_bad_images_stop_the_run(model, tmp_path):
  (tmp_path / "photos").mkdir()
  for number in range(5):
    (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"not an image")
  with pytest.raises(ov_data.TooManyBadRecords, match="no record is usable"):
    embed(model, tmp_path / "photos", tmp_path / "index")
  with pytest.raises(FileNotFoundError, match="unfinished index"):
    ov_serve.Index.open(tmp_path / "index")


_KILLED = """
import os, signal, sys
import ov_serve
from ov_serve import embedding as embed
model = ov_serve.Model.load(sys.argv[1])
write, left = embed._write_atomic, [int(sys.argv[4])]
def kill_later(file, **arrays):
  if not left[0]:
    os.kill(os.getpid(), signal.SIGKILL)
  left[0] -= 1
  write(file, **arrays)
embed._write_atomic = kill_later
source = ov_serve.find_source(sys.argv[2])
ov_serve.embed(model, source, sys.argv[3], batch_size=4, part_records=8)
"""


def test_a_killed_run_resumes_to_the_same_bytes(folder, model, tmp_path):
  images = write_images(tmp_path / "photos", range(35), captions=True)
  embed(model, images, tmp_path / "straight")
  out = tmp_path / "killed"
  run = [sys.executable, "-c", _KILLED, str(folder), str(images), str(out), "2"]
  done = subprocess.run(run, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
  assert done.returncode == -signal.SIGKILL
  assert len([*out.glob("parts-*/*.npz")]) == 2
  summary = embed(model, images, out)
  assert (summary.count, summary.embedded) == (35, 35 - 16)  # two parts of 8 were complete
  assert contents(out) == contents(tmp_path / "straight")


def test_a_kill_before_the_index_is_written_loses_nothing(model, tmp_path, monkeypatch):
  images = write_images(tmp_path / "photos", range(10))
  embed(model, images, tmp_path / "straight")

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(ov_serve.embedding.files, "write_info", stop)
    with pytest.raises(KeyboardInterrupt):
      embed(model, images, tmp_path / "index")
  summary = embed(model, images, tmp_path / "index")
  assert summary.embedded == 0
  assert contents(tmp_path / "index") == contents(tmp_path / "straight")


def test_an_update_embeds_only_new_and_changed_images(model, tmp_path):
  images = write_images(tmp_path / "photos", range(20))
  embed(model, images, tmp_path / "index")
  (images / "003.jpg").unlink()
  (images / "004.jpg").rename(images / "renamed.jpg")
  (images / "005.jpg").write_bytes(jpeg(500))
  write_images(images, range(20, 22))
  summary = embed(model, images, tmp_path / "index")
  assert (summary.count, summary.embedded, summary.reused) == (21, 3, 18)
  embed(model, images, tmp_path / "fresh")
  found, fresh = (ov_serve.Index.open(tmp_path / name) for name in ("index", "fresh"))
  assert [*found.records()] == [*fresh.records()]
  # The rows are at other positions of other batches; rounding may differ by one unit of float16.
  np.testing.assert_allclose(
    found.vectors.astype(np.float32), fresh.vectors.astype(np.float32), atol=1e-3
  )
  assert len([*(tmp_path / "index").iterdir()]) == 4  # files of the old index are deleted


def test_an_unchanged_folder_keeps_every_file(model, tmp_path):
  images = write_images(tmp_path / "photos", range(9))
  embed(model, images, tmp_path / "index")
  before = {file: file.stat().st_mtime_ns for file in (tmp_path / "index").iterdir()}
  summary = embed(model, images, tmp_path / "index")
  assert (summary.embedded, summary.reused) == (0, 9)
  assert {file: file.stat().st_mtime_ns for file in (tmp_path / "index").iterdir()} == before


def test_another_model_embeds_everything_again(model, tmp_path):
  images = write_images(tmp_path / "photos", range(6))
  embed(model, images, tmp_path / "index")
  other = ov_serve.Model.load(write_model(tmp_path / "other", caption=False))
  assert other.fingerprint != model.fingerprint
  assert embed(other, images, tmp_path / "index").embedded == 6
  assert ov_serve.Index.open(tmp_path / "index").info.model.fingerprint == other.fingerprint


def test_two_hosts_give_the_files_of_one(model, tmp_path):
  images = write_images(tmp_path / "photos", range(35))
  embed(model, images, tmp_path / "one")
  first = embed(model, images, tmp_path / "two", host=0, hosts=2)
  assert not first.complete
  second = embed(model, images, tmp_path / "two", host=1, hosts=2)
  assert second.complete and first.embedded + second.embedded == 35
  assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_record_shards(model, tmp_path):
  with ov_data.ShardWriter(str(tmp_path / "a.tfrecord")) as shard:
    for seed in range(5):
      shard.write({"jpg": jpeg(seed), "txt": f"image {seed}"})
  embed(model, tmp_path / "a.tfrecord", tmp_path / "index")
  entries = [*ov_serve.Index.open(tmp_path / "index").records()]
  assert [entry.captions for entry in entries] == [[f"image {seed}"] for seed in range(5)]
  assert entries[0].key == "a.tfrecord at byte 12"  # after the length and its checksum


def test_files_read_back_into_evaluation(model, tmp_path):
  images = write_images(tmp_path / "photos", range(12), captions=True)
  embed(model, images, tmp_path / "index")
  results = {r.name: r for r in ov_serve.evaluate(ov_serve.Index.open(tmp_path / "index"), model)}
  vectors = model.embed_images(np.stack([model.decode(jpeg(seed)) for seed in range(12)]))
  captions = [e.captions[0] for e in ov_serve.Index.open(tmp_path / "index").records()]
  want = ov_eval.retrieval(vectors, model.embed_texts(captions), np.arange(12)).results()
  assert [results[r.name].value for r in want] == pytest.approx([r.value for r in want], abs=0.1)
  assert results["txt2img_r10"].count == 12
