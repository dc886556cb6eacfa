"""Adam with memory-efficient moments: factored, or block-wise quantized to 8 bits.

  scale_by_adam(b1, b2, eps, mu_dtype, second_moment, stacked) -> optax.GradientTransformation

The update is Adam's, m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), in float32; only the stored
moments differ. Each moment is a dict of trees like the params, with holes where an array has
another representation, so that every array is found by the path of its param:

  value            float32, or bfloat16 for m                    arrays too small for the others
  rows, columns    float32 [L, a, 1], [L, 1, b] of [L, a, b]     second_moment="factored"
  codes, scales    int8 (m) or uint8 (v), float32 [..., blocks]  "int8"

Factored: v is rows * columns / mean(rows), where rows and columns are moving averages of the mean
squared gradients (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235; Zhai et al. 2021,
https://arxiv.org/abs/2106.04560, trained ViT-G this way with m in bfloat16). Each layer of a stack
is factored separately. Arrays with more than two dimensions are split where the factors are
smallest: attention kernels [D, N, H] between D and N. `optax.scale_by_factored_rms` instead takes
the two largest dimensions, has no first moment and no bias correction.

Quantized: blocks of the last axis share a scale, their maximum (Dettmers et al. 2021,
https://arxiv.org/abs/2110.02861). Code q of n represents scale * (q / n)^p with p = 4 for v and
p = 2 for |m|. Quanta shrink with the value, so v reaches down to 2.4e-10 of the maximum of its
block, and |m| to 6.2e-5. Values are rounded stochastically, up or down to an adjacent code, so that
the expectation is exact. With rounding to nearest, an average that changes by less than half a
quantum per step would never change, and m without gradient would stay while v decays. The random
sequence is a function of step and position, so it is the same on any mesh and after a resume.
v > 0 never becomes 0.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
# Representation of a moment: parts of one array by name, or trees of them.
StoredMoment = dict[str, Any]

MIN_FACTORED = 128  # minimum rows and columns; factoring smaller arrays saves little
MIN_CODED = 4096  # minimum entries of an array, or of one layer of it; smaller ones cost little
MAX_BLOCK = 128
MIN_BLOCK = 32  # with shorter blocks the scales would add more than an eighth
LEVELS = {"int8": 127, "uint8": 255}
POWER = {"int8": 2, "uint8": 4}


class AdamState(NamedTuple):
  """Number of updates, int32 []; name -> tree for each moment, see the module docstring."""

  step: jax.Array
  mu: StoredMoment
  nu: StoredMoment


def scale_by_adam(
  b1: float,
  b2: float,
  eps: float,
  mu_dtype: str,
  second_moment: str,
  stacked: Callable[[Sequence[Any]], bool],
) -> optax.GradientTransformation:
  """Return Adam with the given representation of the moments; see the module docstring.

  Args:
    b1, b2, eps: hyperparameters of Adam.
    mu_dtype: "float32", "bfloat16" or "int8".
    second_moment: "full" (float32), "factored" or "int8".
    stacked: key path of a param -> whether its first axis counts layers.
  """

  def new_mu(shape: Sequence[int], first: int) -> StoredMoment:
    if mu_dtype == "int8":
      return _zeros_coded(shape, jnp.int8) if can_code(shape, first) else _zeros(shape, "float32")
    return _zeros(shape, mu_dtype)

  def new_nu(shape: Sequence[int], first: int) -> StoredMoment:
    if second_moment == "int8" and can_code(shape, first):
      return _zeros_coded(shape, jnp.uint8)
    if second_moment == "factored" and (split := split_axis(shape, first)):
      return _zeros_factored(shape, first, split)
    return _zeros(shape, "float32")

  def init(params: PyTree) -> AdamState:
    by_path, tree = jax.tree_util.tree_flatten_with_path(params)
    layers = [(leaf.shape, int(stacked(path))) for path, leaf in by_path]
    mu = [new_mu(shape, first) for shape, first in layers]
    nu = [new_nu(shape, first) for shape, first in layers]
    return AdamState(jnp.zeros((), jnp.int32), _to_trees(mu, tree), _to_trees(nu, tree))

  def update(
    updates: PyTree, state: AdamState, params: PyTree | None = None
  ) -> tuple[PyTree, AdamState]:
    del params
    grads, tree = jax.tree.flatten(updates)
    step = optax.safe_increment(state.step)
    rest1, rest2 = 1 - b1**step, 1 - b2**step
    out, mu, nu = [], [], []
    olds = zip(grads, _to_leaves(state.mu, tree), _to_leaves(state.nu, tree), strict=True)
    for g, old_mu, old_nu in olds:
      g = g.astype(jnp.float32)
      m, kept_mu = _average(old_mu, g, b1, step)
      v, kept_nu = _average(old_nu, g * g, b2, step)
      out.append((m / rest1) / (jnp.sqrt(v / rest2) + eps))
      mu.append(kept_mu)
      nu.append(kept_nu)
    return jax.tree.unflatten(tree, out), AdamState(step, _to_trees(mu, tree), _to_trees(nu, tree))

  return optax.GradientTransformation(init, update)


def split_axis(shape: Sequence[int], first: int) -> int | None:
  """Return the axis at which shape[first:] is split into rows and columns; None if not factored."""
  ways = [
    (math.prod(shape[first:k]), math.prod(shape[k:]), k) for k in range(first + 1, len(shape))
  ]
  long = [(rows + columns, k) for rows, columns, k in ways if min(rows, columns) >= MIN_FACTORED]
  return min(long)[1] if long else None


def can_code(shape: Sequence[int], first: int) -> bool:
  """Return whether an array is large enough to quantize; `first` leading axes count layers."""
  return bool(shape) and math.prod(shape[first:]) >= MIN_CODED and block_size(shape) >= MIN_BLOCK


def block_size(shape: Sequence[int]) -> int:
  """Return the block size along the last axis: the axis, halved while it is even and over 128.

  The number of blocks is therefore a power of two, so that blocks are sharded evenly over any mesh
  that a checkpoint is restored on.
  """
  size = shape[-1]
  while size > MAX_BLOCK and size % 2 == 0:
    size //= 2
  return size


def encode(x: jax.Array, dtype: jnp.dtype, block: int, step: jax.Array) -> StoredMoment:
  """Quantize float32 [..., blocks * block] to codes of `dtype`, int8 or uint8 (x >= 0), and scales.

  Args:
    x: values to quantize.
    dtype: dtype of the codes.
    block: entries per scale.
    step: optimizer step, int32 []; determines which entries are rounded up.
  """
  levels, power = LEVELS[dtype.name], POWER[dtype.name]
  blocks = jnp.abs(x).reshape(*x.shape[:-1], -1, block)
  scales = blocks.max(-1)
  ratio = blocks / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[..., None]
  root = jnp.sqrt(ratio) if power == 2 else jnp.sqrt(jnp.sqrt(ratio))
  low = jnp.minimum(jnp.floor(root * levels), levels - 1)
  below, above = (low / levels) ** power, ((low + 1) / levels) ** power
  up = _threshold(step, x.shape).reshape(ratio.shape) < (ratio - below) / (above - below)
  codes = (low + up).reshape(x.shape)
  codes = jnp.sign(x) * codes if dtype == jnp.int8 else jnp.maximum(codes, jnp.sign(x))
  return {"codes": codes.astype(dtype), "scales": scales}


def decode(stored: StoredMoment) -> jax.Array:
  """Dequantize codes and scales to float32 in the shape of the codes."""
  codes, scales = stored["codes"], stored["scales"]
  ratio = codes.astype(jnp.float32) / LEVELS[codes.dtype.name]
  ratio = ratio * jnp.abs(ratio) if POWER[codes.dtype.name] == 2 else ratio**4
  blocks = ratio.reshape(*scales.shape, -1) * scales[..., None]
  return blocks.reshape(codes.shape)


def _average(
  stored: StoredMoment, x: jax.Array, decay: float, step: jax.Array
) -> tuple[jax.Array, StoredMoment]:
  """Return one step of a moving average of x: the float32 average, and its representation."""
  if "rows" in stored:
    rows = _update_mean(stored["rows"], x, decay)
    columns = _update_mean(stored["columns"], x, decay)
    over = tuple(i for i, n in enumerate(columns.shape) if n == 1)
    mean = jnp.maximum(rows.mean(over, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return rows / mean * columns, {"rows": rows, "columns": columns}
  if "codes" in stored:
    new = decay * decode(stored) + (1 - decay) * x
    block = x.shape[-1] // stored["scales"].shape[-1]
    return new, encode(new, stored["codes"].dtype, block, step)
  new = decay * stored["value"].astype(jnp.float32) + (1 - decay) * x
  return new, {"value": new.astype(stored["value"].dtype)}


def _update_mean(old: jax.Array, x: jax.Array, decay: float) -> jax.Array:
  """Return the average of x's means over the axes along which `old` has one entry."""
  over = tuple(i for i, n in enumerate(old.shape) if n == 1)
  return decay * old + (1 - decay) * x.mean(over, keepdims=True)


