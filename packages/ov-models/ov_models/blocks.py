"""Pre-norm transformer block, and stacks of blocks with scan and rematerialisation."""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray
import numpy as np

from ov_models.attention import Mask, attend
from ov_models.config import TransformerConfig
from ov_models.contexts import vary_as
from ov_models.partition import HEADS, HIDDEN, constrain
from ov_models.shapes import Segments

Initializer = Callable[..., jax.Array]
Heads = Float[Array, "B T N H"]
# Factors of the attention and of the MLP branch of each row.
BranchFactors = Float[Array, "2 B 1 1"]
# Transforms queries and keys before attention, e.g. with rotary positions.
Rotate = Callable[[Heads, Heads], tuple[Heads, Heads]]
Norm = nnx.LayerNorm | nnx.RMSNorm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
}


def normal(std: float) -> Initializer:
  """Return a float32 normal initializer, also with JAX_ENABLE_X64."""
  return jax.nn.initializers.normal(std, jnp.float32)


def axes(*names: str | None) -> dict[str, Any]:
  """Return parameter metadata with logical axis names, under a key that flax does not interpret."""
  return {"logical_axes": names}


@dataclasses.dataclass(frozen=True)
class BlockStyle:
  """Initializers, which differ between vision and text blocks."""

  qkv: Initializer
  out: Initializer
  up: Initializer
  down: Initializer


class Attention(nnx.Module):
  """Query, key, value and output projections of multi-head attention."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    self.num_heads = config.num_heads

    def dense(init: Initializer, *names: str, bias: bool) -> nnx.Linear:
      width, dtype = config.width, config.compute_dtype
      return linear(width, width, init, names, dtype, rngs, bias=bias)

    bias = config.qkv_bias
    self.query = dense(style.qkv, "embed", "mlp", bias=bias != "none")
    self.key = dense(style.qkv, "embed", "mlp", bias=bias == "all")
    self.value = dense(style.qkv, "embed", "mlp", bias=bias != "none")
    self.out = dense(style.out, "mlp", "embed", bias=config.out_bias)
    if config.attention_gate:
      self.gate = dense(style.qkv, "embed", "mlp", bias=bias != "none")
    self.gated = config.attention_gate
    self.qk_norm = config.qk_norm
    if config.qk_norm:
      # The scales of a head are shared by all heads, which "tensor" splits, so they are replicated.
      self.query_norm = norm_of(config, rngs, width=config.head_dim, name=None)
      self.key_norm = norm_of(config, rngs, width=config.head_dim, name=None)

  def qkv(
    self, x: Float[Array, "B T D"], source: Float[Array, "B S D"] | None = None
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """Return the queries of x and the keys and values of `source` (default: x)."""
    source = x if source is None else source
    q, k, v = self.query(x), self.key(source), self.value(source)
    heads = [rearrange(a, "b t (n h) -> b t n h", n=self.num_heads) for a in (q, k, v)]
    if self.qk_norm:
      heads[:2] = self.query_norm(heads[0]), self.key_norm(heads[1])
    q, k, v = (constrain(a, *HEADS) for a in heads)
    return q, k, v

  def output(self, heads: Heads, x: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
    """Apply the gate, which reads the input `x` of the queries, and the output projection."""
    values = rearrange(heads, "b t n h -> b t (n h)")
    if self.gated:
      assert x is not None  # `Block.residual` passes it
      values = values * jax.nn.sigmoid(self.gate(x))
    return self.out(values)


class Mlp(nnx.Module):
  """Two-layer MLP, optionally gated."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d, f, dtype, bias = config.width, config.mlp_dim, config.compute_dtype, config.mlp_bias
    self.activation = config.activation
    self.gated = config.mlp == "gated"
    self.up = linear(d, f, style.up, ("embed", "mlp"), dtype, rngs, bias=bias)
    self.down = linear(f, d, style.down, ("mlp", "embed"), dtype, rngs, bias=bias)
    if self.gated:
      self.gate = linear(d, f, style.up, ("embed", "mlp"), dtype, rngs, bias=bias)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    act = ACTIVATIONS[self.activation]
    hidden = constrain(self.up(x), "batch", "length", "mlp")
    if self.gated:
      return self.down(act(constrain(self.gate(x), "batch", "length", "mlp")) * hidden)
    return self.down(act(hidden))


class Block(nnx.Module):
  """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

  On a mesh, the residual stream and the norms are constrained to the batch axes. Otherwise XLA
  propagates the sharding of the norm scales to them, and on three-axis meshes its partitioner (jax
  0.10.2) returned wrong sums for `x + mlp(x)`.
  """

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    self.implementation = config.attention
    self.norm1 = norm_of(config, rngs)
    self.attn = Attention(config, style, rngs=rngs)
    self.norm2 = norm_of(config, rngs)
    self.mlp = Mlp(config, style, rngs=rngs)
    self.scaled = config.layer_scale is not None
    if config.layer_scale is not None:
      scale = jnp.full((config.width,), config.layer_scale, jnp.float32)
      self.scale1 = nnx.Param(scale, **axes("norm"))
      self.scale2 = nnx.Param(scale, **axes("norm"))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Mask | Bool[Array, "..."],
    segments: Segments | None = None,
    rotate: Rotate | None = None,
    keep: BranchFactors | None = None,
  ) -> Float[Array, "B T D"]:
    q, k, v = self.qkv(x, rotate)
    return self.residual(x, attend(q, k, v, mask, self.implementation, segments), keep)

  def qkv(
    self, x: Float[Array, "B T D"], rotate: Rotate | None = None
  ) -> tuple[Heads, Heads, Heads]:
    """Return the queries, keys and values of the block, after `rotate`."""
    with jax.named_scope("attn"):
      q, k, v = self.attn.qkv(self._normed(x))
      return (q, k, v) if rotate is None else (*rotate(q, k), v)

  def residual(
    self, x: Float[Array, "B T D"], heads: Heads, keep: BranchFactors | None = None
  ) -> Float[Array, "B T D"]:
    """Return the output of the block, given its input and the attended heads.

    Args:
      x: input of the block.
      heads: attended heads.
      keep: factors of the two branches of each row, see `drop_path`; None for 1.
    """
    with jax.named_scope("attn"):
      branch = self.attn.output(heads, self._normed(x) if self.attn.gated else None)
      if self.scaled:
        branch = branch * self.scale1[...].astype(branch.dtype)
      x = constrain(x + (branch if keep is None else branch * keep[0]), *HIDDEN)
    with jax.named_scope("mlp"):
      branch = self.mlp(constrain(self.norm2(x), *HIDDEN))
      if self.scaled:
        branch = branch * self.scale2[...].astype(branch.dtype)
      return constrain(x + (branch if keep is None else branch * keep[1]), *HIDDEN)

  def _normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return constrain(self.norm1(constrain(x, *HIDDEN)), *HIDDEN)


