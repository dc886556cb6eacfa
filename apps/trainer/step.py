"""The train step: state, batch -> state, metrics; one jitted pure function.

  step = make_train_step(loss_fn, optimizer.tx, state_shardings=..., batch_sharding=..., seed=0,
                         learning_rate=optimizer.learning_rate, trainable=optimizer.trainable)
  state, metrics = step(state, batch)      # the old state is donated: do not use it again

`loss_fn(params, batch, key) -> LossOutput(loss, weight, metrics)` is `Task.loss`. Metrics are
float32 scalars on the device: loss, weight, grad_norm, param_norm, update_norm, learning_rate,
nonfinite, and the task's own. Read them one step late, so that the host never waits.

If reading the code: `update` is the core, the rest is arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import optax

from apps.trainer import optimizer as optimizer_lib
from apps.trainer.schedules import Schedule
from apps.trainer.state import TrainState, step_key
import ov_losses

PyTree = Any
Batch = dict[str, jax.Array]


class LossOutput(NamedTuple):
  """What a task's loss returns.

  Attributes:
    loss: float32 [], a mean over `weight` units (tokens for captions), over the whole batch.
    weight: float32 [], how many units the mean is over; 0 if the batch held none.
    metrics: name -> float32 [], means over the same units.
  """

  loss: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]


@runtime_checkable
class TwoPhase(Protocol):
  """A loss that compares rows with each other, so that it is no mean over microbatches.

  The loss of a batch is that of `embed` plus that of `combine`, where `embed` treats every row by
  itself. Accumulated through `ov_losses.gradient_cache` it is exact: all microbatches are embedded,
  their rows compared at once, and each microbatch gets its share of the gradient.
  """

  def embed(self, params: PyTree, batch: Batch, key: jax.Array) -> tuple[PyTree, LossOutput]:
    """Arrays [b, ...] that `combine` needs of the rows, and the loss the rows have on their own.

    Its weight is 0 where there is no such loss.
    """

  def combine(self, params: PyTree, rows: PyTree) -> LossOutput:
    """The loss between all rows [B, ...] of a batch, in order; its weight is the step's."""


@runtime_checkable
class Projected(Protocol):
  """A task whose params must stay within limits, such as those of a temperature."""

  def project(self, params: PyTree) -> PyTree:
    """The nearest params within the limits; applied after every update, to params of any value."""


