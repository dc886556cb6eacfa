"""Conversion of the settings to the configs of the components, with checks of their values."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import typing
from typing import Any, Literal, NamedTuple

import jax

from apps.trainer.augment import AugmentConfig, Normalization
from apps.trainer.losses import LOSSES
from apps.trainer.losses.loss_term import LossTerm
from apps.trainer.model_options import check_loss_options, check_options
from apps.trainer.optimizer import OptimizerConfig
from apps.trainer.optimizers import OPTIMIZERS, AdamW, UpdateRule
from apps.trainer.rules import fields, integer, of_type, real, shown
from apps.trainer.run_config import LoraSettings, LossSettings, ModelSettings, RunConfig
from apps.trainer.section import Section
from apps.trainer.task import Task, appends_cls
from ov_convert.release import portable
import ov_data
import ov_models


def optimizer_config(config: RunConfig) -> OptimizerConfig:
  """Return the optimizer of `config.optimizer`; raise ValueError for values out of range."""
  values = config.optimizer.to_dict() | {"schedule": config.optimizer.schedule}
  values["lr_multipliers"] = tuple((regex, float(f)) for regex, f in values["lr_multipliers"])
  adamw = {field.name: values.pop(field.name) for field in dataclasses.fields(AdamW)}
  rule = _update_rule(values.pop("name"), values.pop("options"), AdamW(**adamw))
  return OptimizerConfig(**values, rule=rule)


def _update_rule(name: str, options: dict[str, Any], adamw: AdamW) -> UpdateRule:
  """Return the update rule of `config.optimizer.name`.

  Args:
    name: key of `OPTIMIZERS`.
    options: fields of the dataclass of the update rule.
    adamw: the AdamW rule from its separate settings.

  Raises:
    ValueError: an option is unknown, has the wrong type or is out of range, or a setting of AdamW
      was changed that the rule does not use.
  """
  kind: Any = OPTIMIZERS[name]
  hints = typing.get_type_hints(kind)
  own = {field: hint for field, hint in hints.items() if field != "adamw"}
  rules = {field: of_type(hint, integer(0), real(0)) for field, hint in own.items()}
  fields(rules)(f"config.optimizer.options (of {name})", options)
  if kind is AdamW:
    return dataclasses.replace(adamw, **options)
  if "adamw" in hints:
    return kind(**options, adamw=adamw)
  default = AdamW()
  for field in dataclasses.fields(AdamW):
    if (value := getattr(adamw, field.name)) != getattr(default, field.name):
      raise ValueError(
        f"config.optimizer.{field.name}={value!r} is a setting of adamw and has no effect with "
        f"config.optimizer.name={name}; set config.optimizer.options, which may have "
        f"{', '.join(rules)}"
      )
  return kind(**options)


def augment_config(config: RunConfig) -> AugmentConfig:
  """Return the augmentation with jitter on or off, with the strengths of the released code."""
  normalization = Normalization(config.input.mean, config.input.std)
  if config.input.color_jitter:
    return AugmentConfig(normalization=normalization)
  return AugmentConfig(jitter_probability=0.0, gray_probability=0.0, normalization=normalization)


def make_task(config: RunConfig, tokenizer: ov_data.Tokenizer, mesh: jax.sharding.Mesh) -> Task:
  """Return the task of a stage.

  Args:
    config: configuration of the stage.
    tokenizer: tokenizer of the run.
    mesh: devices that compute the loss.

  Raises:
    ValueError: the settings contradict each other.
  """
  model = model_config(config.model, vocab_size=tokenizer.vocab_size)
  losses = loss_terms(config.loss)
  if model.decoder is not None and not config.loss.caption and losses:
    raise ValueError(
      'config.model.decoder is set and config.loss.caption is 0; set config.model.decoder=""'
    )
  text = model.text
  masked = text is not None and text.padding == "mask"
  if text is not None and appends_cls(text, tokenizer) and tokenizer.cls_id is None:
    raise ValueError(
      "the text tower reads the last token, and the tokenizer has no [CLS] to put there; "
      'set config.model.text_options={"pool": "mean"}, or {"padding": "attend"} as in SigLIP, or '
      "use a vocabulary with [CLS]"
    )
  if model.decoder is not None and tokenizer.bos_id is None:
    raise ValueError(
      "the texts of the tokenizer have no begin token, which captions need; set "
      'config.model.decoder="", or use a vocabulary with [bos]'
    )
  if tokenizer.pad_id == tokenizer.eos_id and (masked or model.decoder is not None):
    raise ValueError(
      f"the tokenizer pads with its end token, id {tokenizer.eos_id}, so captions and masked texts "
      'would have no end; set config.model.decoder="" and '
      'config.model.text_options={"padding": "attend"}, or use a vocabulary with [PAD]'
    )
  names = (config.model.encoder, config.model.text, config.model.decoder)
  return Task(
    model,
    losses,
    tokenizer.pad_id,
    mesh,
    " + ".join(part for part in names if part),
    _text_specs(config, model, tokenizer, any(term.compares_rows for term in losses)),
    Normalization(config.input.mean, config.input.std),
    config.tokenizer.canonical_prompts,
    lora_config(config.lora),
  )


def model_config(model: ModelSettings, *, vocab_size: int) -> ov_models.VisionLanguageConfig:
  """Return the model configuration of `config.model`.

  Args:
    model: the `model` section of a configuration.
    vocab_size: number of entries of the tokenizer.

  Raises:
    ValueError: the sizes contradict each other, or the variant is unknown.
  """
  rows = model.vocab_size or -(-vocab_size // 128) * 128  # full tiles for the matmul of the head
  if rows < vocab_size:
    raise ValueError(
      f"config.model.vocab_size={rows} is smaller than the tokenizer's {vocab_size} entries; "
      "set it to at least that, or to 0 to take the tokenizer's size"
    )
  queries = model.decoder_kind == "queries"
  decoder = ov_models.QueryDecoderConfig if queries else ov_models.DecoderConfig
  check_options("config.model.encoder_options", model.encoder_options, ov_models.ViTConfig)
  check_options("config.model.text_options", model.text_options, ov_models.TextConfig)
  check_options("config.model.decoder_options", model.decoder_options, decoder)
  return ov_models.VisionLanguageConfig.from_names(
    model.encoder,
    model.text or None,
    model.decoder or None,
    image_size=model.image_size,
    vocab_size=rows,
    text_len=model.token_len,
    caption_len=model.caption_len or model.token_len - 1,
    decoder_kind=model.decoder_kind,
    preset=model.preset,
    embed_dim=model.embed_dim or None,
    log_scale_init=math.log(model.scale_init),
    bias_init=model.bias_init,
    image_head=model.image_head,
    text_head_bias=model.text_head_bias,
    parallel_ratio=model.parallel_ratio,
    keep_ratio=model.keep_ratio,
    encoder_options=model.encoder_options,
    text_options=model.text_options,
    decoder_options=model.decoder_options,
    dtype=model.dtype,
    remat=model.remat,
    attention=model.attention,
  )


def lora_config(lora: LoraSettings) -> ov_models.LoraConfig | None:
  """Return the adapters of `config.lora`; None without."""
  return ov_models.LoraConfig(**lora.to_dict()) if lora.rank else None


def model_settings(config: ov_models.VisionLanguageConfig | ov_models.ViTConfig) -> ModelSettings:
  """Return the settings of a model, the inverse of `model_config`.

  Compute dtype, rematerialization and attention implementation are those of the defaults.

  Args:
    config: model of an import or of a run; an image tower alone gives settings without `text` and
      `decoder`.

  Raises:
    ValueError: no settings describe the model.
  """
  config = portable(config)
  if isinstance(config, ov_models.ViTConfig):
    return ModelSettings(**_encoder_values(config))
  text, decoder = config.text, config.decoder
  values = _encoder_values(config.encoder)
  for part in (decoder, text):
    if part is not None:
      values["vocab_size"] = part.vocab_size
  if text is not None:
    values["text"] = _variant(text, ov_models.TEXT_VARIANTS)
    values |= {"token_len": text.max_len, "embed_dim": config.embed_dim}
    plain_text = ov_models.TextConfig.from_name(values["text"], text.vocab_size, text.max_len)
    values["text_options"] = _options(text, plain_text)
  if decoder is not None:
    kind = type(decoder)
    values["decoder"] = _variant(decoder, ov_models.DECODER_VARIANTS)
    values["decoder_kind"] = "queries" if kind is ov_models.QueryDecoderConfig else "teacher_forced"
    values["caption_len"] = config.caption_len
    sizes = (decoder.vocab_size, config.caption_len)
    values["decoder_options"] = _options(decoder, kind.from_name(values["decoder"], *sizes))
  for name in ("bias_init", "image_head", "text_head_bias", "parallel_ratio", "keep_ratio"):
    values[name] = getattr(config, name)
  values["scale_init"] = math.exp(config.log_scale_init)
  rows = values.get("vocab_size", 0)
  for preset in ov_models.PRESETS:
    # Options override the preset, except for the order of the tokens that a decoder receives.
    settings = ModelSettings.parse(values | {"preset": preset}, path="model")
    found = model_config(settings, vocab_size=rows)
    if dataclasses.replace(found, log_scale_init=config.log_scale_init) == config:
      return settings
  raise ValueError(
    "the model has fields that no setting of config.model describes; the nearest settings give "
    f"{found}, not {config}"
  )


def _encoder_values(encoder: ov_models.ViTConfig) -> dict[str, Any]:
  """Return the settings of a model that is an image tower alone."""
  name = f"{_variant(encoder, ov_models.VIT_VARIANTS)}/{encoder.patch_size}"
  plain = ov_models.ViTConfig.from_name(name, encoder.image_size)
  return {
    "encoder": name,
    "text": "",
    "decoder": "",
    "image_size": encoder.image_size,
    "encoder_options": _options(encoder, plain),
  }


# Fields with their own settings, and those that do not change the model.
_SHARED = (
  "patch_size", "image_size", "vocab_size", "max_len", "num_queries", "dtype", "remat", "attention"
)  # fmt: skip


def _variant(tower: Any, table: Mapping[str, tuple[int, int, int, int]]) -> str:
  """Return the variant with the sizes of a tower, or else the one with the nearest width."""
  sizes = (tower.width, tower.depth, tower.mlp_dim, tower.num_heads)
  return min(table, key=lambda name: (table[name] != sizes, abs(table[name][0] - tower.width)))


def _options(tower: Any, plain: Any) -> dict[str, Any]:
  """Return the fields of a tower that differ from those of its variant."""
  return {
    field.name: getattr(tower, field.name)
    for field in dataclasses.fields(tower)
    if field.name not in _SHARED and getattr(tower, field.name) != getattr(plain, field.name)
  }


def loss_terms(loss: LossSettings) -> tuple[LossTerm, ...]:
  """Return the losses of `config.loss` with non-zero weight, in the order of `LOSSES`.

  Raises:
    ValueError: the loss or one of its fields is unknown.
  """
  settings, terms = loss.to_dict(), []
  more = settings.pop("more")
  known = [name for name in LOSSES if name not in settings]
  for name in more:
    if name not in known:
      valid = f"valid names are {', '.join(known)}" if known else "no further losses are defined"
      remedy = f"set config.loss.{name}" if name in LOSSES else valid
      raise ValueError(f"config.loss.more has {shown(name)}; {remedy}")
  for name, kind in LOSSES.items():
    if name in more:
      check_loss_options(f"config.loss.more.{name}", more[name], kind)
      terms.append(kind(**more[name]))
    elif name in settings:
      own = [field.name for field in dataclasses.fields(kind) if field.name != "weight"]
      terms.append(kind(weight=settings[name], **{field: settings[field] for field in own}))
  return tuple(term for term in terms if term.weight)


def _text_specs(
  config: RunConfig,
  model: ov_models.VisionLanguageConfig,
  tokenizer: ov_data.Tokenizer,
  contrastive: bool,
) -> tuple[tuple[str, ov_data.TextSpec], ...] | None:
  """Return the texts of a batch; if a record lacks one kind of text, the other one is used."""
  alt_keys, caption_keys = config.input.alt_keys, config.input.caption_keys
  if not alt_keys and model.text is None:
    return None
  sentences = config.input.sentence_positive and contrastive
  if not alt_keys:
    raise ValueError(
      "config.input.alt_keys=(), and the text tower needs short texts; name their features, such "
      "as ('txt',)"
    )
  if not caption_keys and (sentences or model.decoder is not None):
    raise ValueError(
      "config.input.caption_keys=(), and the decoder or config.input.sentence_positive needs long "
      "texts; name their features, such as ('llava_caption',)"
    )
  specs = {}
  if (text := model.text) is not None:
    cls = appends_cls(text, tokenizer)
    instead = caption_keys if sentences or model.decoder is not None else ()
    # Alt texts that consist of punctuation are trained on, as in the released code.
    specs["alt_ids"] = ov_data.TextSpec(
      alt_keys, text.max_len, append_cls=cls, fallback=instead, needs_words=False
    )
    if sentences:
      specs["sentence_ids"] = ov_data.TextSpec(
        caption_keys, text.max_len, pick="sentence", append_cls=cls, fallback=alt_keys
      )
  if model.decoder is not None:
    instead = alt_keys if model.text is not None else ()
    specs["caption_ids"] = ov_data.TextSpec(caption_keys, model.caption_len, fallback=instead)
  return tuple(specs.items())


class InitSettings(NamedTuple):
  """One source of `config.init_from`.

  Attributes:
    setting: name of the setting of the path, for messages.
    path: path of the checkpoint.
    step: step of the checkpoint; None takes the newest.
    part: trained parameters or their average.
    options: keyword arguments of `init_from.plan_init`.
  """

  setting: str
  path: str
  step: int | None
  part: Literal["params", "ema"]
  options: dict[str, Any]


def init_sources(config: RunConfig) -> list[InitSettings]:
  """Return the sources of `config.init_from`, including that of `config.ft_from`, in order.

  Args:
    config: configuration with checked values.

  Raises:
    ValueError: both `ft_from` and `init_from.path` are set.
  """
  shared = config.init_from.to_dict()
  more = [dict(source) for source in shared.pop("more")]
  setting = "config.init_from.path"
  if config.ft_from:
    if shared["path"]:
      raise ValueError(
        f"config.ft_from={config.ft_from} and config.init_from.path={shared['path']} are two names "
        "of one setting; give one of them"
      )
    setting, shared["path"] = "config.ft_from", config.ft_from
  sources = [(setting, shared)] if shared["path"] else []
  sources += [(f"config.init_from.more[{i}].path", source) for i, source in enumerate(more)]
  resize = config.model.encoder_options.get("position_resize", "bilinear")
  return [
    InitSettings(
      name,
      source.pop("path"),
      source.pop("step", None),
      source.pop("part", "params"),
      source | {"position_resize": resize},
    )
    for name, source in sources
  ]


def check_values(config: RunConfig) -> None:
  """Check settings that depend on each other, but not on data or devices.

  Raises:
    ValueError: the message names the setting, its value and the expectation.
  """
  if config.eval.checkpoint_step is not None and not config.eval_only:
    raise ValueError(
      f"config.eval.checkpoint_step={config.eval.checkpoint_step} needs config.eval_only=True; "
      "training resumes from the newest checkpoint"
    )
  if config.eval.wise_ft is not None and not init_sources(config):
    raise ValueError(
      f"config.eval.wise_ft={config.eval.wise_ft:g} needs config.init_from.path, the run with the "
      "initial parameters"
    )


def to_json(config: Section) -> str:
  """Return the resolved configuration as text, identical for identical settings."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
  if isinstance(value, Sequence):
    return list(value)
  raise TypeError(f"config holds a {type(value).__name__}: {value!r}")
