"""Caption generation with a key-value cache: greedy, sampling and beam search."""

import dataclasses
from functools import partial
from typing import Any, Literal, Protocol

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from ov_models import contexts
from ov_models.config import check_choice, check_ratio
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.shapes import AnyArray

Method = Literal["greedy", "sample", "beam"]


class CaptionModel(Protocol):
  """Protocol of models for `generate`: VisionLanguageModel, or an nnx.Module with these methods."""

  @property
  def decoder(self) -> Any:
    """Return the Decoder."""

  def encode(
    self, images: Float[AnyArray, "B H W 3"], key: PRNGKeyArray | None = None
  ) -> tuple[Any, Float[Array, "B K E"]]:
    """Return a pair whose second element is the image tokens for the decoder."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerateOutput:
  """Generated captions.

  Attributes:
    ids: int32 token ids after the begin token: words, end token, padding.
    length: int32 number of tokens, including the end token.
    log_prob: float32 log probability of these tokens, without temperature, top-k and top-p.
  """

  ids: Int[AnyArray, "B T"]
  length: Int[Array, " B"]
  log_prob: Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class _Options:
  max_len: int
  bos_id: int
  eos_id: int
  pad_id: int
  method: Method
  temperature: float
  top_k: int | None
  top_p: float
  num_beams: int
  length_penalty: float


def generate(
  model: CaptionModel,
  images: Float[AnyArray, "B H W 3"],
  *,
  max_len: int,
  bos_id: int,
  eos_id: int,
  pad_id: int,
  method: Method = "greedy",
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
  num_beams: int = 4,
  length_penalty: float = 1.0,
  key: Key[Array, ""] | Key[Array, " B"] | None = None,
) -> GenerateOutput:
  """Generate one caption per image. Compiled once per model structure, shapes and options.

  Args:
    model: bound model with a `Decoder`. `eval_keep` of its config selects the image tokens.
    images: normalised images.
    max_len: maximum number T of tokens to generate.
    bos_id: id of the begin token.
    eos_id: id of the end token.
    pad_id: id of the padding token.
    method: decoding method, "greedy", "sample" or "beam".
    temperature: divisor of the logits for "sample".
    top_k: number of most likely tokens from which "sample" draws, weighted by their probability
      (https://arxiv.org/abs/1805.04833); None for all. Tokens as likely as the last are included.
    top_p: probability mass for nucleus sampling with "sample"
      (https://arxiv.org/abs/1904.09751), of the distribution that `top_k` leaves.
    num_beams: number of hypotheses for "beam". Finished hypotheses stay in the beam.
    length_penalty: exponent for "beam"; hypotheses are ranked by
      log_prob / length ** length_penalty.
    key: random key for "sample"; with one key per image, a caption does not depend on its row.

  Raises:
    TypeError: if the model has no autoregressive decoder.
    ValueError: if an option is out of range, or "sample" has no key.
  """
  decoder = getattr(model, "decoder", None)
  if not isinstance(decoder, Decoder):
    raise TypeError(
      f"the decoder of {type(model).__name__} is a {type(decoder).__name__}; generation needs an "
      "autoregressive Decoder: build the model with a DecoderConfig."
    )
  options = _Options(
    max_len, bos_id, eos_id, pad_id, method, temperature, top_k, top_p, num_beams, length_penalty
  )
  _check(decoder.config, options, key)
  graphdef, params = nnx.split(model)
  key = key if method == "sample" else None
  return _generate(params, images, key, graphdef, options)


def _check(text: DecoderConfig, options: _Options, key: jax.Array | None) -> None:
  check_choice("method", options.method, ("greedy", "sample", "beam"))
  check_ratio("top_p", options.top_p, zero=False, one=True)
  for name in ("bos_id", "eos_id", "pad_id"):
    if not 0 <= (value := getattr(options, name)) < text.vocab_size:
      raise ValueError(f"{name}={value} is outside the vocabulary of {text.vocab_size} tokens.")
  for name in ("max_len", "num_beams", "top_k"):
    if (value := getattr(options, name)) is not None and value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if text.position == "learned" and options.max_len > text.max_len:
    raise ValueError(
      f"max_len={options.max_len} exceeds the {text.max_len} learned positions of the decoder; "
      f"set max_len to at most {text.max_len}."
    )
  if options.temperature <= 0:
    raise ValueError(
      f"temperature={options.temperature} must be positive; use method='greedy' for the limit 0."
    )
  if options.method == "sample" and key is None:
    raise ValueError("method='sample' needs a random key; pass key=jax.random.key(seed).")


@partial(jax.jit, static_argnames=("graphdef", "options"))
def _generate(
  params: Any, images: jax.Array, key: jax.Array | None,
  graphdef: Any, options: _Options,
) -> GenerateOutput:  # fmt: skip
  def run(params: Any, images: jax.Array, key: jax.Array | None) -> GenerateOutput:
    model = nnx.merge(graphdef, params)
    _, image_tokens = model.encode(images)
    image_tokens = contexts.vary_as(image_tokens, (params, key))
    if options.method == "beam":
      return _beam(model.decoder, image_tokens, options)
    return _single(model.decoder, image_tokens, options, key)

  return contexts.run(run, params, images, key, rows=images)


def _single(
  decoder: Decoder, image_tokens: jax.Array, options: _Options, key: jax.Array | None
) -> GenerateOutput:
  """Generate one hypothesis per image: sampling with a key, greedy without."""
  batch, max_len = image_tokens.shape[0], options.max_len

  def unfinished(state: dict[str, Any]) -> jax.Array:
    return (state["t"] < max_len) & ~state["done"].all()

  def step(state: dict[str, Any]) -> dict[str, Any]:
    t, done = state["t"], state["done"]
    hidden, cache = decoder.step(state["token"], t, state["cache"])
    logits = decoder.logits(hidden)
    if key is not None:
      filtered = _likely(logits / options.temperature, options.top_k)
      token = _draw(key, t, _nucleus(filtered, options.top_p))
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


def _draw(key: jax.Array, t: jax.Array, logits: jax.Array) -> jax.Array:
  """Draw a token from each row of logits [B, V] with one key, or one key per row."""
  if not key.ndim:
    return jax.random.categorical(jax.random.fold_in(key, t), logits)
  draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row)
  return jax.vmap(draw)(key, logits)


def _likely(logits: jax.Array, top_k: int | None) -> jax.Array:
  """Return logits [B, V] with all tokens below the top_k-th set to -inf."""
  if top_k is None or top_k >= logits.shape[-1]:
    return logits
  cutoff = jax.lax.top_k(logits, top_k)[0][:, -1:]
  return jnp.where(logits >= cutoff, logits, -jnp.inf)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
  """Return logits [B, V] with all tokens outside the top-p nucleus set to -inf."""
  descending = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(descending)
  before = jnp.cumsum(probability, axis=-1) - probability
  cutoff = jnp.min(descending, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf)
  return jnp.where(logits >= cutoff, logits, -jnp.inf)


def _beam(decoder: Decoder, image_tokens: jax.Array, options: _Options) -> GenerateOutput:
  """Run beam search over W hypotheses per image, flattened to B * W rows for the decoder."""
  batch, width, max_len = image_tokens.shape[0], options.num_beams, options.max_len
  vocab = decoder.config.vocab_size
  # Finished hypotheses continue with padding of log probability 0.
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
      # Index within the beam of each image; indexing B * W rows would cross devices.
      beams = rearrange(a, "l (b w) ... -> l b w ...", w=width)
      return rearrange(inherit(beams, axis=2), "l b w ... -> l (b w) ...")

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
    # All beams start equal, so only the first is active; otherwise all would be the same caption.
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