def stack_blocks(config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> Block:
  """Return L blocks as one module whose parameters have a leading L axis."""
  keys = jax.random.split(rngs.params(), config.depth)
  return nnx.vmap(lambda key: Block(config, style, rngs=nnx.Rngs(key)))(keys)


def run_blocks(
  blocks: Block,
  x: Float[Array, "B T D"],
  mask: Mask | Bool[Array, "..."],
  config: TransformerConfig,
  segments: Segments | None = None,
  rotate: Rotate | None = None,
  *,
  keep: Float[Array, "L 2 B 1 1"] | None = None,
  all_layers: bool = False,
) -> Float[Array, "*L B T D"]:
  """Run stacked blocks over x.

  Args:
    blocks: stacked blocks.
    x: input of the first block.
    mask: attention mask, as for `attend`.
    config: configuration of the stack.
    segments: segment ids, as for `attend`.
    rotate: function applied to queries and keys in every block.
    keep: factors of the branches of every block, see `drop_path`; None for 1.
    all_layers: whether to return the input and the outputs of all blocks.

  Returns:
    The output of the last block, or [L + 1, B, T, D] with `all_layers`.
  """

  def step(
    block: Block, x: jax.Array, keep: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    x = block(x, mask, segments, rotate, keep)
    return x, x if all_layers else None

  last, outputs = fold_blocks(step, blocks, x, keep, config)
  return jnp.concatenate([x[None], outputs]) if all_layers else last


def drop_path(
  key: PRNGKeyArray, rates: Float[np.ndarray, " L"], batch: int, dtype: jnp.dtype
) -> Float[Array, "L 2 B 1 1"]:
  """Return random factors of the branches of each block: 0 with probability p, or 1 / (1 - p).

  Stochastic depth, https://arxiv.org/abs/1603.09382.

  Args:
    key: random key.
    rates: probability p of each layer.
    batch: number of rows.
    dtype: dtype of the factors.
  """
  kept = jnp.asarray(1 - rates, jnp.float32)[:, None, None, None, None]
  uniform = jax.random.uniform(key, (len(rates), 2, batch, 1, 1), jnp.float32)
  return jnp.where(uniform < kept, 1 / kept, 0).astype(dtype)


def fold_blocks(
  step: Callable[[Block, jax.Array, Any], tuple[jax.Array, Any]],
  blocks: Block,
  x: Float[Array, "B T D"],
  per_layer: Any,
  config: TransformerConfig,
) -> tuple[Float[Array, "B T D"], Any]:
  """Fold x, y_l = step(block_l, x, per_layer[l]) over the layers.

  Args:
    step: function that applies one layer.
    blocks: stacked blocks.
    x: initial carry.
    per_layer: pytree of arrays with a leading L axis, or None.
    config: configuration of the stack; sets scan and rematerialisation.

  Returns:
    The final carry, and the stacked outputs y_l.
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
  """Return one layer of a tree of stacked arrays."""
  return jax.tree.map(lambda a: a[layer], stacked)


def _remat(body: Callable[..., Any], config: TransformerConfig) -> Callable[..., Any]:
  policies = jax.checkpoint_policies
  policy = {
    "none": policies.dots_saveable,
    "full": policies.nothing_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
  }[config.remat]
  # Inside scan, the loop prevents CSE of the two forward passes.
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
  """Return a dense layer with float32 parameters and zero bias that computes in `dtype`."""
  return nnx.Linear(
    d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs,
    kernel_metadata=axes(*names), bias_metadata=axes(None),
  )  # fmt: skip


def norm_of(
  config: TransformerConfig,
  rngs: nnx.Rngs,
  *,
  width: int | None = None,
  dtype: jnp.dtype | None = None,
  name: str | None = "norm",
) -> Norm:
  """Return the norm of a stack, with float32 statistics.

  Args:
    config: configuration of the stack.
    rngs: random keys, which norms do not use.
    width: number of channels; that of the stack by default.
    dtype: dtype of the result; the compute dtype by default.
    name: logical name of the axis of the scales.
  """
  width = config.width if width is None else width
  dtype = config.compute_dtype if dtype is None else dtype
  shared: dict[str, Any] = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
  shared["scale_metadata"] = axes(name)
  if config.norm == "rms":
    return nnx.RMSNorm(width, **shared)
  return nnx.LayerNorm(width, bias_metadata=axes(None), **shared)
