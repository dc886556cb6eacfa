"""Tests of every format of shards in other processes: killed and resumed, and several at a time."""

import json
import signal
import subprocess
import sys

import pytest

import ov_data
from ov_data.testing.shards import WRITERS, photo_rows, write_shards

_BATCH = 12
# Prints the digest of every row of a batch, and the state of the loader.
_READ = """
import hashlib, json, sys, ov_data
paths, tokenizer, state, first, last, stop = json.loads(sys.argv[1])
loader = ov_data.Loader([ov_data.Source(path) for path in paths], image_size=16, batch_size=12,
  text_len=8, tokenizer=ov_data.Tokenizer.load(tokenizer), seed=3, rows=slice(first, last),
  shuffle="block", block=4, window=2, lanes=4)
if state:
  loader.restore(state)
while loader.position < stop:
  batch = next(loader)
  rows = zip(batch["image"], batch["ids"], batch["index"].tolist(), batch["valid"].tolist())
  found = [[hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest(), n, ok] for a, b, n, ok in rows]
  print(json.dumps([found, loader.state()]), flush=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
  root = tmp_path_factory.mktemp("formats")
  tokenizer = ov_data.Tokenizer.train([f"a photo of {n}" for n in range(48)], 200)
  tokenizer.save(root / "tokenizer")
  rows = photo_rows(48)
  folders = {format: str(write_shards(root / format, format, rows, 3)) for format in WRITERS}
  return {**folders, "tokenizer": str(root / "tokenizer")}


def _start(data, formats, *, state=None, rows=(0, _BATCH), stop=10**9) -> subprocess.Popen[str]:
  arguments = [[data[format] for format in formats], data["tokenizer"], state, *rows, stop]
  command = [sys.executable, "-c", _READ, json.dumps(arguments)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> list:
  with process:
    found = [json.loads(line) for line in process.stdout]
  assert process.returncode == 0
  return found


@pytest.mark.parametrize("format", WRITERS)
def test_a_killed_process_is_resumed_exactly(data, format):
  stop = 8 * _BATCH
  with _start(data, [format]) as process:
    before = [json.loads(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
  resumed = _start(data, [format], state=before[2][1], stop=stop)  # the last two were not saved
  whole = _finish(_start(data, [format], stop=stop))
  assert [*before[:3], *_finish(resumed)] == whole and before == whole[:5]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_mixture_in_several_processes(data, processes):
  size, stop = _BATCH // processes, 6 * _BATCH
  hosts = [(n * size, (n + 1) * size) for n in range(processes)]
  parts = [_finish(p) for p in [_start(data, WRITERS, rows=rows, stop=stop) for rows in hosts]]
  joined = [sum((batch for batch, _ in host), []) for host in zip(*parts, strict=True)]
  expected = data.setdefault("mixture", json.dumps(joined))  # of one process
  assert json.dumps(joined) == expected
  assert all(valid for batch in joined for _, _, valid in batch)
  assert len({state["fingerprint"] for host in parts for _, state in host}) == 1
