"""Tests of restoring checkpoints on other meshes and by several processes."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from apps.trainer.checkpoint import Checkpoints


def make_state(shape, fill=True):
  """Return a state of 16 x 8 arrays on a (data, fsdp) mesh, or its abstract state."""
  devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
  mesh = Mesh(devices, ("data", "fsdp"))
  shardings = {
    "params": {"kernel": NamedSharding(mesh, P("fsdp", None)), "bias": NamedSharding(mesh, P())},
    "mu": NamedSharding(mesh, P(None, "fsdp")),
    "step": NamedSharding(mesh, P()),
  }
  values = {
    "params": {"kernel": np.random.default_rng(0).normal(size=(16, 8)), "bias": np.arange(8.0)},
    "mu": np.random.default_rng(1).normal(size=(16, 8)),
    "step": np.int32(7),
  }
  values = {**values, "mu": values["mu"].astype(jnp.bfloat16)}
  values["params"] = jax.tree.map(lambda x: x.astype(np.float32), values["params"])
  if fill:
    return jax.tree.map(jax.device_put, values, shardings)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, shardings
  )


@pytest.mark.parametrize("before,after", [((2, 4), (1, 1)), ((1, 1), (1, 8)), ((8, 1), (2, 2))])
def test_restores_on_fewer_and_more_devices(tmp_path, before, after):
  state = make_state(before)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, {})
  target = make_state(after, fill=False)
  with Checkpoints(tmp_path) as checkpoints:
    restored, metadata = checkpoints.restore(target)
  assert metadata["step"] == 7
  for x, y, t in zip(*map(jax.tree.leaves, (state, restored, target)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert y.sharding == t.sharding


PROGRAM = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
  jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
  from apps.trainer.checkpoint import Checkpoints
  from apps.trainer.init_from import plan_init
  from apps.trainer.init_source import open_source

  sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
  make = jax.jit(lambda k: k + jnp.arange(32.0), out_shardings=sharding)
  with Checkpoints(sys.argv[1]) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"params": {"w": make(float(step))}}, {"data": {"position": step}})
  if jax.process_index() == 0:  # damage step 2 where all processes see it
    (checkpoints.directory / "2" / "state" / "manifest.ocdbt").unlink()
  target = {"params": {"w": jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding)}}
  jax.experimental.multihost_utils.sync_global_devices("damaged")
  with Checkpoints(sys.argv[1]) as checkpoints:
    assert checkpoints.latest_step() == 1
    state, metadata = checkpoints.restore(target)
  assert metadata["data"] == {"position": 1}
  plan = plan_init(open_source(sys.argv[1]), {"w": make(9.0)})
  for w in (state["params"]["w"], plan.apply({"w": make(9.0)})["w"]):
    for shard in w.addressable_shards:
      np.testing.assert_array_equal(shard.data, 1.0 + np.arange(32.0)[shard.index])
  assert plan.report.taken == ("w",)
  print("restored by process", jax.process_index(), "of", jax.process_count())
"""


def test_two_processes_save_and_restore_intact_step(tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), str(port), str(i)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for i, (process, output) in enumerate(zip(processes, outputs, strict=True)):
    assert process.returncode == 0, output
    assert f"restored by process {i} of 2" in output
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "damaged-2"]