LossFn = Callable[[PyTree, Batch, jax.Array], LossOutput]
Preprocess = Callable[[Batch], Batch]


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  state_shardings: TrainState,
  batch_sharding: NamedSharding,
  seed: int,
  learning_rate: Schedule,
  accumulate: int = 1,
  preprocess: Preprocess | None = None,
  ema_decay: float | None = None,
  trainable: PyTree | None = None,
  two_phase: TwoPhase | None = None,
  project: Callable[[PyTree], PyTree] | None = None,
) -> jax.stages.Wrapped:
  """Builds the jitted step.

  Gradient accumulation splits the batch of B rows into `accumulate` microbatches and scans over
  them; microbatch j holds the rows j, j + k, j + 2k, ..., so every device works on its own rows and
  the split is the same on any number of devices. Its gradient is that of the whole batch,
  sum(w * g) / sum(w), up to float32 rounding. Only draws that `loss_fn` makes for a whole batch
  from its key (token masks) depend on the number of microbatches. Where the loss compares rows,
  `two_phase` keeps that true.

  A step whose loss or gradient norm is not finite changes nothing: the old state comes back with
  the metric nonfinite = 1, and the caller decides.

  Args:
    loss_fn: see the module docstring; the key it gets is different for every step and microbatch.
    tx: from `make_optimizer`.
    state_shardings: from `state.state_shardings`, for what goes in and comes out. An "ema" entry
      needs `ema_decay`, and the reverse.
    batch_sharding: of every array of the batch, over its first dimension B.
    seed: of the run.
    learning_rate: step -> float32 [], for the metric only.
    accumulate: number of microbatches k; B must be a multiple of k times the batch shards.
    preprocess: batch -> batch on the device, e.g. `augment.make_preprocess(...)`; works on one
      microbatch at a time.
    ema_decay: see `OptimizerConfig.ema_decay`.
    trainable: params tree of bools; no gradient is computed where it is False.
    two_phase: the parts of a `loss_fn` that compares rows; used where `accumulate` > 1.
    project: params -> params within their limits, applied to every updated param that is
      trainable, before the average. A limit inside the loss would have no gradient beyond it.

  Returns:
    The jitted function; its `lower(abstract_state, abstract_batch)` compiles without data.

  Raises:
    ValueError: for a bad `accumulate`, or on the first call if it does not divide the batch.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate} must be at least 1 microbatch.")
  if (ema_decay is None) == ("ema" in state_shardings):
    raise ValueError(
      f"ema_decay={ema_decay} does not agree with the state, which has "
      f"{'an' if 'ema' in state_shardings else 'no'} 'ema' entry; set both or neither."
    )
  mesh = batch_sharding.mesh
  replicated = NamedSharding(mesh, PartitionSpec())

  def freeze(params: PyTree) -> PyTree:
    if trainable is None:
      return params
    return jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, trainable)

  def within_limits(params: PyTree) -> PyTree:
    if project is None or trainable is None:
      return params if project is None else project(params)
    return jax.tree.map(lambda n, p, t: n if t else p, project(params), params, trainable)

  prepare = preprocess or (lambda batch: batch)

  def objective(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossOutput]:
    out = loss_fn(freeze(params), prepare(batch), key)
    return out.loss, out

  gradient = jax.grad(objective, has_aux=True)

  def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    params, step = state["params"], state["step"]
    key = step_key(seed, step)
    if accumulate == 1:
      grads, out = gradient(params, batch, key)
    else:
      batches = _split(batch, accumulate, batch_sharding)
      shardings = state_shardings["params"]
      if two_phase is None:
        grads, out = _accumulated(gradient, params, batches, key, shardings)
      else:
        grads, out = ov_losses.gradient_cache(
          lambda params, batch, key: two_phase.embed(freeze(params), prepare(batch), key),
          lambda params, rows: two_phase.combine(freeze(params), rows),
          params,
          batches,
          key,
          shardings=shardings,
        )

    updates, opt = tx.update(grads, state["opt"], params)
    new = {"params": within_limits(optax.apply_updates(params, updates)), "opt": opt}
    new["step"] = step + 1
    if ema_decay is not None:
      new["ema"] = optimizer_lib.ema_update(state["ema"], new["params"], ema_decay, step)

    # What Adam makes of finite gradients is finite; and known before the update, this leaves fewer
    # copies of the state alive at once than a look at the update would.
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(out.loss + grad_norm)
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    norms = {
      "grad_norm": grad_norm,
      "param_norm": optax.tree.norm(new["params"]),
      "update_norm": optax.tree.norm(updates),
    }
    metrics = {
      **out.metrics,
      **norms,
      "loss": out.loss,
      "weight": out.weight,
      "learning_rate": learning_rate(step),
      "nonfinite": ~finite,
    }
    return new, {name: jnp.asarray(m, jnp.float32) for name, m in metrics.items()}

  return jax.jit(
    update,
    in_shardings=(state_shardings, batch_sharding),
    out_shardings=(state_shardings, replicated),
    donate_argnums=0,
  )


def _split(batch: Batch, k: int, sharding: NamedSharding) -> Batch:
  """[B, ...] -> [k, B / k, ...] with rows j, j + k, ... in microbatch j; no row changes device."""
  rows = len(next(iter(batch.values())))
  shards = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
  multiple = k * shards
  if rows % multiple:
    raise ValueError(
      f"batch of {rows} rows is not a multiple of {multiple} = accumulate {k} x {shards} batch "
      f"shards; the next size that fits is {-(-rows // multiple) * multiple}."
    )
  spec = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(rows // k, k, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(split, batch)


def _accumulated(
  gradient: Callable[..., tuple[PyTree, LossOutput]],
  params: PyTree,
  batches: Batch,
  key: jax.Array,
  shardings: PyTree,
) -> tuple[PyTree, LossOutput]:
  """Weighted mean of gradients, loss and metrics over the leading axis of `batches`.

  sum_j w_j g_j / sum_j w_j, and zeros where all weights are zero. Sums are float32 and sharded like
  the parameters.
  """

  def body(sums: PyTree, xs: tuple[jax.Array, Batch]) -> tuple[PyTree, LossOutput]:
    j, batch = xs
    grads, out = gradient(params, batch, jax.random.fold_in(key, j))
    sums = jax.tree.map(lambda s, g: s + _weighted(g, out.weight), sums, grads)
    return jax.lax.with_sharding_constraint(sums, shardings), out

  k = len(next(iter(batches.values())))
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  sums, outs = jax.lax.scan(body, zeros, (jnp.arange(k), batches))  # outs hold [k]
  total = outs.weight.sum()
  scale = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
  mean = lambda x: _weighted(x, outs.weight).sum() * scale
  metrics = jax.tree.map(mean, outs.metrics)
  return jax.tree.map(lambda s: s * scale, sums), LossOutput(mean(outs.loss), total, metrics)


def _weighted(x: jax.Array, w: jax.Array) -> jax.Array:
  """w * x in float32, and 0 where w is 0 even if x, a mean over nothing, is not a number."""
  return jnp.where(w > 0, w * x.astype(jnp.float32), 0.0)
