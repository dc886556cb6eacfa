"""The type and the limits of every setting of a configuration.

`check_settings` runs before anything is imported or opened that a wrong value could break. What
depends on several settings, or on data and devices, is checked by the parts that use them.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from apps.trainer.rules import (
  Rule,
  choice,
  fields,
  flag,
  key_of,
  one_or_several,
  optional,
  pair,
  plain_dict,
  real,
  regex,
  several,
  text,
  whole,
  wrong,
)

MAX_IMAGE_SIZE = 8192  # pixels of a side
MAX_TEXT = 2**15  # tokens: attention needs their square
_MAX_ROWS = 2**22  # examples of a batch
_MAX_VOCABULARY = 2**22  # tokens
_EXAMPLES = whole(0, 10**12)
_SECONDS = whole(10, 7 * 24 * 3600)
_NAMES = several(text, "('txt',)")
_REGEXES = several(regex, "('^encoder/', 'bias$')")
_WEIGHT = real(0)
_FRACTION = real(0, 1)

_PATCH_RESIZE = choice("pseudoinverse", "bilinear")
_PART = choice("params", "ema")


# These tables are imported where a value is checked: they bring JAX along.
def _optimizers() -> Iterable[str]:
  from apps.trainer.optimizers import OPTIMIZERS

  return OPTIMIZERS


def _schedules() -> Iterable[str]:
  from apps.trainer.schedules import SCHEDULES

  return SCHEDULES


def _cooldowns() -> Iterable[str]:
  from apps.trainer.schedules import COOLDOWNS

  return COOLDOWNS


RULES: dict[str, Rule] = {
  "seed": whole(0),
  "batch_size": whole(1, _MAX_ROWS),
  "total_steps": whole(1),
  "accumulate": whole(1, _MAX_ROWS),
  "eval_only": flag,
  "input.data_dir": text,
  "input.split": text,
  "input.sources": several(
    fields(
      {
        "path": one_or_several(text, "('/data/a', '/data/b')"),
        "split": optional(text),
        "weight": real(0, above=True),
        "image_key": text,
        "caption_keys": _NAMES,
        "image_root": optional(text),
        "format": text,
        "follow_links": flag,
      },
      "path",
    ),
    "({'path': '/data/a', 'weight': 2.0}, {'path': '/data/b'})",
  ),
  "input.image_key": text,
  "input.alt_keys": _NAMES,
  "input.caption_keys": _NAMES,
  "input.sentence_positive": flag,
  "input.shuffle": choice("global", "block", "none"),
  "input.lanes": whole(1, _MAX_ROWS),
  "input.fit": choice("crop", "squash"),
  "input.area_min": real(0, 1, above=True),
  "input.color_jitter": flag,
  "input.num_threads": whole(0, 1024),
  "input.max_bad_fraction": _FRACTION,
  "input.eval_data_dir": text,
  "input.eval_split": text,
  "input.demo.train_examples": whole(0, 10**8),
  "input.demo.eval_examples": whole(1, 10**8),
  "input.demo.zero_shot_examples": whole(1, 10**8),
  "input.demo.probe_examples": whole(0, 10**8),
  "input.demo.classes": choice("shape", "colour", "colour_shape", "colours"),
  "input.demo.image_size": whole(32, 256),
  "tokenizer.path": text,
  "tokenizer.train_vocab_size": whole(8, _MAX_VOCABULARY),
  "tokenizer.train_strip_accents": flag,
  "tokenizer.train_kind": choice("pieces", "words"),
  "optimizer.name": key_of(_optimizers),
  "optimizer.options": plain_dict,
  "optimizer.learning_rate": real(0),
  "optimizer.schedule.kind": key_of(_schedules),
  "optimizer.schedule.warmup_steps": whole(0),
  "optimizer.schedule.min_multiplier": real(0, 1, below=True),
  "optimizer.schedule.cooldown_steps": whole(0),
  "optimizer.schedule.cooldown_shape": key_of(_cooldowns),
  "optimizer.schedule.timescale": whole(1),
  "optimizer.b1": real(0, 1, below=True),
  "optimizer.b2": real(0, 1, below=True),
  "optimizer.eps": real(0, 1, above=True),
  "optimizer.mu_dtype": choice("bfloat16", "float32", "int8"),
  "optimizer.second_moment": choice("full", "factored", "int8"),
  "optimizer.weight_decay": real(0),
  "optimizer.decay_regex": regex,
  "optimizer.grad_clip_norm": optional(real(0, above=True)),
  "optimizer.lr_multipliers": several(
    pair(regex, real(0), "('^encoder/', 0.1)"), "(('^encoder/', 0.1),)"
  ),
  "optimizer.layer_decay": optional(real(0, 1, above=True)),
  "optimizer.layer_decay_regex": regex,
  "optimizer.frozen": _REGEXES,
  "optimizer.ema_decay": optional(real(0, 1, above=True, below=True)),
  "mesh.data": whole(1, 2**20, also=-1),
  "mesh.fsdp": whole(1, 2**20, also=-1),
  "mesh.tensor": whole(1, 2**20, also=-1),
  "checkpoint.every": whole(1),
  "checkpoint.keep_last": whole(1),
  "checkpoint.keep_every": whole(0),
  "checkpoint.dir": text,
  "init_from.path": text,
  "init_from.step": optional(whole(0)),
  "init_from.part": _PART,
  "init_from.include": _REGEXES,
  "init_from.exclude": _REGEXES,
  "init_from.patch_resize": _PATCH_RESIZE,
  "init_from.more": several(
    fields(
      {
        "path": text,
        "step": optional(whole(0)),
        "part": _PART,
        "include": _REGEXES,
        "exclude": _REGEXES,
        "patch_resize": _PATCH_RESIZE,
      },
      "path",
    ),
    "({'path': '/runs/a', 'include': ('^text/',)},)",
  ),
  "ft_from": text,
  "hosts.slow_after": _SECONDS,
  "hosts.gone_after": _SECONDS,
  "log_every": whole(1),
  "tensorboard": flag,
  "wandb_project": text,
  "profile.start": whole(0),
  "profile.steps": whole(0),
  "compile_cache": text,
  "compile_store": text,
  "model.encoder": text,
  "model.text": optional(text),
  "model.decoder": optional(text),
  "model.decoder_kind": choice("queries", "teacher_forced"),
  "model.encoder_options": plain_dict,
  "model.text_options": plain_dict,
  "model.decoder_options": plain_dict,
  "model.image_size": whole(1, MAX_IMAGE_SIZE),
  "model.token_len": whole(3, MAX_TEXT),
  "model.caption_len": whole(3, MAX_TEXT),
  "model.vocab_size": whole(0, _MAX_VOCABULARY),
  "model.preset": text,
  "model.keep_ratio": real(0, 1, above=True),
  "model.embed_dim": whole(0, 2**16),
  "model.scale_init": real(0, above=True),
  "model.bias_init": optional(real(-1e6, 1e6)),
  "model.parallel_ratio": _FRACTION,
  "model.dtype": choice("float32", "bfloat16"),
  "model.remat": text,
  "model.attention": choice("xla", "cudnn", "tpu"),
  "model.label_smoothing": real(0, 1, below=True),
  "model.z_loss": _WEIGHT,
  "model.caption_weight": _WEIGHT,
  "loss.clip": _WEIGHT,
  "loss.siglip": _WEIGHT,
  "loss.caption": _WEIGHT,
  "loss.form": choice("gathered", "ring", "naive"),
  "loss.chunk": whole(0, _MAX_ROWS),
  "loss.mask_duplicates": flag,
  "loss.max_scale": optional(real(1)),
  "loss.label_smoothing": real(0, 1, below=True),
  "loss.z_loss": _WEIGHT,
  "eval.every": whole(0),
  "eval.checkpoint_step": optional(whole(0)),
  "eval.batch_size": whole(0, _MAX_ROWS),
  "eval.examples": _EXAMPLES,
  "eval.caption_examples": _EXAMPLES,
  "eval.caption_tokens": choice("words", "ptb"),
  "eval.method": choice("greedy", "sample", "beam"),
  "eval.num_beams": whole(1, 1024),
  "eval.temperature": real(0, 1e6, above=True),
  "eval.top_p": real(0, 1, above=True),
  "eval.truth_key": text,
  "eval.zero_shot.dir": text,
  "eval.zero_shot.split": text,
  "eval.zero_shot.classes": text,
  "eval.zero_shot.templates": text,
  "eval.zero_shot.image_key": text,
  "eval.zero_shot.label_key": text,
  "eval.zero_shot.examples": _EXAMPLES,
  "eval.features.train_dir": text,
  "eval.features.train_split": text,
  "eval.features.dir": text,
  "eval.features.split": text,
  "eval.features.image_key": text,
  "eval.features.label_key": text,
  "eval.features.examples": _EXAMPLES,
  "eval.features.k": whole(1),
  "eval.features.shots": several(whole(1, 10**6), "(1, 5, 10)"),
  "eval.retrieval.dir": text,
  "eval.retrieval.split": text,
  "eval.retrieval.image_key": text,
  "eval.retrieval.image_root": text,
  "eval.retrieval.caption_keys": _NAMES,
  "eval.retrieval.examples": _EXAMPLES,
  "eval.gallery": whole(0, 10**4),
  "eval.per_example": text,
}


def check_settings(config: ConfigDict, where: str = "config.") -> None:
  """Check the type and the limits of every setting.

  A setting that this kind of configuration does not have, and one without a rule, is passed over.

  Args:
    config: of a run or of a stage.
    where: what the names of settings follow in the message.

  Raises:
    ValueError: naming the setting, its value and what was expected.
  """
  for name, rule in RULES.items():
    value: Any = config
    path = ""
    for part in name.split("."):
      if not isinstance(value, ConfigDict):
        raise wrong(f"{where}{path}", value, "a section of settings")
      if part not in value:
        break
      value, path = value[part], f"{path}.{part}".lstrip(".")
    else:
      rule(f"{where}{name}", value)
