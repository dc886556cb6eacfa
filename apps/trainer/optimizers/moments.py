"""Adam whose moments take less memory: factored, or in codes of 8 bits.

  scale_by_adam(b1, b2, eps, mu_dtype, second_moment, stacked) -> optax.GradientTransformation

The update is Adam's, m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), in float32; only what is kept
from step to step differs. Each moment is a dict of trees like the params, with holes where an array
is kept in another way, so that every array is found by the path of its param:

  value            float32, or bfloat16 for m                    what is too small for the others
  rows, columns    float32 [L, a, 1], [L, 1, b] of [L, a, b]     second_moment="factored"
  codes, scales    int8 (m) or uint8 (v), float32 [..., blocks]  "int8"

Factored: v is rows * columns / mean(rows), where rows and columns are averages of means of squared
gradients (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235; with m in bfloat16 as Zhai et
al. 2021, https://arxiv.org/abs/2106.04560, trained ViT-G). Each layer of a stack has its own. More
than two dimensions are split where the fewest numbers are kept: kernels of attention, [D, N, H],
between D and N. `optax.scale_by_factored_rms` takes the two longest dimensions one by one, keeps no
first moment and does not correct the start.

Codes: blocks of the last axis share a scale, their largest value (Dettmers et al. 2021,
https://arxiv.org/abs/2110.02861). A code q of n stands for scale * (q / n)^p, p = 4 for v and 2 for
|m|: quanta shrink with the value, v reaches down to 2.4e-10 of its block and |m| to 6.2e-5. A new
value is rounded to one of the codes beside it. Rounded to the nearest, an average would stand still
where it changes by less than half a quantum a step, and m without a gradient would stay while v
decays. So it is rounded up in such a share of the steps that the mean is right, by a sequence that
follows from step and position: the same on any mesh and after a resume. v > 0 never becomes 0.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Kept = dict[str, Any]  # what is kept of a moment: of one array by name, or trees of those

MIN_FACTORED = 128  # rows and columns; below, a factored moment saves little
MIN_CODED = 4096  # entries of an array, or of a layer of it; smaller ones cost little as they are
MAX_BLOCK = 128
MIN_BLOCK = 32  # shorter last axes would add more than an eighth for scales
LEVELS = {"int8": 127, "uint8": 255}
POWER = {"int8": 2, "uint8": 4}


class AdamState(NamedTuple):
  """Updates done, int32 []; name -> tree for each moment, see the module's docstring."""

  step: jax.Array
  mu: Kept
  nu: Kept


def scale_by_adam(
  b1: float,
  b2: float,
  eps: float,
  mu_dtype: str,
  second_moment: str,
  stacked: Callable[[Sequence[Any]], bool],
) -> optax.GradientTransformation:
  """Adam with the moments kept as asked for; see the module's docstring.

  Args:
    b1, b2, eps: of Adam.
    mu_dtype: "float32", "bfloat16" or "int8".
    second_moment: "full" (float32), "factored" or "int8".
    stacked: key path of a param -> whether its first axis counts layers.
  """

  def new_mu(shape: Sequence[int], first: int) -> Kept:
    if mu_dtype == "int8":
      return _zeros_coded(shape, jnp.int8) if can_code(shape, first) else _zeros(shape, "float32")
    return _zeros(shape, mu_dtype)

  def new_nu(shape: Sequence[int], first: int) -> Kept:
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
    olds = zip(grads, _of_leaves(state.mu, tree), _of_leaves(state.nu, tree), strict=True)
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
  """The axis before which shape[first:] is cut into rows and columns; None for no factoring."""
  ways = [
    (math.prod(shape[first:k]), math.prod(shape[k:]), k) for k in range(first + 1, len(shape))
  ]
  long = [(rows + columns, k) for rows, columns, k in ways if min(rows, columns) >= MIN_FACTORED]
  return min(long)[1] if long else None


def can_code(shape: Sequence[int], first: int) -> bool:
  """Whether an array is large enough for codes of 8 bits; `first` leading axes count layers."""
  return bool(shape) and math.prod(shape[first:]) >= MIN_CODED and block_size(shape) >= MIN_BLOCK


def block_size(shape: Sequence[int]) -> int:
  """Entries of the last axis with one scale: the axis, halved while it is even and over 128.

  So the number of blocks is a power of two and goes evenly over the devices of a mesh, or they go
  evenly over it, whatever mesh a checkpoint was written on.
  """
  size = shape[-1]
  while size > MAX_BLOCK and size % 2 == 0:
    size //= 2
  return size


