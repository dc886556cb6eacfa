"""Embedding of folders: resume, incremental updates, bad images, several hosts."""

from concurrent import futures
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

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
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in index.iterdir()
    if file.is_file()
  }


def embed(model, images, out, **options):
  dataset = ov_serve.open_images(str(images))
  return ov_serve.embed(model, dataset, out, batch_size=4, part_records=8, **options)


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
from ov_serve.parts import Parts
model = ov_serve.Model.load(sys.argv[1])
write, left = Parts.write, [int(sys.argv[4])]
def kill_later(*arguments):
  if not left[0]:
    os.kill(os.getpid(), signal.SIGKILL)
  left[0] -= 1
  write(*arguments)
Parts.write = kill_later
dataset = ov_serve.open_images(sys.argv[2])
ov_serve.embed(model, dataset, sys.argv[3], batch_size=4, part_records=8)
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


def test_a_file_is_not_replaced_by_an_index(model, tmp_path):
  images = write_images(tmp_path / "photos", range(2))
  (tmp_path / "notes").write_text("mine")
  with pytest.raises(ValueError, match="notes is a file; expected a new folder"):
    embed(model, images, tmp_path / "notes")
  assert (tmp_path / "notes").read_text() == "mine"


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


def damage(file, how):
  data = bytearray(file.read_bytes())
  if how == "truncated":
    del data[len(data) // 2 :]
  elif how == "empty":
    data.clear()
  else:
    data[len(data) // 2] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize("name", ["index.json", "vectors-*", "records-*"])
def test_a_damaged_index_is_set_aside_and_embedded_again(model, tmp_path, name, how):
  images = write_images(tmp_path / "photos", range(9))
  embed(model, images, tmp_path / "index")
  before = contents(tmp_path / "index")
  [file] = (tmp_path / "index").glob(name)
  damage(file, how)
  damaged = contents(tmp_path / "index")
  summary = embed(model, images, tmp_path / "index")
  assert (summary.damaged, summary.count, summary.embedded) == (1, 9, 9)
  assert contents(tmp_path / "index") == before
  assert contents(tmp_path / "index" / "damaged-1") == damaged  # nothing is deleted
  ov_serve.Index.open(tmp_path / "index", verify=True)
  # The next damage goes to another folder.
  damage(file, how)
  assert embed(model, images, tmp_path / "index").damaged == 1
  assert contents(tmp_path / "index" / "damaged-2") == damaged
  assert embed(model, images, tmp_path / "index").damaged == 0


def interrupt(model, images, out, monkeypatch, **options):
  """Embed, and stop when all parts are written but no index."""

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr("ov_serve.index.write_info", stop)
    with pytest.raises(KeyboardInterrupt):
      embed(model, images, out, **options)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_part_is_set_aside_and_computed_again(model, tmp_path, monkeypatch, how):
  images = write_images(tmp_path / "photos", range(20))
  embed(model, images, tmp_path / "straight")
  interrupt(model, images, tmp_path / "index", monkeypatch)
  [file] = (tmp_path / "index").glob("parts-*/000001.npz")
  damage(file, how)
  damaged = file.read_bytes()
  summary = embed(model, images, tmp_path / "index")
  assert (summary.damaged, summary.embedded, summary.count) == (1, 8, 20)
  assert contents(tmp_path / "index") == contents(tmp_path / "straight")
  assert (tmp_path / "index" / "damaged-1" / "000001.npz").read_bytes() == damaged


def test_damaged_parts_of_an_earlier_run_are_not_reused(model, tmp_path, monkeypatch):
  images = write_images(tmp_path / "photos", range(20))
  interrupt(model, images, tmp_path / "index", monkeypatch)
  [file] = (tmp_path / "index").glob("parts-*/000001.npz")
  damage(file, "flipped")
  write_images(images, range(20, 21))  # another recipe
  summary = embed(model, images, tmp_path / "index")
  assert (summary.damaged, summary.embedded, summary.reused) == (1, 9, 12)


def test_a_damaged_part_of_another_host_is_computed_again(model, tmp_path):
  images = write_images(tmp_path / "photos", range(35))
  embed(model, images, tmp_path / "one")
  embed(model, images, tmp_path / "two", host=0, hosts=2)
  [file] = (tmp_path / "two").glob("parts-*/000002.npz")
  damage(file, "truncated")
  summary = embed(model, images, tmp_path / "two", host=1, hosts=2)
  assert (summary.complete, summary.damaged, summary.count) == (True, 1, 35)
  assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_hosts_that_finish_at_once_both_succeed(model, tmp_path):
  images = write_images(tmp_path / "photos", range(35))
  embed(model, images, tmp_path / "one")
  out, barrier = tmp_path / "two", threading.Barrier(2)

  def run(host):
    def wait_for_the_other(done, total):
      files = [[*out.glob(f"parts-*/{part:06}.npz")] for part in range(host, 5, 2)]
      if done == total and all(files):
        barrier.wait(120)

    return embed(model, images, out, host=host, hosts=2, progress=wait_for_the_other)

  with futures.ThreadPoolExecutor(2) as pool:
    summaries = [*pool.map(run, (0, 1))]
  assert [summary.complete for summary in summaries] == [True, True]
  assert [summary.count for summary in summaries] == [35, 35]
  assert sum(summary.embedded for summary in summaries) == 35
  assert contents(out) == contents(tmp_path / "one")
