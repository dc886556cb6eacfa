"""Functional API: models as pure functions over nested dicts of arrays."""

from collections.abc import Mapping
import functools
import math
from typing import Any, overload

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ov_models.config import TransformerConfig
from ov_models.decoder import DecoderConfig
from ov_models.model import VisionLanguageModel
from ov_models.model_config import VisionLanguageConfig
from ov_models.query_decoder import QueryDecoderConfig
from ov_models.text import TextConfig, TextEncoder
from ov_models.vit import ViT
from ov_models.vit_config import ViTConfig

Params = dict[str, Any]
Config = ViTConfig | TextConfig | VisionLanguageConfig
_MODULES: dict[type, Any] = {
  ViTConfig: ViT,
  TextConfig: TextEncoder,
  VisionLanguageConfig: VisionLanguageModel,
}


def _build(config: Config, rngs: nnx.Rngs) -> nnx.Module:
  if type(config) not in _MODULES:
    raise TypeError(
      f"config is a {type(config).__name__}; expected ViTConfig, TextConfig or "
      "VisionLanguageConfig."
    )
  return _MODULES[type(config)](config, rngs=rngs)


@functools.lru_cache(maxsize=64)
def _abstract(config: Config) -> tuple[Any, nnx.State]:
  """Return the graph definition and abstract parameters, without using a device."""
  return nnx.split(nnx.eval_shape(lambda: _build(config, nnx.Rngs(jax.random.key(0)))))


@functools.partial(jax.jit, static_argnames="config")
def init(config: Config, key: PRNGKeyArray) -> Params:
  """Return initial parameters as a nested dict of float32 arrays.

  To create sharded parameters, use `jax.jit(partial(init, config), out_shardings=...)(key)`.
  """
  return nnx.to_pure_dict(nnx.state(_build(config, nnx.Rngs(key))))


def abstract_params(config: Config) -> Params:
  """Return the tree of `init` as jax.ShapeDtypeStruct, without allocating arrays."""
  return jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), nnx.to_pure_dict(_abstract(config)[1])
  )


@overload
def bind(config: ViTConfig, params: Params) -> ViT: ...
@overload
def bind(config: TextConfig, params: Params) -> TextEncoder: ...
@overload
def bind(config: VisionLanguageConfig, params: Params) -> VisionLanguageModel: ...
def bind(config: Config, params: Params) -> ViT | TextEncoder | VisionLanguageModel:
  """Return the module of `config` with parameters `params`; cheap, and usable inside jit and grad.

  Raises:
    ValueError: if a parameter is missing, unexpected, of another shape, or not a float array. The
      message lists the first mismatches.
  """
  params = plain_dict(params)
  _check_tree(abstract_params(config), params)
  return nnx.merge(_abstract(config)[0], jax.tree.map(_float64_to_float32, params))


def plain_dict(params: Any) -> Params:
  """Convert nested mappings, such as FrozenDict or nnx.State, to nested dicts.

  Raises:
    ValueError: if `params` is not a mapping.
  """
  if isinstance(params, nnx.State):
    return nnx.to_pure_dict(params)
  if not isinstance(params, Mapping):
    raise ValueError(
      f"params is a {type(params).__name__}; expected nested dicts of arrays, as ov_models.init "
      "returns."
    )
  return {k: plain_dict(v) if isinstance(v, Mapping) else v for k, v in params.items()}


def _float64_to_float32(leaf: jax.Array) -> jax.Array:
  return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf


def _check_tree(expected: Params, got: Params) -> None:
  def flat(tree: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}

  leaves = flat(got)
  non_arrays = [name for name, leaf in leaves.items() if not hasattr(leaf, "dtype")]
  found = [f"{name} is a {type(leaves[name]).__name__}, expected an array" for name in non_arrays]
  want = {name: tuple(leaf.shape) for name, leaf in flat(expected).items()}
  have = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name not in non_arrays}
  found += differences(want, have | {name: want.get(name, ()) for name in non_arrays})
  found += [
    f"{name} is {leaves[name].dtype}, expected float32"
    for name in have
    if not jnp.issubdtype(leaves[name].dtype, jnp.floating)
  ]
  if found:
    raise ValueError(f"parameters do not match the config: {first_few(found)}.")