def encode(x: jax.Array, dtype: jnp.dtype, block: int, step: jax.Array) -> Kept:
  """Codes of `dtype`, int8 or uint8 (then x >= 0), and scales; x is float32 [..., blocks * block].

  Args:
    step: of the optimizer, int32 []; says which entries are rounded up.
  """
  levels, power = LEVELS[dtype.name], POWER[dtype.name]
  blocks = jnp.abs(x).reshape(*x.shape[:-1], -1, block)
  scales = blocks.max(-1)
  share = blocks / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[..., None]
  root = jnp.sqrt(share) if power == 2 else jnp.sqrt(jnp.sqrt(share))
  low = jnp.minimum(jnp.floor(root * levels), levels - 1)
  below, above = (low / levels) ** power, ((low + 1) / levels) ** power
  up = _threshold(step, x.shape).reshape(share.shape) < (share - below) / (above - below)
  codes = (low + up).reshape(x.shape)
  codes = jnp.sign(x) * codes if dtype == jnp.int8 else jnp.maximum(codes, jnp.sign(x))
  return {"codes": codes.astype(dtype), "scales": scales}


def decode(kept: Kept) -> jax.Array:
  """Codes and scales -> float32 in the shape of the codes."""
  codes, scales = kept["codes"], kept["scales"]
  share = codes.astype(jnp.float32) / LEVELS[codes.dtype.name]
  share = share * jnp.abs(share) if POWER[codes.dtype.name] == 2 else share**4
  blocks = share.reshape(*scales.shape, -1) * scales[..., None]
  return blocks.reshape(codes.shape)


def _average(kept: Kept, x: jax.Array, decay: float, step: jax.Array) -> tuple[jax.Array, Kept]:
  """One step of a moving average of x: the average to use, float32, and what is kept of it."""
  if "rows" in kept:
    rows = _mean_as(kept["rows"], x, decay)
    columns = _mean_as(kept["columns"], x, decay)
    over = tuple(i for i, n in enumerate(columns.shape) if n == 1)
    mean = jnp.maximum(rows.mean(over, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return rows / mean * columns, {"rows": rows, "columns": columns}
  if "codes" in kept:
    new = decay * decode(kept) + (1 - decay) * x
    block = x.shape[-1] // kept["scales"].shape[-1]
    return new, encode(new, kept["codes"].dtype, block, step)
  new = decay * kept["value"].astype(jnp.float32) + (1 - decay) * x
  return new, {"value": new.astype(kept["value"].dtype)}


def _mean_as(old: jax.Array, x: jax.Array, decay: float) -> jax.Array:
  """The average of means of x over the axes along which `old` has one entry."""
  over = tuple(i for i, n in enumerate(old.shape) if n == 1)
  return decay * old + (1 - decay) * x.mean(over, keepdims=True)


def _threshold(step: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Where a share is rounded up: float32 in [0, 1), even over the steps for every entry.

  Multiples of irrational numbers, modulo 1, in integers of 32 bits; the two numbers (1 / p and
  1 / p^2 for p^3 = p + 1) are even over both together.
  """
  position = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  turns = step.astype(jnp.uint32) * jnp.uint32(0xC13FA9A9) + position * jnp.uint32(0x91E10DA5)
  return (turns >> 8).astype(jnp.float32) * 2.0**-24


def _zeros(shape: Sequence[int], dtype: Any) -> Kept:
  return {"value": jnp.zeros(shape, dtype)}


def _zeros_coded(shape: Sequence[int], dtype: Any) -> Kept:
  blocks = (*shape[:-1], shape[-1] // block_size(shape))
  return {"codes": jnp.zeros(shape, dtype), "scales": jnp.zeros(blocks, jnp.float32)}


def _zeros_factored(shape: Sequence[int], first: int, split: int) -> Kept:
  rows = (*shape[:split], *[1] * (len(shape) - split))
  columns = (*shape[:first], *[1] * (split - first), *shape[split:])
  return {"rows": jnp.zeros(rows, jnp.float32), "columns": jnp.zeros(columns, jnp.float32)}


def _to_trees(leaves: Sequence[Kept], tree: Any) -> Kept:
  """What is kept of each array -> name to tree, with holes where an array has no such part."""
  names, hole = sorted({name for kept in leaves for name in kept}), optax.MaskedNode()
  return {name: tree.unflatten([kept.get(name, hole) for kept in leaves]) for name in names}


def _of_leaves(trees: Kept, tree: Any) -> list[Kept]:
  """The reverse of `_to_trees`."""
  parts = {name: tree.flatten_up_to(part) for name, part in trees.items()}
  return [
    {name: part[i] for name, part in parts.items() if not isinstance(part[i], optax.MaskedNode)}
    for i in range(tree.num_leaves)
  ]
