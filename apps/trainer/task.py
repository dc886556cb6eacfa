"""Training task: a model, its losses, and the contents of a batch."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from apps.trainer.augment import Normalization
from apps.trainer.gallery import Gallery
from apps.trainer.losses import LOSSES
from apps.trainer.losses.loss_term import Batch, LossContext, LossOutput, LossTerm, Params
from apps.trainer.report import ClassTable, Sample
import ov_data
import ov_eval
import ov_losses
import ov_models

_OF_LOSSES = "losses"  # entry of the params with the parameters of loss terms, by name in LOSSES
_ADAPTERS = 1000  # of the random keys that `init` derives; the lower numbers are those of losses
_TEXTS = ("alt_ids", "sentence_ids")  # of the text tower, in the order of its K texts


def appends_cls(text: ov_models.TextConfig, tokenizer: ov_data.Tokenizer) -> bool:
  """Return whether the last column of the texts of a tower is [CLS].

  A tower that reads the last column, and attends to padding, works without [CLS] as SigLIP does.
  """
  return text.pool == "last" and (text.padding == "mask" or tokenizer.cls_id is not None)


@dataclasses.dataclass(frozen=True)
class Task:
  """A model and its losses, independent of optimizer, files and loop.

  A batch contains `image`, `valid`, `index`, and the texts of `specs`: `alt_ids`, a short text;
  `sentence_ids`, one sentence of the long text; `caption_ids`, the long text for the decoder.
  Without `specs` it contains `ids` only, one caption as drawn by default in `ov_data.Loader`.

  Attributes:
    model: configuration of the model.
    losses: loss terms with non-zero weight.
    pad_id: padding id of the tokenizer.
    mesh: devices that compute the loss.
    name: short name of the model, such as "Ti/16 + Ti".
    specs: names and specs of the texts of a batch; None: one caption.
    normalization: normalization of the images.
    canonical: whether prompts are canonicalized, see `ov_data.TextProcessor`.
    lora: adapters of the model; None for none.
    teacher_dim: size of the embeddings in `teacher` of a batch; 0 without a teacher.
  """

  model: ov_models.VisionLanguageConfig
  losses: tuple[LossTerm, ...]
  pad_id: int
  mesh: jax.sharding.Mesh
  name: str = "model"
  specs: tuple[tuple[str, ov_data.TextSpec], ...] | None = None
  normalization: Normalization = Normalization()
  canonical: bool = True
  lora: ov_models.LoraConfig | None = None
  teacher_dim: int = 0

  def __post_init__(self) -> None:
    if not self.losses:
      raise ValueError(f"config.loss: every weight is 0; set {', '.join(LOSSES)}")
    given = ("caption_ids",) if self.specs is None else tuple(dict(self.specs))
    for term in self.losses:
      term.check(self.model)
      if missing := [key for key in term.batch_keys if key not in given]:
        raise ValueError(
          f"{type(term).__name__} needs {missing[0]} and a batch has only {', '.join(given)}; set "
          "config.input.alt_keys and config.input.caption_keys"
        )

  @property
  def image_size(self) -> int:
    """Return the side length in pixels of the images of the model."""
    return self.model.encoder.image_size

  @property
  def text_len(self) -> int:
    """Return the tokens per text of the text tower, or per caption without one."""
    text = self.model.text
    return self.model.caption_len if text is None else text.max_len

  @property
  def text_specs(self) -> Mapping[str, ov_data.TextSpec] | None:
    """Return names and specs of the texts of a batch; None: one caption as `ids`."""
    return None if self.specs is None else dict(self.specs)

  @property
  def loader_options(self) -> dict[str, Any]:
    """Return the arguments of `ov_data.Loader` that define an example."""
    options: dict[str, Any] = {"image_size": self.image_size, "text_len": self.text_len}
    return options if self.specs is None else options | {"texts": dict(self.specs)}

  @property
  def batch_keys(self) -> tuple[str, ...]:
    """Return the arrays of the loader's batch that are sent to the devices."""
    return ("image", "valid", "index", *(self.text_specs or ("ids",)))

  @property
  def compares_rows(self) -> bool:
    """Return whether a loss depends on all rows of a batch at once."""
    return any(term.compares_rows for term in self.losses)

  @property
  def two_phase(self) -> bool:
    """Return whether the loss is not a weighted mean over micro-batches; see `step.TwoPhase`."""
    return self.compares_rows or len(self.losses) > 1

  @functools.cached_property
  def flops_per_example(self) -> float:
    """Return the model FLOPs of forward and backward pass, without rematerialization."""
    num_texts = max(1, len([name for name, _ in self.specs or () if name in _TEXTS]))
    return ov_models.flops_per_example(self.model, num_texts=num_texts)

  def text_processor(self, tokenizer: ov_data.Tokenizer) -> ov_data.TextProcessor | None:
    """Return the text processor of the text tower; None without one."""
    text = self.model.text
    if text is None:
      return None
    return ov_data.TextProcessor(
      tokenizer,
      text.max_len,
      append_cls=appends_cls(text, tokenizer),
      pool=text.pool,
      padding=text.padding,
      canonical=self.canonical,
    )

  def init(self, key: jax.Array) -> Params:
    """Return fresh params; traceable."""
    params = ov_models.init(self.model, key)
    if self.lora is not None:
      params = ov_models.add_adapters(self.lora, params, jax.random.fold_in(key, _ADAPTERS))
    return self._with_own(params, self._init_own(key))

  def abstract_params(self) -> Params:
    """Return shapes and dtypes of the params."""
    if self.lora is not None:
      return jax.eval_shape(self.init, jax.random.key(0))
    params = ov_models.abstract_params(self.model)
    return self._with_own(params, jax.eval_shape(self._init_own, jax.random.key(0)))

  def logical_axes(self) -> Params:
    """Return the tree of the params with a tuple of logical axis names for each."""
    axes = ov_models.logical_axes(self.model)
    if self.lora is not None:
      axes = ov_models.adapter_axes(self.lora, axes)
    own = [term.logical_axes(self.model, self.teacher_dim) for term in self.losses]
    return self._with_own(axes, own)

  def model_params(self, params: Params) -> Params:
    """Return the params of the model: adapters are merged, those of the losses are left out."""
    params = {name: value for name, value in params.items() if name != _OF_LOSSES}
    return params if self.lora is None else ov_models.merge_adapters(self.lora, params)

  def loss(
    self,
    params: Params,
    batch: Batch,
    key: jax.Array,
    ema: Params | None = None,
    step: jax.Array | None = None,
  ) -> LossOutput:
    """Return the weighted sum of the losses of a batch.

    Its weight is that of a single loss that compares no rows, otherwise the number of valid rows.

    Args:
      params: parameters of the model.
      batch: arrays [B, ...]; images are normalized float32.
      key: random key of this step.
      ema: average of `params`, if the run keeps one.
      step: int32 [], completed steps; None means 0.
    """
    rows, own = self.embed(params, batch, key, ema, step)
    terms = [self.combine(params, rows), *own] if self.two_phase else own
    metrics: dict[str, jax.Array] = {}
    for term in terms:
      metrics |= term.metrics
    return LossOutput(_sum([term.loss for term in terms]), terms[0].weight, metrics)

  def embed(
    self,
    params: Params,
    batch: Batch,
    key: jax.Array,
    ema: Params | None = None,
    step: jax.Array | None = None,
  ) -> tuple[dict[str, Any], list[LossOutput]]:
    """Return arrays [B, ...] of the rows for `combine`, and the losses that need no other rows.

    See `loss` for the arguments.

    Returns:
      rows: "valid" bool [B], and the arrays of each loss that compares rows, under its number.
      own: the weighted losses that compare no rows.
    """
    batch = self._named(batch)
    of_model = self.model_params(params)
    model, texts, outputs = self._forward(of_model, batch, key)
    step = jnp.zeros((), jnp.int32) if step is None else step
    shared = LossContext(
      of_model,
      None if ema is None else self.model_params(ema),
      {},
      model,
      outputs,
      batch,
      texts,
      key,
      step,
      self.pad_id,
      self.mesh,
    )
    rows: dict[str, Any] = {"valid": batch["valid"]}
    own = []
    for number, term in enumerate(self.losses):
      of_term = params.get(_OF_LOSSES, {}).get(_name_of(term), {})
      context = dataclasses.replace(shared, own=of_term)
      if term.compares_rows:
        rows[str(number)] = term.rows(context)
      else:
        own.append(_weighted(term, term(context)))
    return rows, own

  def combine(self, params: Params, rows: dict[str, Any]) -> LossOutput:
    """Return the sum of the weighted losses that compare rows over all rows of a batch, or 0."""
    valid, params = rows["valid"], self.model_params(params)
    terms = [
      _weighted(term, term.compare(params, rows[str(number)] | {"valid": valid}, self.mesh))
      for number, term in enumerate(self.losses)
      if term.compares_rows
    ]
    metrics: dict[str, jax.Array] = {}
    for term in terms:
      metrics |= term.metrics
    if not terms:
      return LossOutput(jnp.zeros(()), valid.sum().astype(jnp.float32), {})
    return LossOutput(_sum([term.loss for term in terms]), terms[0].weight, metrics)

  def project(self, params: Params) -> Params:
    """Return the nearest params within the limits of all losses."""
    for term in self.losses:
      params = term.project(params)
    return params

  def score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the negative log-likelihood [B] and the number of target tokens [B] of captions."""
    batch = self._named(batch)
    model, _, outputs = self._forward(params, batch, None, texts=_TEXTS[:1])
    targets, mask = ov_losses.shift_left(batch["caption_ids"], self.pad_id)
    mask = mask * batch["valid"][:, None]
    assert outputs.hidden is not None  # evaluators require a decoder
    log_likelihood = ov_losses.sequence_log_likelihood(
      outputs.hidden, model.head_kernel, targets, mask
    )
    return -log_likelihood, mask.sum(axis=1)

  def _forward(
    self, params: Params, batch: Batch, key: jax.Array | None, texts: tuple[str, ...] = _TEXTS
  ) -> tuple[ov_models.VisionLanguageModel, jax.Array | None, ov_models.VisionLanguageOutput]:
    """Return the model, the ids [B, K, T] of its texts, and its output for a batch."""
    model = ov_models.bind(self.model, params)
    ids = None
    if self.model.text is not None:
      ids = jnp.stack([batch[name] for name in texts if name in batch], axis=1)
    return model, ids, model(batch["image"], batch.get("caption_ids"), key, texts=ids)

  def _init_own(self, key: jax.Array) -> list[Params]:
    """Return fresh parameters of each loss; each has its own key."""
    return [
      term.init(jax.random.fold_in(key, number), self.model, self.teacher_dim)
      for number, term in enumerate(self.losses)
    ]

  def _with_own(self, params: Params, own: Sequence[Params]) -> Params:
    """Return the params of the model together with those of each loss."""
    of_losses = {_name_of(term): tree for term, tree in zip(self.losses, own, strict=True) if tree}
    return params | {_OF_LOSSES: of_losses} if of_losses else params

  def _named(self, batch: Batch) -> Batch:
    """Rename the only caption of a batch to the name of one of several texts."""
    return batch | {"caption_ids": batch["ids"]} if self.specs is None else batch


def _name_of(term: LossTerm) -> str:
  return next((name for name, kind in LOSSES.items() if kind is type(term)), type(term).__name__)


def _weighted(term: LossTerm, out: LossOutput) -> LossOutput:
  return out._replace(loss=term.weight * out.loss)


def _sum(values: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, values)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results of an evaluation.

  Attributes:
    results: metrics; each becomes `eval/<name>` in metrics.jsonl.
    samples: images with captions, for the report.
    attribute_words: words of the samples to mark as right or wrong.
    classes: confusion counts of a zero-shot classification.
    galleries: retrieved or predicted items, for the report.
    files: text files for the workdir, by path.
  """

  results: tuple[ov_eval.Result, ...]
  samples: tuple[Sample, ...] = ()
  attribute_words: tuple[str, ...] = ()
  classes: ClassTable | None = None
  galleries: tuple[Gallery, ...] = ()
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


Evaluate = Callable[[Params], Evaluation]


def abstract_batch(
  task: Task, rows: int, sharding: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
  """Return shapes and dtypes of a batch of `rows` examples for the train step."""
  specs = task.text_specs or {}
  batch = {}
  for key in task.batch_keys:
    shape: tuple[int, ...] = (rows, specs[key].length if key in specs else task.text_len)
    dtype: Any = jnp.int32
    if key == "image":
      shape, dtype = (rows, task.image_size, task.image_size, 3), jnp.uint8
    elif key in ("valid", "index"):
      shape, dtype = (rows,), bool if key == "valid" else jnp.int32
    batch[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  if task.teacher_dim:
    shape = (rows, task.teacher_dim)
    batch["teacher"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  return batch
