"""A trained model for use: embed images and texts, classify, and write captions.

Reads folders that `//apps:export -- --format=safetensors` writes: config.json with the image
preprocessing, model.safetensors, and tokenizer/ for models with texts.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ov_data
from ov_data import decode, fs
import ov_models
from ov_serve.index import Index

TOKENIZER = "tokenizer"
# Batches are padded to one of these sizes, so that few programs are compiled.
SIZES = (1, 8, 32, 64, 128, 256)
_BLOCK = 1 << 20
_SCORED_ROWS = 8  # captions whose logits are in memory at the same time
_RANDOM = "threefry2x32"  # generator of sampled captions; its keys are two 32-bit words


@dataclasses.dataclass(frozen=True)
class Caption:
  """A generated caption.

  Attributes:
    text: decoded text.
    log_prob: log probability of all tokens, natural logarithm.
    tokens: number of tokens, including the end token.
  """

  text: str
  log_prob: float
  tokens: int


class Model:
  """Model with its preprocessing and tokenizer. Thread-safe.

  Args:
    config: configuration of the model.
    params: parameters of the model.
    preprocess: `image_size`, `fit`, `mean` and `std` of config.json.
    tokenizer: tokenizer of the captions, or None.
    processor: text processor of the text tower, or None.
    fingerprint: 16 hex digits of the files.
    name: name of the model for clients.

  Raises:
    ValueError: if the preprocessing is missing or invalid.
  """

  def __init__(
    self,
    config: Any,
    params: Any,
    preprocess: Any,
    tokenizer: ov_data.Tokenizer | None = None,
    processor: ov_data.TextProcessor | None = None,
    *,
    fingerprint: str = "",
    name: str = "model",
  ):
    if isinstance(config, ov_models.TextConfig):
      raise ValueError("the model has only a text tower; expected a model with an image tower")
    self.config = config
    self.name, self.fingerprint = name, fingerprint
    self.tokenizer, self.processor = tokenizer, processor
    self.image_size, self.fit, self.mean, self.std = _preprocessing(preprocess)
    self._params = jax.device_put(params)
    self._lock = threading.Lock()  # one program at a time; more would compete for the same device

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "Model":
    """Load an exported folder.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, or the folder holds no preprocessing.
    """
    path = pathlib.Path(folder)
    content = ov_models.read_config(path)
    if not isinstance(content.get("preprocess"), dict):
      raise ValueError(
        f"{path / 'config.json'} has no preprocessing; export the model with "
        "//apps:export -- --format=safetensors"
      )
    config, params = ov_models.load(path)
    tokenizer, processor = _texts(path / TOKENIZER)
    return cls(
      config, params, content["preprocess"], tokenizer, processor,
      fingerprint=_fingerprint(path), name=path.resolve().name,
    )  # fmt: skip

  @classmethod
  def of_index(cls, index: Index, folder: str | os.PathLike[str] | None = None) -> "Model":
    """Load the model of an index.

    Args:
      index: opened index.
      folder: folder of the model if it is no longer where it was.

    Raises:
      FileNotFoundError: if there is no model in the folder.
      ValueError: if the model is another one than that of the index.
    """
    place = str(folder or index.info.model.folder)
    if not place:
      raise ValueError(f"{index.folder} names no model; give the folder of its model")
    model = cls.load(place)
    if model.fingerprint != index.info.model.fingerprint:
      raise ValueError(
        f"{place} has the fingerprint {model.fingerprint}, but {index.folder} was embedded by "
        f"{index.info.model.fingerprint}; embed the images again, or use that model"
      )
    return model

  @property
  def dim(self) -> int:
    """Size E of the embeddings."""
    return self.config.embed_dim if self._is_pair else self.config.width

  @property
  def can_embed_text(self) -> bool:
    """Whether texts and images share one space of embeddings."""
    return self.processor is not None and getattr(self.config, "text", None) is not None

  @property
  def can_caption(self) -> bool:
    """Whether the model generates captions."""
    decoder = getattr(self.config, "decoder", None)
    begins = self.tokenizer is not None and self.tokenizer.bos_id is not None
    return begins and isinstance(decoder, ov_models.DecoderConfig)

  @property
  def _is_pair(self) -> bool:
    return isinstance(self.config, ov_models.VisionLanguageConfig)

  def decode(self, data: bytes, limits: decode.Limits = decode.DEFAULT_LIMITS) -> np.ndarray:
    """Decode, resize and crop an encoded image; return uint8 [S, S, 3].

    Raises:
      DecodeError: if the bytes are not a supported image within the limits.
    """
    return decode.whole(data, self.image_size, self.fit, limits)

  def embed_images(self, images: np.ndarray) -> np.ndarray:
    """Embed decoded images uint8 [B, S, S, 3]; return unit vectors float32 [B, E]."""
    return self._by_batches(self._embed_images, images)

  def embed_texts(self, texts: Sequence[str], *, prompts: bool = False) -> np.ndarray:
    """Embed texts; return unit vectors float32 [B, E].

    Args:
      texts: B texts.
      prompts: whether to prepare texts like the prompts of zero-shot classification.

    Raises:
      ValueError: if the model has no text tower.
    """
    processor = self._processor()
    ids = (processor.encode_prompts if prompts else processor.encode)(list(texts))
    return self._by_batches(self._embed_ids, ids)

  def classify(
    self, vectors: np.ndarray, labels: Sequence[str], template: str = "a photo of a {}"
  ) -> np.ndarray:
    """Return the probability of each label for each image, float32 [B, C].

    The probabilities are the softmax over the labels of the scaled cosine similarities, as in CLIP
    (https://arxiv.org/abs/2103.00020). With the sigmoid loss of SigLIP
    (https://arxiv.org/abs/2303.15343) they are independent and need not add up to 1.

    Args:
      vectors: unit vectors of images [B, E].
      labels: C class names.
      template: prompt with "{}" for the name.

    Raises:
      ValueError: if the model has no text tower, there are no labels, or the template has no "{}".
    """
    if not labels:
      raise ValueError("labels=[]: expected at least one label")
    if "{}" not in template:
      raise ValueError(f"template={template!r}: expected a text with {{}} for the label")
    prompts = [template.replace("{}", label) for label in labels]
    classes = self.embed_texts(prompts, prompts=True)
    logits = vectors @ classes.T * math.exp(float(self._params["log_scale"]))
    if self.config.bias_init is not None:
      return np.asarray(jax.nn.sigmoid(logits + self._params["bias"]))
    return np.asarray(jax.nn.softmax(logits, axis=-1))

  def caption(self, images: np.ndarray) -> list[Caption]:
    """Write one caption for each decoded image uint8 [B, S, S, 3], by greedy search.

    Raises:
      ValueError: if the model cannot generate captions.
    """
    self._check_captions()
    captions: list[Caption] = []
    for start in range(0, len(images), SIZES[-1]):
      captions += self._caption(images[start : start + SIZES[-1]])
    return captions

  def sample_captions(
    self,
    images: np.ndarray,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
  ) -> list[Caption]:
    """Sample one caption for each decoded image uint8 [B, S, S, 3].

    Args:
      images: B decoded images; repeat an image to sample several captions.
      seeds: B integers of 64 bits that determine the captions.
      temperature, top_k, top_p: see `ov_models.generate`.

    Raises:
      ValueError: if the model cannot generate captions, or an option is out of range.
    """
    self._check_captions()
    captions: list[Caption] = []
    for start in range(0, len(images), SIZES[-1]):
      some = slice(start, start + SIZES[-1])
      words = np.asarray(seeds[some], np.uint64)
      # A seed of 64 bits as two words, because JAX truncates integers to 32 bits.
      halves = np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], axis=1)
      keys = jax.random.wrap_key_data(jnp.asarray(_padded(halves.astype(np.uint32))), impl=_RANDOM)
      captions += self._caption(
        images[some], method="sample", key=keys,
        temperature=temperature, top_k=top_k, top_p=top_p,
      )  # fmt: skip
    return captions

  def caption_log_likelihood(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return the mean log likelihood per token of a caption of each image, float32 [B].

    The natural logarithm, over the words and the end token; long texts are cut like in training.

    Args:
      images: B decoded images uint8 [B, S, S, 3].
      texts: B captions.

    Raises:
      ValueError: if the model has no caption decoder, or the lengths differ.
    """
    self._check_captions()
    words = self.tokenizer
    assert words is not None  # `can_caption`
    if len(images) != len(texts):
      raise ValueError(f"{len(images)} images and {len(texts)} texts: expected equal numbers")
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(images), SIZES[-1]):
      some = slice(start, start + SIZES[-1])
      ids, mask = words.encode_batch(texts[some], self.config.decoder.max_len, append_cls=False)
      with self._lock:
        scores = self._score(self._params, *map(_padded, (images[some], ids, mask)))
      found.append(np.asarray(scores)[: len(ids)])
    return np.concatenate(found)

  def _check_captions(self) -> None:
    if not self.can_caption:
      raise ValueError(
        "the model writes no captions; expected one with a teacher-forced decoder, such as the "
        "losses coca and cappa or OpenVision 2"
      )

  def _processor(self) -> ov_data.TextProcessor:
    if self.processor is None or not self.can_embed_text:
      raise ValueError(
        "the model has no text tower; search by image, or use a model trained with texts"
      )
    return self.processor

  def _by_batches(self, embed: Any, rows: np.ndarray) -> np.ndarray:
    """Embed rows in batches of the padded sizes."""
    found = [np.zeros((0, self.dim), np.float32)]
    for start in range(0, len(rows), SIZES[-1]):
      some = rows[start : start + SIZES[-1]]
      with self._lock:
        vectors = embed(self._params, _padded(some))
      found.append(np.asarray(vectors, np.float32)[: len(some)])
    return np.concatenate(found)

  def _caption(self, images: np.ndarray, **options: Any) -> list[Caption]:
    words = self.tokenizer
    assert words is not None and words.bos_id is not None  # `can_caption`
    with self._lock:
      out = ov_models.generate(
        ov_models.bind(self.config, self._params), self._normalise(_padded(images)),
        max_len=self.config.decoder.max_len,
        bos_id=words.bos_id, eos_id=words.eos_id, pad_id=words.pad_id, **options,
      )  # fmt: skip
      ids, length, log_prob = map(np.asarray, (out.ids, out.length, out.log_prob))
    texts = words.decode_batch(ids[: len(images)])
    return [Caption(*row) for row in zip(texts, log_prob.tolist(), length.tolist())]

  @functools.cached_property
  def _normalise(self) -> Any:
    mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
    return jax.jit(lambda images: (images.astype(jnp.float32) / np.float32(255) - mean) / std)

  @functools.cached_property
  def _score(self) -> Any:
    def score(params: Any, images: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
      model: Any = ov_models.bind(self.config, params)
      _, tokens = model.encode(self._normalise(images))
      hidden = model.caption_hidden(tokens, ids=ids)[:, :-1]  # row i predicts token i + 1

      def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        states, targets, counts = row
        log_probs = jax.nn.log_softmax(model.logits(states))
        picked = jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
        return jnp.where(counts, picked, 0).sum() / counts.sum()

      # A few rows at a time, because logits are [T, V] per row.
      rows = (hidden, ids[:, 1:], mask[:, 1:])
      return jax.lax.map(of_row, rows, batch_size=_SCORED_ROWS)

    return jax.jit(score)

  @functools.cached_property
  def _embed_images(self) -> Any:
    def embed(params: Any, images: jax.Array) -> jax.Array:
      model: Any = ov_models.bind(self.config, params)
      pixels = self._normalise(images)
      if self._is_pair:
        return model.encode_image(pixels).unit
      pooled = model(pixels).pooled.astype(jnp.float32)
      return pooled / (jnp.linalg.norm(pooled, axis=-1, keepdims=True) + 1e-8)

    return jax.jit(embed)

  @functools.cached_property
  def _embed_ids(self) -> Any:
    def embed(params: Any, ids: jax.Array) -> jax.Array:
      model: Any = ov_models.bind(self.config, params)
      return model.encode_text(ids).unit

    return jax.jit(embed)


def read_image(file: pathlib.Path, max_bytes: int = decode.DEFAULT_LIMITS.max_bytes) -> bytes:
  """Read an encoded image.

  Raises:
    FileNotFoundError: if there is no regular file of that name.
    OSError: if it is larger than `max_bytes`.
  """
  return fs.read_regular(os.fspath(file), max_bytes)


def _padded(rows: np.ndarray) -> np.ndarray:
  """Return the rows, repeated to the next of `SIZES`."""
  size = next(size for size in SIZES if size >= len(rows))
  return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _preprocessing(given: Any) -> tuple[int, Any, tuple[float, ...], tuple[float, ...]]:
  """Return image size, fit, mean and std of config.json.

  Raises:
    ValueError: if a value is missing or invalid.
  """
  try:
    size, fit = given["image_size"], given["fit"]
    mean, std = (tuple(float(value) for value in given[name]) for name in ("mean", "std"))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"preprocess is invalid: {error!r}; export the model again") from None
  valid = type(size) is int and 1 <= size <= 4096 and fit in ("center", "squash")
  numbers = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
  if not (valid and numbers):
    raise ValueError(f"preprocess={given} is invalid; export the model again")
  return size, fit, mean, std


def _texts(
  folder: pathlib.Path,
) -> tuple[ov_data.Tokenizer | None, ov_data.TextProcessor | None]:
  if not folder.is_dir():
    return None, None
  if ov_data.TextProcessor.is_complete(folder):
    processor = ov_data.TextProcessor.load(folder)
    return processor.tokenizer, processor
  return ov_data.Tokenizer.load(folder), None


def _fingerprint(folder: pathlib.Path) -> str:
  """Return 16 hex digits of the configuration, weights and tokenizer files."""
  digest = hashlib.sha256()
  names = ["config.json", "model.safetensors"]
  names += sorted(f"{TOKENIZER}/{path.name}" for path in folder.glob(f"{TOKENIZER}/*.json"))
  for name in names:
    digest.update(f"{name}\0".encode())
    with open(folder / name, "rb") as file:
      while block := file.read(_BLOCK):
        digest.update(block)
  return digest.hexdigest()[:16]
