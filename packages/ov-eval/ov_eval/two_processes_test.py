"""Tests that two processes over loopback return bitwise the same metrics as one process.

Each process embeds its own images, with padding and some images that the other has as well. Run
with two arguments, this file is one of the processes.
"""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ov_eval

NUM_IMAGES, NUM_CLASSES, WIDTH = 101, 9, 16
# Images of each process: unequal numbers; both have 58 to 64.
PARTS = (range(65), range(58, NUM_IMAGES))


def _data():
  """Return vectors [I, E], labels [I] and 0 to 3 captions of each image, with duplicates."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(NUM_CLASSES, WIDTH))
  labels = rng.integers(0, NUM_CLASSES, NUM_IMAGES)
  vectors = centres[labels] + rng.normal(size=(NUM_IMAGES, WIDTH))
  vectors[70:80] = vectors[:10]
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  captions = [
    tuple(f"{i % 40} {c}" for c in range(n)) for i, n in enumerate(rng.integers(0, 4, NUM_IMAGES))
  ]
  return unit.astype(np.float32), labels, captions


def _batches(rows, size=8):
  vectors, labels, captions = _data()
  for start in range(0, len(rows), size):
    some = [*rows[start : start + size]]
    valid = np.arange(size) < len(some)
    some += [0] * (size - len(some))
    garbage = np.where(valid[:, None], vectors[some], 1e9)
    yield {
      "image": garbage,
      "label": labels[some],
      "index": np.array(some),
      "valid": valid,
      "captions": [captions[row] for row in some],
    }


def _encode(texts):
  return np.array([[int(number) for number in text.split()] for text in texts])


def _embed_text(ids):
  vectors, _, _ = _data()
  mixed = vectors[ids[:, 0]] + 0.1 * ids[:, 1:] * vectors[(ids[:, 0] * 7 + 3) % NUM_IMAGES]
  return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def metrics(rows):
  """Return every metric as exact text, from the images that this process reads."""
  embed = jax.jit(lambda images: images / jnp.linalg.norm(images, axis=1, keepdims=True))
  embed_image = lambda batch: embed(jnp.asarray(batch["image"], jnp.float32))
  labels = _data()[1].tolist()
  names = [
    str(labels.index(c)) for c in range(NUM_CLASSES)
  ]  # each class is named by its first image
  classes = ov_eval.class_embeddings(_embed_text, _encode, names, ["{} 1", "{} 3"], chunk=4)
  zero_shot, predictions = ov_eval.classify_by_embedding(embed_image, classes, _batches(rows))

  found = ov_eval.collect_embeddings(embed_image, _batches(rows), columns=("label", "captions"))
  texts, owner = ov_eval.flatten_captions(found.columns["captions"])
  vectors = ov_eval.embed_texts(_embed_text, _encode, texts, chunk=16)
  ranks = ov_eval.retrieval(found.vectors, vectors, owner, chunk=8)

  # The first 60 features are the training set of every process.
  train, test = slice(0, 60), slice(60, None)
  features, labels = found.vectors, found.columns["label"]
  arguments = (features[train], labels[train], features[test], labels[test])
  whole = ov_eval.knn(*arguments, k=7)
  share = slice(60 + jax.process_index(), None, jax.process_count())  # own test rows only
  own = ov_eval.knn(*arguments[:2], features[share], labels[share], k=7, num_classes=NUM_CLASSES)
  results = [
    *zero_shot.results(),
    *ranks.results(),
    *whole.results(prefix="knn"),
    *ov_eval.across_processes(own).results(prefix="knn_shared"),
    *ov_eval.linear_probe(*arguments).results(),
  ]
  return {
    "metrics": {r.name: [r.value.hex(), r.count, str(r.low), str(r.high)] for r in results},
    "predictions": predictions.records(),
    "vectors": found.vectors.astype(np.float64).sum(1).tolist(),
    "index": found.index.tolist(),
    "ranks": [ranks.img2txt.expected_rank.tolist(), ranks.txt2img.expected_rank.tolist()],
  }


def _worker(rank, port):
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
  print("RESULT" + json.dumps(metrics(PARTS[rank])), flush=True)
  jax.distributed.shutdown()


@functools.cache
def _two_processes():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  # A Bazel test finds its packages through sys.path, which children do not inherit.
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
  workers = [
    subprocess.Popen(
      [sys.executable, __file__, str(rank), port],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  found = []
  for output in outputs:
    lines = [line for line in output.splitlines() if line.startswith("RESULT")]
    assert lines, output
    found.append(json.loads(lines[0].removeprefix("RESULT")))
  return found


@functools.cache
def _one_process():
  return json.loads(json.dumps(metrics(range(NUM_IMAGES))))


def test_metrics_are_not_trivial():
  values = {name: float.fromhex(value[0]) for name, value in _one_process()["metrics"].items()}
  assert 0.05 < values["img2txt_r1"] < 0.95 and 0.05 < values["txt2img_r1"] < 0.95
  assert 0.2 < values["zero_shot_top1"] < 0.95 and 0.3 < values["knn_top1"] < 0.95
  ranks = [np.array(ranks) for ranks in _one_process()["ranks"]]
  assert all(10 < (some % 1 > 0).sum() < len(some) for some in ranks)  # ties share a rank


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_has_the_metrics_of_one(rank):
  one, two = _one_process(), _two_processes()[rank]
  assert two["metrics"] == one["metrics"]
  assert two["index"] == one["index"] == list(range(NUM_IMAGES))
  assert two == one


def test_merging_test_rows_of_both_processes():
  found = _two_processes()[0]["metrics"]
  assert found["knn_shared_top1"] == found["knn_top1"]
  assert found["knn_shared_mean_per_class"] == found["knn_mean_per_class"]


if __name__ == "__main__":
  _worker(int(sys.argv[1]), sys.argv[2])
