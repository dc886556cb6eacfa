"""The train steps of both models as their predecessor computes them: what `step` compares with.

From the same params come the same loss and the same gradients. Everything is written out where the
step of this repository has something better: layers that are unrolled, one array a layer; logits of
all tokens, [B, T, V] float32, against one-hot targets; similarities and softmaxes as they stand in
the papers; gradients from automatic differentiation alone; an optimizer of six transformations.

OpenVision: https://arxiv.org/abs/2505.04601. OpenVision 2: https://arxiv.org/abs/2509.01644.
"""

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apps.trainer.augment import normalise
from apps.trainer.parts import Parts
import ov_models
from ov_models import masking
from ov_models.attention import Mask
from ov_models.config import TransformerConfig
from ov_models.positions import sincos2d

Params = Any
Batch = dict[str, jax.Array]
Loss = Callable[[Params, Batch, jax.Array], jax.Array]


def unstack(params: Params) -> Params:
  """Our params with a list of layers for each stack of them."""
  if not isinstance(params, dict):
    return params
  layers = lambda stack: [
    jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(len(jax.tree.leaves(stack)[0]))
  ]
  return {name: layers(of) if name == "blocks" else unstack(of) for name, of in params.items()}


def caption_loss(config: ov_models.VisionLanguageConfig, pad_id: int, weight: float) -> Loss:
  """Next-token prediction from some of the image tokens: OpenVision 2."""

  def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    tokens = _image_tower(config.encoder, params["encoder"], batch["image"])[:, 1:]
    count, total = tokens.shape[:2]
    keep, ordered = masking.num_kept(total, config.keep_ratio), config.keep_order == "sorted"
    index = masking.random_index(jax.random.split(key)[1], count, total, keep, ordered=ordered)
    tokens = masking.take_tokens(tokens, index)
    decoder, ids = params["decoder"], batch["ids"]
    text = decoder["embed"]["embedding"][ids]
    if config.decoder.position == "learned":
      text = text + decoder["position_embedding"]
    prefix = tokens.shape[1] if config.decoder.mask == "prefix" else 0
    x = jnp.concatenate([_dense(decoder["image_proj"], tokens.astype(jnp.float32)), text], axis=1)
    x = _blocks(config.decoder, decoder["blocks"], x, Mask(config.decoder.mask, prefix))
    x = _norm(decoder["norm"], x[:, tokens.shape[1] :])
    return weight * _caption_nll(decoder, x, ids, pad_id)

  return loss


def clip_loss(
  config: ov_models.VisionLanguageConfig, pad_id: int, clip_weight: float, caption_weight: float
) -> Loss:
  """Contrast of an image with two texts, and the caption from learned queries: OpenVision."""
  text_config, decoder_config = config.text, config.decoder
  assert text_config is not None and decoder_config is not None

  def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    del key
    image = _image_tower(config.encoder, params["encoder"], batch["image"])
    pooled = _norm(params["encoder"]["norm"], image[:, 1:].mean(axis=1))
    image_unit = _unit(_dense(params["image_head"], pooled))
    ids = jnp.concatenate([batch["alt_ids"], batch["sentence_ids"]])
    text = _text_tower(text_config, params["text"], ids)
    text_unit = _unit(_dense(params["text_head"], _norm(params["text"]["norm"], text)[:, -1]))
    scale = jnp.exp(params["log_scale"])
    pairs = [_contrast(image_unit, unit, scale) for unit in jnp.split(text_unit, 2)]

    decoder, count = params["decoder"], len(image)
    parts = [
      _dense(decoder["image_proj"], image[:, 1:].astype(jnp.float32)),
      _dense(decoder["text_proj"], text[:count, :-1].astype(jnp.float32)),
      jnp.tile(decoder["queries"], (count, 1, 1)),
    ]
    prefix = parts[0].shape[1] + parts[1].shape[1]
    x = jnp.concatenate(parts, axis=1)
    x = _blocks(decoder_config, decoder["blocks"], x, Mask("prefix", prefix))
    x = _norm(decoder["norm"], x[:, prefix:])
    captions = _caption_nll(decoder, x, batch["caption_ids"], pad_id)
    return clip_weight * sum(pairs) / len(pairs) + caption_weight * captions

  return loss


def make_step(parts: Parts) -> jax.stages.Wrapped:
  """The jitted step for the parts of one of ours; the state is donated."""
  loss, tx = loss_of(parts.task), make_optimizer(parts.optimizer.learning_rate)

  def step(state: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(0), state["step"])
    batch = batch | {"image": normalise(batch["image"])}
    value, grads = jax.value_and_grad(loss)(state["params"], batch, key)
    updates, opt = tx.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    norms = {"grads": grads, "params": params, "updates": updates}
    metrics = {name: optax.tree.norm(tree) for name, tree in norms.items()}
    return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics | {"loss": value}

  return jax.jit(step, donate_argnums=0)