def _threshold(step: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Return rounding thresholds: float32 in [0, 1), equidistributed over the steps for every entry.

  They are multiples of irrational numbers modulo 1 in 32-bit integers. The two numbers, 1 / p and
  1 / p^2 with p^3 = p + 1, are jointly equidistributed.
  """
  position = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  turns = step.astype(jnp.uint32) * jnp.uint32(0xC13FA9A9) + position * jnp.uint32(0x91E10DA5)
  return (turns >> 8).astype(jnp.float32) * 2.0**-24


def _zeros(shape: Sequence[int], dtype: Any) -> StoredMoment:
  return {"value": jnp.zeros(shape, dtype)}


def _zeros_coded(shape: Sequence[int], dtype: Any) -> StoredMoment:
  blocks = (*shape[:-1], shape[-1] // block_size(shape))
  return {"codes": jnp.zeros(shape, dtype), "scales": jnp.zeros(blocks, jnp.float32)}


def _zeros_factored(shape: Sequence[int], first: int, split: int) -> StoredMoment:
  rows = (*shape[:split], *[1] * (len(shape) - split))
  columns = (*shape[:first], *[1] * (split - first), *shape[split:])
  return {"rows": jnp.zeros(rows, jnp.float32), "columns": jnp.zeros(columns, jnp.float32)}


def _to_trees(leaves: Sequence[StoredMoment], tree: Any) -> StoredMoment:
  """Convert the parts of each array to trees by name, with holes where an array lacks the part."""
  names, hole = sorted({name for stored in leaves for name in stored}), optax.MaskedNode()
  return {name: tree.unflatten([stored.get(name, hole) for stored in leaves]) for name in names}


def _to_leaves(trees: StoredMoment, tree: Any) -> list[StoredMoment]:
  """Invert `_to_trees`."""
  parts = {name: tree.flatten_up_to(part) for name, part in trees.items()}
  return [
    {name: part[i] for name, part in parts.items() if not isinstance(part[i], optax.MaskedNode)}
    for i in range(tree.num_leaves)
  ]
