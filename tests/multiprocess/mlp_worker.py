"""Worker process of multiprocess_test: five steps of a small MLP with params sharded over fsdp.

Prints one JSON line: the loss before each step, and a checksum of the final params.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ov_sharding

BATCH, WIDTH, HIDDEN, STEPS = 16, 8, 32, 5
AXES = {"fc1": ("embed", "mlp"), "fc2": ("mlp", "embed")}
RULES = {"embed": ("fsdp",), "mlp": ("tensor",)}


def loss_fn(params: dict, batch: dict) -> jax.Array:
  hidden = jnp.tanh(batch["x"] @ params["fc1"])
  return jnp.mean(jnp.square(hidden @ params["fc2"] - batch["y"]))


def step(state: dict, batch: dict) -> tuple[dict, jax.Array]:
  loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
  momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
  params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
  return {"params": params, "momentum": momentum}, loss


def init() -> dict:
  k1, k2 = jax.random.split(jax.random.key(0))
  params = {
    "fc1": jax.random.normal(k1, (WIDTH, HIDDEN)) / WIDTH**0.5,
    "fc2": jax.random.normal(k2, (HIDDEN, WIDTH)) / HIDDEN**0.5,
  }
  return {"params": params, "momentum": jax.tree.map(jnp.zeros_like, params)}


def main(data: int, fsdp: int, tensor: int, order: str) -> None:
  ov_sharding.initialize(timeout_seconds=60)
  devices = jax.devices()
  if order == "interleaved":  # rows of the batch alternate between hosts
    half = len(devices) // 2
    devices = [devices[i // 2 + half * (i % 2)] for i in range(len(devices))]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(data, fsdp, tensor), ov_sharding.AXES)
  else:
    mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(data, fsdp, tensor))

  shapes = jax.eval_shape(init)
  params = shapes["params"]
  param_shardings = ov_sharding.tree_shardings(AXES, params, mesh, RULES)
  shardings = ov_sharding.state_shardings(shapes, params, param_shardings, mesh)
  state = jax.jit(init, out_shardings=shardings)()
  scalar = ov_sharding.replicated(mesh)
  train = jax.jit(step, out_shardings=(shardings, scalar), donate_argnums=0)

  rows = ov_sharding.process_rows(mesh, BATCH)
  rng = np.random.default_rng(0)
  losses = []
  for _ in range(STEPS):
    whole = {name: rng.standard_normal((BATCH, WIDTH), dtype=np.float32) for name in "xy"}
    batch = ov_sharding.global_batch({name: x[rows] for name, x in whole.items()}, mesh)
    state, loss = train(state, batch)
    losses.append(float(loss))
    got = ov_sharding.to_host(batch["x"])
    same = np.array_equal(np.sort(got, axis=0), np.sort(whole["x"], axis=0))
    if not same or (order != "interleaved" and not np.array_equal(got, whole["x"])):
      raise AssertionError("the global batch does not hold the rows of the hosts")
  checksum = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(ov_sharding.to_host(state)))
  result = {"losses": losses, "checksum": checksum, "processes": jax.process_count()}
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), order=sys.argv[4])