def differences(want: Mapping[str, tuple], have: Mapping[str, tuple]) -> list[str]:
  """Return descriptions of the differences between two mappings from names to shapes."""
  found = [f"missing {name} {want[name]}" for name in want if name not in have]
  found += [f"unexpected {name} {have[name]}" for name in have if name not in want]
  found += [
    f"{name} is {have[name]}, expected {want[name]}"
    for name in want
    if name in have and want[name] != have[name]
  ]
  return found


def first_few(found: list[str], most: int = 6) -> str:
  """Return the first differences in one line, for an error message."""
  more = f"; and {len(found) - most} more" if len(found) > most else ""
  return "; ".join(found[:most]) + more


def logical_axes(config: Config) -> Params:
  """Return the logical axis names of every parameter: the tree of `init` with tuples as leaves.

  Names are "embed", "mlp", "vocab", "norm", None for an unsharded axis, and "layers" for the first
  axis of stacked layers.
  """

  tree: Params = {}
  for path, variable in nnx.to_flat_state(_abstract(config)[1]):
    *parents, leaf = map(str, path)
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    axes = tuple(variable.get_metadata()["logical_axes"])
    node[leaf] = ("layers", *axes) if "blocks" in parents else axes
  return tree


def num_params(config_or_params: Config | Params) -> int:
  """Return the number of parameters of a config or parameter tree.

  Examples:
    >>> import ov_models
    >>> ov_models.num_params(ov_models.ViTConfig.from_name("Ti/16", image_size=160))
    5486400
  """
  tree = config_or_params
  if isinstance(tree, Config):
    tree = abstract_params(tree)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops_per_example(config: VisionLanguageConfig, *, num_texts: int = 2) -> int:
  """Return the model FLOPs of one training example, forward and backward.

  Model FLOPs as defined for MFU (https://arxiv.org/abs/2204.02311, appendix B): matmuls only, two
  operations per multiply-add, backward twice the forward, no rematerialisation, and full T x T
  attention for any mask. Masked patches, dropped tokens and the similarity matrix of a contrastive
  loss are not counted.

  Args:
    config: configuration of the model. Texts and captions have their maximum length.
    num_texts: number of texts per image for the text tower; 2 in the published recipe.
  """
  vit = config.encoder
  patch = 2 * vit.num_patches * 3 * vit.patch_size**2 * vit.width
  tokens = vit.num_unmasked + vit.num_prefix
  total = patch + _stack_flops(vit, tokens) + _pool_flops(vit, tokens)
  text_tokens = 0  # text tokens that a query decoder reads
  if (text := config.text) is not None:
    heads = vit.width * config.image_head + num_texts * text.width
    total += num_texts * _stack_flops(text, text.max_len) + 2 * heads * config.embed_dim
    text_tokens = text.max_len - 1 if text.pool == "last" else text.max_len
  if isinstance(decoder := config.decoder, QueryDecoderConfig):
    tokens = config.num_kept + text_tokens + decoder.num_queries
    projected = config.num_kept * vit.width + text_tokens * (text.width if text else 0)
    total += 2 * projected * decoder.width + _stack_flops(decoder, tokens)
    total += 2 * decoder.num_queries * decoder.width * decoder.vocab_size
  elif decoder is not None:
    total += _decoder_flops(decoder, vit.width, config.num_kept)
  return 3 * total


def _decoder_flops(config: DecoderConfig, image_width: int, num_image: int) -> int:
  project = 2 * num_image * image_width * config.width
  head = 2 * config.max_len * config.width * config.vocab_size
  return project + _stack_flops(config, num_image + config.max_len) + head


def _stack_flops(config: TransformerConfig, tokens: int) -> int:
  d = config.width
  weights = (5 if config.attention_gate else 4) * d * d
  weights += (3 if config.mlp == "gated" else 2) * d * config.mlp_dim
  return config.depth * (2 * tokens * weights + 4 * tokens * tokens * d)


def _pool_flops(config: ViTConfig, tokens: int) -> int:
  """Return the FLOPs of attention pooling: keys and values of all tokens, and one query."""
  d = config.width
  if config.pool not in ("map", "attend"):
    return 0
  one = d * d  # the output projection
  if config.pool == "map":
    one += d * d + 2 * d * config.pool_config.mlp_dim
  return 2 * (2 * tokens * d * d + one) + 4 * tokens * d
