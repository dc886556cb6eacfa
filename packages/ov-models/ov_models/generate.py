"""Captions from images: greedy, sampled or by beam search, with a key-value cache."""

import dataclasses
from functools import partial
from typing import Any, Literal, Protocol

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models import contexts, partition
from ov_models.config import check_choice, check_ratio
from ov_models.decoder import Decoder, DecoderConfig

Method = Literal["greedy", "sample", "beam"]


class CaptionModel(Protocol):
  """What `generate` needs: a VisionLanguageModel, or another nnx.Module with these methods."""

  @property
  def decoder(self) -> Any:
    """A Decoder."""

  def encode(self, images: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
    """Anything, and the image tokens [B, K, E] for the decoder."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerateOutput:
  """Captions.

  Attributes:
    ids: int32 [B, T], what follows the begin token: words, end token, padding.
    length: int32 [B], tokens before the padding, the end token included.
    log_prob: float32 [B], of those tokens under the model (temperature and top-p not applied).
  """

  ids: jax.Array
  length: jax.Array
  log_prob: jax.Array


@dataclasses.dataclass(frozen=True)
class _Options:
  max_len: int
  bos_id: int
  eos_id: int
  pad_id: int
  method: Method
  temperature: float
  top_p: float
  num_beams: int
  length_penalty: float


def generate(
  model: CaptionModel,
  images: jax.Array,
  *,
  max_len: int,
  bos_id: int,
  eos_id: int,
  pad_id: int,
  method: Method = "greedy",
  temperature: float = 1.0,
  top_p: float = 1.0,
  num_beams: int = 4,
  length_penalty: float = 1.0,
  key: jax.Array | None = None,
) -> GenerateOutput:
  """Writes one caption per image; compiled once per model structure, shape and set of options.

  Args:
    model: the bound model, with a `Decoder`. A captioner's `eval_keep` says which image tokens are
      used.
    images: float32 [B, H, W, 3], normalised.
    max_len: T, most tokens to write.
    bos_id: the token that starts each caption.
    eos_id: the token that ends one.
    pad_id: what fills up after the end.
    method: "greedy", "sample" or "beam".
    temperature: of "sample": logits are divided by it.
    top_p: of "sample": only the smallest set of tokens that holds this probability is drawn from
      (nucleus sampling, https://arxiv.org/abs/1904.09751).
    num_beams: of "beam": hypotheses kept. Ended ones stay in the beam and compete.
    length_penalty: of "beam": hypotheses are ranked by log_prob / length ** length_penalty.
    key: random key of "sample".

  Raises:
    TypeError: the model has no decoder that is fed its own words.
    ValueError: an option out of range, or "sample" without a key.
  """
  decoder = getattr(model, "decoder", None)
  if not isinstance(decoder, Decoder):
    raise TypeError(
      f"the decoder of {type(model).__name__} is a {type(decoder).__name__}; generation feeds "
      "each written token back and needs a Decoder: build the model with a DecoderConfig."
    )
  options = _Options(
    max_len, bos_id, eos_id, pad_id, method, temperature, top_p, num_beams, length_penalty
  )
  _check(decoder.config, options, key)
  graphdef, params = nnx.split(model)
  key = key if method == "sample" else None
  return _generate(params, images, key, graphdef, options, partition.current())


def _check(text: DecoderConfig, options: _Options, key: jax.Array | None) -> None:
  check_choice("method", options.method, ("greedy", "sample", "beam"))
  check_ratio("top_p", options.top_p, zero=False, one=True)
  for name in ("bos_id", "eos_id", "pad_id"):
    if not 0 <= (value := getattr(options, name)) < text.vocab_size:
      raise ValueError(f"{name}={value} is outside the vocabulary of {text.vocab_size} tokens.")
  for name in ("max_len", "num_beams"):
    if (value := getattr(options, name)) < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if text.position == "learned" and options.max_len > text.max_len:
    raise ValueError(
      f"max_len={options.max_len} exceeds the {text.max_len} learned positions of the decoder; "
      f"ask for at most {text.max_len} tokens."
    )
  if options.temperature <= 0:
    raise ValueError(
      f"temperature={options.temperature} must be positive; use method='greedy' for the limit 0."
    )
  if options.method == "sample" and key is None:
    raise ValueError("method='sample' draws at random: pass key=jax.random.key(seed).")


@partial(jax.jit, static_argnames=("graphdef", "options", "layout"))
def _generate(
  params: Any, images: jax.Array, key: jax.Array | None,
  graphdef: Any, options: _Options, layout: Any,
) -> GenerateOutput:  # fmt: skip
  def run(params: Any, images: jax.Array, key: jax.Array | None) -> GenerateOutput:
    model = nnx.merge(graphdef, params)
    _, image_tokens = model.encode(images)
    image_tokens = contexts.vary_as(image_tokens, (params, key))
    if options.method == "beam":
      return _beam(model.decoder, image_tokens, options)
    return _single(model.decoder, image_tokens, options, key)

  with partition.using(layout):
    return contexts.run(run, params, images, key, rows=images)


def _single(
  decoder: Decoder, image_tokens: jax.Array, options: _Options, key: jax.Array | None
) -> GenerateOutput:
  """One hypothesis per image: sampled with a key, greedy without."""
  batch, max_len = image_tokens.shape[0], options.max_len

  def unfinished(state: dict[str, Any]) -> jax.Array:
    return (state["t"] < max_len) & ~state["done"].all()

  def step(state: dict[str, Any]) -> dict[str, Any]:
    t, done = state["t"], state["done"]
    hidden, cache = decoder.step(state["token"], t, state["cache"])
    logits = decoder.logits(hidden)
    if key is not None:
      filtered = _nucleus(logits / options.temperature, options.top_p)
      token = jax.random.categorical(jax.random.fold_in(key, t), filtered)
    else:
      token = logits.argmax(axis=-1)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    token = jnp.where(done, options.pad_id, token).astype(jnp.int32)
    return {
      "t": t + 1,
      "token": token,
      "ids": state["ids"].at[:, t].set(token),
      "length": state["length"] + ~done,
      "log_prob": state["log_prob"] + jnp.where(done, 0.0, log_prob),
      "done": done | (token == options.eos_id),
      "cache": cache,
    }

  state = {
    "t": jnp.int32(0),
    "token": jnp.full(batch, options.bos_id, jnp.int32),
    "ids": jnp.full((batch, max_len), options.pad_id, jnp.int32),
    "length": jnp.zeros(batch, jnp.int32),
    "log_prob": jnp.zeros(batch, jnp.float32),
    "done": jnp.zeros(batch, bool),
    "cache": decoder.prefill(image_tokens, max_len),
  }
  state = jax.tree.map(lambda x: contexts.vary_as(x, image_tokens), state)
  state = jax.lax.while_loop(unfinished, step, state)
  return GenerateOutput(state["ids"], state["length"], state["log_prob"])


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
  """Logits [B, V] with all but the likeliest tokens of total probability top_p at -inf."""
  descending = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(descending)
  before = jnp.cumsum(probability, axis=-1) - probability
  cutoff = jnp.min(descending, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf)
  return jnp.where(logits >= cutoff, logits, -jnp.inf)


def _beam(decoder: Decoder, image_tokens: jax.Array, options: _Options) -> GenerateOutput:
  """Beam search over W hypotheses per image, flattened to B * W rows for the decoder."""
  batch, width, max_len = image_tokens.shape[0], options.num_beams, options.max_len
  vocab = decoder.config.vocab_size
  # An ended hypothesis goes on with padding, free of charge.
  only_pad = jnp.where(jnp.arange(vocab) == options.pad_id, 0.0, -jnp.inf).astype(jnp.float32)

  def rank(log_prob: jax.Array, length: jax.Array) -> jax.Array:
    return log_prob / jnp.maximum(length, 1).astype(jnp.float32) ** options.length_penalty

  def unfinished(state: dict[str, Any]) -> jax.Array:
    return (state["t"] < max_len) & ~state["done"].all()

  def step(state: dict[str, Any]) -> dict[str, Any]:
    t, done = state["t"], state["done"]
    hidden, cache = decoder.step(state["token"].reshape(batch * width), t, state["cache"])
    log_prob = jax.nn.log_softmax(decoder.logits(hidden)).reshape(batch, width, vocab)
    log_prob = jnp.where(done[..., None], only_pad, log_prob) + state["log_prob"][..., None]
    length = state["length"] + ~done
    scores = rank(log_prob, length[..., None]).reshape(batch, width * vocab)
    chosen = jax.lax.top_k(scores, width)[1]
    parent, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)

    def inherit(a: jax.Array, axis: int = 1) -> jax.Array:
      index = parent.reshape((1,) * (axis - 1) + parent.shape + (1,) * (a.ndim - axis - 1))
      return jnp.take_along_axis(a, index, axis)

    def inherit_cache(a: jax.Array) -> jax.Array:
      # Within each image's beam: an index over B * W rows would cross devices.
      beams = a.reshape(a.shape[0], batch, width, *a.shape[2:])
      return inherit(beams, axis=2).reshape(a.shape)

    return {
      "t": t + 1,
      "token": token,
      "ids": inherit(state["ids"]).at[:, :, t].set(token),
      "length": inherit(length),
      "log_prob": jnp.take_along_axis(log_prob.reshape(batch, width * vocab), chosen, axis=1),
      "done": inherit(done) | (token == options.eos_id),
      "cache": jax.tree.map(inherit_cache, cache),
    }

  cache = decoder.prefill(image_tokens, max_len)
  first_only = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
  state = {
    "t": jnp.int32(0),
    "token": jnp.full((batch, width), options.bos_id, jnp.int32),
    "ids": jnp.full((batch, width, max_len), options.pad_id, jnp.int32),
    "length": jnp.zeros((batch, width), jnp.int32),
    # All start equal: only the first may branch, or all would hold the same caption.
    "log_prob": jnp.tile(first_only.astype(jnp.float32), (batch, 1)),
    "done": jnp.zeros((batch, width), bool),
    "cache": jax.tree.map(lambda a: jnp.repeat(a, width, axis=1), cache),
  }
  state = jax.tree.map(lambda x: contexts.vary_as(x, image_tokens), state)
  state = jax.lax.while_loop(unfinished, step, state)
  best = rank(state["log_prob"], state["length"]).argmax(axis=1)
  take = jax.vmap(lambda rows, index: rows[index])
  return GenerateOutput(
    take(state["ids"], best), take(state["length"], best), take(state["log_prob"], best)
  )
