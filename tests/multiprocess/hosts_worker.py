"""Worker process for tests of apps.trainer.hosts: runs collective steps and simulates an event.

  hosts_worker.py BEFALLS ENDS

BEFALLS is the event of process 2 at step 20:
  nothing   the steps continue until the test kills a process
  alone     the same without collectives
  slow      the input takes 12 seconds
  error     an exception
  mistake   a UserError
  all       a UserError in every process
ENDS is the number of steps. Every process prints its steps; process 0 also the reports of `Hosts`.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from apps.trainer.errors import UserError
from apps.trainer.hooks import STEP
from apps.trainer.hosts import Hosts
from apps.trainer.stop import StopRequest
import ov_sharding

SLOW_AFTER, CHECKPOINT, SLOW_INPUT = 4, 40, 12


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def befall(what: str, me: int) -> None:
  if what == "all" or (what == "mistake" and me == 2):
    raise UserError("config.batch_size=0 is not positive")
  if what == "error" and me == 2:
    raise ValueError("the disk is full")
  if what == "slow" and me == 2:
    time.sleep(SLOW_INPUT)


def main(what: str, ends: int) -> int:
  # Without collectives only JAX's runtime detects a dead process; a collective fails earlier.
  gone_after = 10 if what == "alone" else 60
  ov_sharding.initialize(timeout_seconds=100, gone_after_seconds=gone_after)
  me, mesh = jax.process_index(), ov_sharding.make_mesh(ov_sharding.MeshConfig())
  add = jax.jit(lambda x: x + jnp.sum(x), out_shardings=ov_sharding.batch_sharding(mesh))
  with Hosts(say, slow_after=SLOW_AFTER, gone_after=gone_after) as hosts:
    hosts.last_checkpoint = lambda: CHECKPOINT
    with StopRequest() as stop, hosts.report_errors():
      for step in range(ends):
        if asked := stop.requested(step):
          say(f"{asked}: stopped at {step}")
          break
        hosts.at(step, "waiting for input")
        if step == 20:
          befall(what, me)
        time.sleep(0.05)
        hosts.at(step + 1, STEP)
        if what != "alone":
          batch = ov_sharding.global_batch({"x": np.ones((1, 1), np.float32)}, mesh)
          add(batch["x"]).block_until_ready()
        say(f"step {step}")
  return stop.exit_code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], int(sys.argv[2])))