def new_state(parts: Parts, params: Params) -> dict[str, Any]:
  """The state of that step, from our params."""
  params, tx = unstack(params), make_optimizer(parts.optimizer.learning_rate)
  return {"params": params, "opt": tx.init(params), "step": jnp.zeros((), jnp.int32)}


def make_optimizer(learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """AdamW with decay on kernels, the first moment in bfloat16."""

  def mask(matches: str) -> Callable[[Params], Params]:
    leaf = lambda path, _: bool(re.search(matches, jax.tree_util.keystr(path)))
    return lambda params: jax.tree_util.tree_map_with_path(leaf, params)

  return optax.chain(
    optax.identity(),
    optax.masked(optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=jnp.bfloat16), mask("")),
    optax.add_decayed_weights(0.2, mask=mask(r"'kernel'\]$")),
    optax.masked(optax.scale_by_schedule(learning_rate), mask("")),
    optax.masked(optax.set_to_zero(), mask("^frozen")),
    optax.scale(-1.0),
  )


def loss_of(task: Any) -> Loss:
  """The loss of a task of caption_train or clip_train, of normalised images."""
  if task.model.text is None:
    return caption_loss(task.model, task.pad_id, task.caption_weight)
  return clip_loss(task.model, task.pad_id, task.weights.clip, task.weights.caption)


def _image_tower(config: ov_models.ViTConfig, params: Params, images: jax.Array) -> jax.Array:
  """[B, 1 + N, D], cls first."""
  kernel, patch = params["patch_embed"]["kernel"], config.patch_size
  x = jax.lax.conv_general_dilated(
    images, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  count, rows, columns, width = x.shape
  x = x.reshape(count, -1, width) + sincos2d(rows, columns, width)
  x = jnp.concatenate([jnp.tile(params["cls"], (count, 1, 1)), x], axis=1)
  return _blocks(config, params["blocks"], x, Mask(), gelu_tanh=False)


def _text_tower(config: TransformerConfig, params: Params, ids: jax.Array) -> jax.Array:
  """[B, T, D] before the norm; padding takes part."""
  x = params["embed"]["embedding"][ids] + params["position_embedding"]
  return _blocks(config, params["blocks"], x, Mask())


def _blocks(
  config: TransformerConfig,
  layers: list[Params],
  x: jax.Array,
  mask: Mask,
  gelu_tanh: bool = True,
) -> jax.Array:
  """Pre-norm blocks in the config's compute dtype."""
  x = x.astype(config.compute_dtype)
  allowed = None if mask.kind == "full" else jnp.asarray(mask.array(x.shape[1]))
  for layer in layers:
    normed, attn = _norm(layer["norm1"], x), layer["attn"]
    query, key, value = (
      _dense(attn[name], normed).reshape(*x.shape[:2], config.num_heads, -1)
      for name in ("query", "key", "value")
    )
    scores = jnp.einsum("btnh,bsnh->bnts", query * config.head_dim**-0.5, key)
    if allowed is not None:
      scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)
    x = x + _dense(attn["out"], mixed.reshape(x.shape))
    hidden = _dense(layer["mlp"]["up"], _norm(layer["norm2"], x))
    x = x + _dense(layer["mlp"]["down"], jax.nn.gelu(hidden, approximate=gelu_tanh))
  return x


def _norm(params: Params, x: jax.Array) -> jax.Array:
  """Layer norm with float32 statistics."""
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  variance = jnp.maximum(jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean), 0)
  normed = (wide - mean) * jax.lax.rsqrt(variance + 1e-6) * params["scale"] + params["bias"]
  return normed.astype(x.dtype)


def _dense(params: Params, x: jax.Array) -> jax.Array:
  y = x @ params["kernel"].astype(x.dtype)
  return y + params["bias"].astype(x.dtype) if "bias" in params else y


def _unit(z: jax.Array) -> jax.Array:
  return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


def _contrast(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
  """Softmax cross-entropy both ways, the mean over [B, E] pairs."""
  logits = scale * image @ text.T
  ways = [-jnp.diagonal(jax.nn.log_softmax(one)).mean() for one in (logits, logits.T)]
  return sum(ways) / 2


def _caption_nll(decoder: Params, hidden: jax.Array, ids: jax.Array, pad_id: int) -> jax.Array:
  """Position t predicts token t + 1; the masked mean over all tokens."""
  targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=pad_id)
  mask = targets != pad_id
  logits = _dense(decoder["head"], hidden.astype(jnp.float32))
  one_hot = jax.nn.one_hot(targets, logits.shape[-1])
  nll = -jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1)
  return jnp.sum(nll * mask) / (jnp.sum(mask) + 1e-8)
