"""The cases of `eval` that need a decoder: the likelihood of captions, and writing them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from apps.trainer.augment import normalise
import ov_eval
import ov_models
from tools.bench.compiling import plan_of
from tools.bench.harness import measured, rates, timed

_BOS, _EOS = 1, 2


class Writer:
  """A captioner, as the evaluators of the apps use it, and as one would without them.

  The naive forms are as much compiled as ours. They give the same, or the case fails.
  """

  def __init__(self, config: ConfigDict, captions: int, scored: int):
    """Makes weights and data.

    Args:
      config: of `apps/configs/openvision2.py`.
      captions: written at once.
      scored: captions whose likelihood is asked for, whole batches of `config.batch_size`.
    """
    task: Any = plan_of(config, "cpu").parts.task
    self._model: ov_models.VisionLanguageConfig = task.model
    self._pad = task.pad_id
    self._params = jax.jit(task.init)(jax.random.key(0))
    rng, size, batch = np.random.default_rng(0), task.image_size, config.batch_size
    pictures = lambda count: rng.integers(0, 256, (count, size, size, 3), np.uint8)
    self._images = normalise(jnp.asarray(pictures(captions)))
    vocab = self._model.decoder.vocab_size
    self._batches = [
      {
        "image": pictures(batch),
        "ids": rng.integers(_EOS + 1, vocab, (batch, task.text_len), np.int32),
        "valid": np.ones(batch, bool),
      }
      for _ in range(0, scored, batch)
    ]
    self._score = jax.jit(
      lambda params, batch: task.score(params, batch | {"image": normalise(batch["image"])})
    )
    self._naive_score = jax.jit(self._score_all_words)
    self._naive_write = jax.jit(self._write_again, static_argnums=2)
    self._nll: float | None = None
    self.written: dict[int, np.ndarray] = {}

  def likelihood(self) -> dict[str, float]:
    """Never all words of all tokens at once."""
    return self._likelihood(self._score)

  def naive_likelihood(self) -> dict[str, float]:
    """Softmax over all words of all tokens, of which one each is taken."""
    return self._likelihood(self._naive_score)

  def write(self, length: int) -> dict[str, float]:
    """Keys and values of earlier tokens are kept."""
    model = ov_models.bind(self._model, self._params)
    options = {"bos_id": _BOS, "eos_id": _EOS, "pad_id": self._pad, "max_len": length}
    return self._write(length, lambda: ov_models.generate(model, self._images, **options).ids)

  def write_naively(self, length: int) -> dict[str, float]:
    """Each word runs the decoder over picture and caption again."""
    return self._write(length, lambda: self._naive_write(self._params, self._images, length))

  def _likelihood(self, score: Callable[..., Any]) -> dict[str, float]:
    found, figures = measured(
      lambda: ov_eval.caption_nll(lambda batch: score(self._params, batch), self._batches)
    )
    self._nll = self._nll or found.nll
    # float32 sums of one product, in another order.
    if not np.isclose(found.nll, self._nll, rtol=1e-5):
      raise RuntimeError(f"two ways found an NLL of {found.nll} and {self._nll}; expected equal")
    return figures | rates("images", found.examples, figures)

  def _score_all_words(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Like `Task.score`."""
    model = ov_models.bind(self._model, params)
    ids = batch["ids"]
    hidden = model(normalise(batch["image"]), ids).hidden
    targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=self._pad)
    mask = targets != self._pad
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    of_targets = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -(of_targets * mask).sum(axis=1), mask.sum(axis=1)

  def _write(self, length: int, write: Callable[[], jax.Array]) -> dict[str, float]:
    ids, seconds = timed(lambda: np.asarray(write()))
    if ids.shape[1] != length or (ids == _EOS).any():
      raise RuntimeError(f"captions of {ids.shape} end early; expected {length} words each")
    if not np.array_equal(ids, self.written.setdefault(length, ids)):
      raise RuntimeError(f"two ways to write {length} tokens gave other captions; expected equal")
    return seconds | rates("tokens", ids.size, seconds)

  def _write_again(self, params: Any, images: jax.Array, length: int) -> jax.Array:
    """ids int32 [B, length]: the likeliest word at each place, ends of captions disregarded."""
    model = ov_models.bind(self._model, params)
    _, image_tokens = model.encode(images)

    def step(t: jax.Array, ids: jax.Array) -> jax.Array:
      hidden = model.decoder(image_tokens, ids)[:, t]
      return ids.at[:, t + 1].set(model.logits(hidden).argmax(axis=-1).astype(jnp.int32))

    begin = jnp.full((len(images), length + 1), self._pad, jnp.int32).at[:, 0].set(_BOS)
    return jax.lax.fori_loop(0, length, step, begin)[:, 1:]
