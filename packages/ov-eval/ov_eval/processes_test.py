"""Tests that two processes over loopback return the same counts as one process."""

import socket
import subprocess
import sys
import textwrap

import numpy as np

from ov_eval.likelihood import caption_nll
from ov_eval.processes import across_processes, gather
from ov_eval.states import Mean

WORKER = textwrap.dedent(
  """
  import sys
  import jax, numpy as np
  rank, port = int(sys.argv[1]), sys.argv[2]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
  from ov_eval.likelihood import caption_nll
  from ov_eval.processes import gather
  rows = np.random.default_rng(0).random(40).astype(np.float32)
  mine = [rows[:25], rows[25:]][rank]
  batches = [{"valid": np.ones(len(mine), bool), "nll": mine}]
  with jax.transfer_guard("disallow"):
    state = caption_nll(lambda b: (b["nll"], np.full(len(b["nll"]), 3)), batches)
    ranks = gather("x" * (rank + 1))
  print("RESULT", state.nll.hex(), state.examples, ranks)
  jax.distributed.shutdown()
  """
)


def test_one_process():
  state = Mean.of([1.0, 2.0])
  assert across_processes(state) == state and gather(3) == [3]


def test_two_processes_equal_one():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{WORKER}", str(rank), port],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    outputs = [worker.communicate(timeout=100)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  rows = np.random.default_rng(0).random(40).astype(np.float32)
  one = caption_nll(
    lambda b: (b["nll"], np.full(40, 3)), [{"valid": np.ones(40, bool), "nll": rows}]
  )
  expected = f"RESULT {one.nll.hex()} 40 ['x', 'xx']"
  for output in outputs:
    assert expected in output, output
