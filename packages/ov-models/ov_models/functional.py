"""Models as pure functions over plain nested dicts of arrays."""

from collections.abc import Mapping
import functools
import math
from typing import Any, overload

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.config import TransformerConfig
from ov_models.decoder import DecoderConfig
from ov_models.model import VisionLanguageModel
from ov_models.model_config import VisionLanguageConfig
from ov_models.query_decoder import QueryDecoderConfig
from ov_models.text import TextConfig, TextEncoder
from ov_models.vit import ViT, ViTConfig

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
  """Structure and abstract parameters. The key is made inside: nothing touches a device."""
  return nnx.split(nnx.eval_shape(lambda: _build(config, nnx.Rngs(jax.random.key(0)))))


@functools.partial(jax.jit, static_argnames="config")
def init(config: Config, key: jax.Array) -> Params:
  """Fresh parameters: nested dict of float32 arrays.

  To create them sharded, wrap it: `jax.jit(partial(init, config), out_shardings=...)(key)`.
  """
  return nnx.to_pure_dict(nnx.state(_build(config, nnx.Rngs(key))))


def abstract_params(config: Config) -> Params:
  """The tree of `init` as jax.ShapeDtypeStruct, without computing anything."""
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
  """The module of `config` over `params`; cheap, usable inside jit, grad and vmap.

  Raises:
    ValueError: a parameter is missing, left over, of another shape, or no float; the message
      lists the first ones.
  """
  params = plain_dict(params)
  _check_tree(abstract_params(config), params)
  return nnx.merge(_abstract(config)[0], jax.tree.map(_at_most_float32, params))


def plain_dict(params: Any) -> Params:
  """Nested dicts from nested mappings, such as flax's FrozenDict or nnx.State.

  Raises:
    ValueError: `params` is no mapping.
  """
  if isinstance(params, nnx.State):
    return nnx.to_pure_dict(params)
  if not isinstance(params, Mapping):
    raise ValueError(
      f"params is a {type(params).__name__}; expected nested dicts of arrays, as ov_models.init "
      "returns."
    )
  return {k: plain_dict(v) if isinstance(v, Mapping) else v for k, v in params.items()}


def _at_most_float32(leaf: jax.Array) -> jax.Array:
  return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf


def _check_tree(expected: Params, got: Params) -> None:
  def flat(tree: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}

  leaves = flat(got)
  strange = [name for name, leaf in leaves.items() if not hasattr(leaf, "dtype")]
  found = [f"{name} is a {type(leaves[name]).__name__}, expected an array" for name in strange]
  want = {name: tuple(leaf.shape) for name, leaf in flat(expected).items()}
  have = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name not in strange}
  found += differences(want, have | {name: want.get(name, ()) for name in strange})
  found += [
    f"{name} is {leaves[name].dtype}, expected float32"
    for name in have
    if not jnp.issubdtype(leaves[name].dtype, jnp.floating)
  ]
  if found:
    raise ValueError(f"parameters do not fit the config: {first_few(found)}.")


def differences(want: Mapping[str, tuple], have: Mapping[str, tuple]) -> list[str]:
  """What two tables of names and shapes do not share, in words."""
  found = [f"missing {name} {want[name]}" for name in want if name not in have]
  found += [f"left over {name} {have[name]}" for name in have if name not in want]
  found += [
    f"{name} is {have[name]}, expected {want[name]}"
    for name in want
    if name in have and want[name] != have[name]
  ]
  return found


def first_few(found: list[str], most: int = 6) -> str:
  """The first of many differences, for a message of one line."""
  more = f"; and {len(found) - most} more" if len(found) > most else ""
  return "; ".join(found[:most]) + more


def logical_axes(config: Config) -> Params:
  """Logical axis names of every parameter: the tree of `init` with tuples as leaves.

  Names: "embed", "mlp", "vocab", "norm", None for an axis that stays whole, and "layers" first
  for stacked layers.
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
  """Number of parameters of a config or of a tree."""
  tree = config_or_params
  if isinstance(tree, Config):
    tree = abstract_params(tree)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops_per_example(config: VisionLanguageConfig, *, num_texts: int = 2) -> int:
  """Floating point operations of one training example, forward and backward.

  Model FLOPs as used for MFU (https://arxiv.org/abs/2204.02311, appendix B): matmuls only, two
  operations per multiply-add, backward twice the forward, nothing for rematerialisation, full
  T x T attention whatever the mask. Masked patches and dropped tokens are not counted; nor is
  the similarity matrix of a contrastive loss, which belongs to the batch.

  Args:
    config: of the model. Texts and captions have the length that its parts are made for.
    num_texts: texts per image through the text tower; published: 2.
  """
  vit = config.encoder
  patch = 2 * vit.num_patches * 3 * vit.patch_size**2 * vit.width
  total = patch + _stack_flops(vit, vit.num_unmasked + 1)
  text_tokens = 0  # that a decoder with queries reads
  if (text := config.text) is not None:
    heads = vit.width + num_texts * text.width
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
  weights = 4 * d * d + 2 * d * config.mlp_dim
  return config.depth * (2 * tokens * weights + 4 * tokens * tokens * d)
