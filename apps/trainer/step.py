"""Train step: a jitted pure function from state and batch to state and metrics.

  step = make_train_step(loss_fn, optimizer.tx, state_shardings=..., batch_sharding=..., seed=0,
                         learning_rate=optimizer.learning_rate, trainable=optimizer.trainable)
  state, metrics = step(state, batch)      # the old state is donated: do not use it again

`loss_fn(params, batch, key, ema, step) -> LossOutput(loss, weight, metrics)` is `Task.loss`.
Metrics are float32 scalars on the device: loss, weight, grad_norm, param_norm, update_norm,
learning_rate, nonfinite, and those of the task. Read them one step late, so that the host never
waits.
"""

from collections.abc import Callable
from typing import Any, Protocol

from einops import rearrange
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from apps.trainer import optimizer as optimizer_lib
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.schedules import Schedule
from apps.trainer.state import TrainState, step_key
import ov_losses

PyTree = Any
Batch = dict[str, jax.Array]


class TwoPhase(Protocol):
  """A loss that is not a weighted mean over micro-batches, such as one that compares rows.

  The loss of a batch is the sum of the losses of `embed` and the loss of `combine`; `embed` treats
  every row independently. Accumulation through `ov_losses.gradient_cache` is exact: all
  micro-batches are embedded, their rows are compared at once, and each micro-batch gets its part of
  the gradient.
  """

  def embed(
    self, params: PyTree, batch: Batch, key: jax.Array, ema: PyTree | None, step: jax.Array
  ) -> tuple[PyTree, list[LossOutput]]:
    """Return arrays [b, ...] of the rows for `combine`, and the losses that need no other rows.

    The weight of a loss is 0 if the micro-batch has no units for it.
    """

  def combine(self, params: PyTree, rows: PyTree) -> LossOutput:
    """Return the loss over all rows [B, ...] of a batch, in order; its weight is the step's."""


LossFn = Callable[[PyTree, Batch, jax.Array, PyTree | None, jax.Array], LossOutput]
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
  """Build the jitted step.

  Gradient accumulation splits the batch of B rows into `accumulate` micro-batches and scans over
  them. Micro-batch j holds the rows j, j + k, j + 2k, ..., so every device processes its own rows
  and the split is the same on any number of devices. The gradient is that of the full batch,
  sum(w * g) / sum(w), up to float32 rounding. Only draws that `loss_fn` makes for a whole batch
  from its key (token masks) depend on the number of micro-batches. If the loss compares rows,
  `two_phase` preserves this.

  A step with a NaN or Inf loss or gradient norm returns the old state with the metric
  nonfinite = 1; the caller decides how to proceed.

  Args:
    loss_fn: loss, see the module docstring; its key differs for every step and micro-batch.
    tx: transformation returned by `make_optimizer`.
    state_shardings: shardings of input and output, from `state.state_shardings`. An "ema" entry
      requires `ema_decay`, and vice versa.
    batch_sharding: sharding of every array of the batch, over its first dimension B.
    seed: seed of the run.
    learning_rate: step -> float32 [], used for the metric only.
    accumulate: number of micro-batches k; B must be a multiple of k times the batch shards.
    preprocess: batch -> batch on the device, e.g. `augment.make_preprocess(...)`; called for each
      micro-batch.
    ema_decay: see `OptimizerConfig.ema_decay`.
    trainable: `Optimizer.trainable`; parameters and blocks have no gradient where it is False.
    two_phase: components of a `loss_fn` that is not a mean; used if `accumulate` > 1.
    project: params -> params within their limits, applied to trainable params after every update,
      before the average. A limit inside the loss would have no gradient beyond it.

  Returns:
    The jitted function; its `lower(abstract_state, abstract_batch)` compiles without data.

  Raises:
    ValueError: `accumulate` is invalid, or, on the first call, does not divide the batch.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate} must be at least 1 micro-batch.")
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
    return jax.tree.map(lambda p, t: _where(t, p, jax.lax.stop_gradient(p)), params, trainable)

  def within_limits(params: PyTree) -> PyTree:
    if project is None or trainable is None:
      return params if project is None else project(params)
    return jax.tree.map(lambda n, p, t: _where(t, n, p), project(params), params, trainable)

  prepare = preprocess or (lambda batch: batch)

  def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for shardings of activations
      return on_mesh(state, batch)

  def on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    params, step, ema = state["params"], state["step"], state.get("ema")
    key = step_key(seed, step)

    def objective(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossOutput]:
      out = loss_fn(freeze(params), prepare(batch), key, ema, step)
      return out.loss, out

    gradient = jax.grad(objective, has_aux=True)
    if accumulate == 1:
      grads, out = gradient(params, batch, key)
    else:
      batches = split(batch, accumulate, batch_sharding)
      shardings = state_shardings["params"]
      if two_phase is None:
        grads, out = _accumulated(gradient, params, batches, key, shardings)
      else:
        grads, out = ov_losses.gradient_cache(
          lambda params, batch, key: two_phase.embed(
            freeze(params), prepare(batch), key, ema, step
          ),
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

    # Adam maps finite gradients to finite updates, so checking the gradients is sufficient. A check
    # of the updates would keep more copies of the state alive.
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


def _where(condition: bool | np.ndarray, x: jax.Array, y: jax.Array) -> jax.Array:
  """Return `jnp.where` for arrays, and one of the arguments unchanged for bools."""
  if isinstance(condition, bool):
    return x if condition else y
  return jnp.where(condition, x, y)


def split(batch: Batch, k: int, sharding: NamedSharding) -> Batch:
  """Reshape [B, ...] to [k, B / k, ...]: micro-batch j has rows j, j + k, ...; no communication."""
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
    x = rearrange(x, "(b k) ... -> k b ...", k=k)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(split, batch)


def _accumulated(
  gradient: Callable[..., tuple[PyTree, LossOutput]],
  params: PyTree,
  batches: Batch,
  key: jax.Array,
  shardings: PyTree,
) -> tuple[PyTree, LossOutput]:
  """Return the weighted mean of gradients, loss and metrics over the leading axis of `batches`.

  It is sum_j w_j g_j / sum_j w_j, and zeros if all weights are zero. Sums are float32 and sharded
  like the parameters.
  """

  def body(sums: PyTree, xs: tuple[jax.Array, Batch]) -> tuple[PyTree, LossOutput]:
    j, batch = xs
    grads, out = gradient(params, batch, jax.random.fold_in(key, j))
    sums = jax.tree.map(lambda s, g: s + _weighted(g, out.weight), sums, grads)
    return jax.lax.with_sharding_constraint(sums, shardings), out

  k = len(next(iter(batches.values())))
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  sums, outs = jax.lax.scan(body, zeros, (jnp.arange(k), batches))  # outs have shape [k]
  total = outs.weight.sum()
  scale = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
  mean = lambda x: _weighted(x, outs.weight).sum() * scale
  metrics = jax.tree.map(mean, outs.metrics)
  return jax.tree.map(lambda s: s * scale, sums), LossOutput(mean(outs.loss), total, metrics)


def _weighted(x: jax.Array, w: jax.Array) -> jax.Array:
  """Return w * x in float32; 0 if w is 0, even if x, a mean over nothing, is NaN."""
  return jnp.where(w > 0, w * x.astype(jnp.float32), 0.0)
