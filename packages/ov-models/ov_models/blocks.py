"""The pre-norm transformer block, and a stack of them run by scan under rematerialisation."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.attention import Mask, attend
from ov_models.config import TransformerConfig
from ov_models.contexts import vary_as
from ov_models.partition import constrain

Initializer = Callable[..., jax.Array]


def normal(std: float) -> Initializer:
  """Normal initializer of float32, also under JAX_ENABLE_X64."""
  return jax.nn.initializers.normal(std, jnp.float32)


def axes(*names: str | None) -> dict[str, Any]:
  """Parameter metadata: its logical axis names. A key of our own: flax shards by other keys."""
  return {"logical_axes": names}


@dataclasses.dataclass(frozen=True)
class BlockStyle:
  """What differs between the blocks of the vision tower and those of the text decoder."""

  gelu_tanh: bool
  qkv: Initializer
  out: Initializer
  up: Initializer
  down: Initializer


class Attention(nnx.Module):
  """The four projections of multi-head attention, kernels [D, D], with biases."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    self.num_heads = config.num_heads

    def dense(init: Initializer, *names: str) -> nnx.Linear:
      return linear(config.width, config.width, init, names, config.compute_dtype, rngs)

    self.query = dense(style.qkv, "embed", "mlp")
    self.key = dense(style.qkv, "embed", "mlp")
    self.value = dense(style.qkv, "embed", "mlp")
    self.out = dense(style.out, "mlp", "embed")

  def project(self, x: jax.Array, source: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Queries of x [B, T, D], keys and values of `source` (default x): [B, T, N, H] each."""
    source = x if source is None else source
    q, k, v = self.query(x), self.key(source), self.value(source)
    size = q.shape[2] // self.num_heads
    heads = (a.reshape(*a.shape[:2], self.num_heads, size) for a in (q, k, v))
    return tuple(constrain(a, tensor_axis=2) for a in heads)

  def merge(self, heads: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, D]."""
    return self.out(heads.reshape(*heads.shape[:2], heads.shape[2] * heads.shape[3]))


class Mlp(nnx.Module):
  """Dense, GELU, dense."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d, f, dtype = config.width, config.mlp_dim, config.compute_dtype
    self.gelu_tanh = style.gelu_tanh
    self.up = linear(d, f, style.up, ("embed", "mlp"), dtype, rngs)
    self.down = linear(f, d, style.down, ("mlp", "embed"), dtype, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = constrain(self.up(x), tensor_axis=2)
    return self.down(jax.nn.gelu(hidden, approximate=self.gelu_tanh))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); [B, T, D] in compute dtype, in and out.

  On a mesh the residual stream and the norms are pinned to the batch axes. Left free, XLA spreads
  the sharding of the norm scales over them, and on three-axis meshes its partitioner (as of jax
  0.10.2) then returned wrong sums for `x + mlp(x)`.
  """

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    self.implementation = config.attention
    self.norm1 = layer_norm(config.width, config.compute_dtype, rngs)
    self.attn = Attention(config, style, rngs=rngs)
    self.norm2 = layer_norm(config.width, config.compute_dtype, rngs)
    self.mlp = Mlp(config, style, rngs=rngs)

  def __call__(self, x: jax.Array, mask: Mask | jax.Array) -> jax.Array:
    q, k, v = self.project(x)
    return self.finish(x, attend(q, k, v, mask, self.implementation))

  def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """First half up to attention: q, k, v [B, T, N, H]."""
    with jax.named_scope("attn"):
      return self.attn.project(constrain(self.norm1(constrain(x))))

  def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
    """From the attended heads [B, T, N, H] to the output of the block."""
    with jax.named_scope("attn"):
      x = constrain(x + self.attn.merge(heads))
    with jax.named_scope("mlp"):
      return constrain(x + self.mlp(constrain(self.norm2(x))))


def stack_blocks(config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> Block:
  """L blocks as one, every parameter with a leading L axis."""
  keys = jax.random.split(rngs.params(), config.depth)
  return nnx.vmap(lambda key: Block(config, style, rngs=nnx.Rngs(key)))(keys)


def run_blocks(
  blocks: Block, x: jax.Array, mask: Mask | jax.Array, config: TransformerConfig
) -> jax.Array:
  """Runs stacked blocks over x [B, T, D]; `mask` as for `attend`."""

  def step(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    return block(x, mask), None

  return fold_blocks(step, blocks, x, None, config)[0]


def block_outputs(
  blocks: Block, x: jax.Array, mask: Mask | jax.Array, config: TransformerConfig
) -> jax.Array:
  """[L + 1, B, T, D]: x and the output of each of the stacked blocks; see `run_blocks`."""

  def step(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    x = block(x, mask)
    return x, x

  outputs = fold_blocks(step, blocks, x, None, config)[1]
  return jnp.concatenate([x[None], outputs])


def fold_blocks(
  step: Callable[[Block, jax.Array, Any], tuple[jax.Array, Any]],
  blocks: Block,
  x: jax.Array,
  per_layer: Any,
  config: TransformerConfig,
) -> tuple[jax.Array, Any]:
  """x, y_l = step(block_l, x, per_layer[l]) over the layers, under the config's remat policy.

  Args:
    step: one layer.
    blocks: the stacked blocks.
    x: what is handed from layer to layer.
    per_layer: pytree of arrays with a leading L axis, or None.
    config: says how to loop and what to keep for the backward pass.

  Returns:
    The last x, and the y_l stacked.
  """
  graphdef, params = nnx.split(blocks)
  x = vary_as(x, (params, per_layer))

  def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
    with jax.named_scope("block"):
      return step(nnx.merge(graphdef, layer[0]), x, layer[1])

  body = _remat(body, config)
  if config.scan:
    return jax.lax.scan(body, x, (params, per_layer))
  ys = []
  for layer in range(config.depth):
    x, y = body(x, take_layer((params, per_layer), layer))
    ys.append(y)
  return x, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def take_layer(stacked: Any, layer: int) -> Any:
  """One layer of a tree of stacked arrays."""
  return jax.tree.map(lambda a: a[layer], stacked)


def _remat(body: Callable[..., Any], config: TransformerConfig) -> Callable[..., Any]:
  policies = jax.checkpoint_policies
  policy = {
    "none": policies.dots_saveable,
    "full": policies.nothing_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
  }[config.remat]
  # Inside scan the loop itself keeps XLA from merging the two forward passes.
  return jax.checkpoint(body, policy=policy, prevent_cse=not config.scan)


def linear(
  d_in: int,
  d_out: int,
  init: Initializer,
  names: tuple[str | None, ...],
  dtype: jnp.dtype,
  rngs: nnx.Rngs,
  *,
  bias: bool = True,
) -> nnx.Linear:
  """Dense layer: kernel [d_in, d_out] float32, computed in `dtype`; zero bias."""
  return nnx.Linear(
    d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs,
    kernel_metadata=axes(*names), bias_metadata=axes(None),
  )  # fmt: skip


def layer_norm(width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Layer norm of the published models: epsilon 1e-6, statistics in float32."""
  return nnx.LayerNorm(
    width, epsilon=1e-6, dtype=dtype, rngs=rngs,
    scale_metadata=axes("norm"), bias_metadata=axes(None),
  )  # fmt: skip
