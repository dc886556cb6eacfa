"""Settings of a run: defaults, types and limits.

Both training apps use this tree; `apps/configs/base.py` has the defaults of each app. On the
command line a setting is `--config.optimizer.learning_rate=3e-4`. `RunConfig.parse` parses the
values of configuration files and flags once.

`parse` checks the type and the limits of every setting. Components check what depends on several
settings, or on data and devices. Relative paths are resolved against the directory where the
command is started.
"""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any, Literal

from apps.trainer.rules import (
  choice,
  dicts,
  exactly,
  fields,
  flag,
  integer,
  one_or_several,
  optional,
  pair,
  plain_dict,
  real,
  regex,
  several,
  wrong,
)
from apps.trainer.rules import text as string
from apps.trainer.section import Section, setting

MAX_IMAGE_SIZE = 8192  # pixels per side
MAX_TEXT = 2**15  # tokens; attention is quadratic in it
_MAX_ROWS = 2**22  # examples per batch
_MAX_VOCABULARY = 2**22  # tokens
_EXAMPLES = integer(0, 10**12)
_SECONDS = integer(10, 7 * 24 * 3600)
_NAMES = several(string, "('txt',)")
_REGEXES = several(regex, "('^encoder/', 'bias$')")
_WEIGHT = real(0)
_FRACTION = real(0, 1)
_STD = real(0, 1, above=True)
_CHANNEL = "(0.5, 0.5, 0.5)"

_PATCH_RESIZE = choice("pseudoinverse", "bilinear")
_PART = choice("params", "ema")


# The imports below are local because these modules import JAX or open files.
def _optimizer(name: str, value: Any) -> None:
  """Check that a value is the name of an optimizer."""
  from apps.trainer.optimizers import OPTIMIZERS

  choice(*OPTIMIZERS)(name, value)


def _schedule(name: str, value: Any) -> None:
  """Check that a value is the name of a learning-rate schedule."""
  from apps.trainer.schedules import SCHEDULES

  choice(*SCHEDULES)(name, value)


def _cooldown(name: str, value: Any) -> None:
  """Check that a value is the name of the shape of a cooldown."""
  from apps.trainer.schedules import COOLDOWNS

  choice(*COOLDOWNS)(name, value)


def _suite(name: str, value: Any) -> None:
  """Check that a value is empty or the name of a benchmark suite."""
  from ov_eval.suites import SUITES

  if value != "":
    choice(*SUITES)(name, value)


def _data_set(name: str, value: Any) -> None:
  """Check that a value is the name of a data set of a benchmark suite."""
  from ov_eval.suites import SUITES

  string(name, value)
  known = dict.fromkeys(data_set.name for sets in SUITES.values() for data_set in sets)
  if value not in known:
    near = difflib.get_close_matches(value, known, 1)
    raise wrong(name, value, f"a data set of a suite, such as {near[0] if near else 'vtab/pets'!r}")


def _changes(name: str, value: Any) -> None:
  """Check that a value is a list of stages; `stages.resolve_stages` checks the changes."""
  if not isinstance(value, tuple | list) or not all(isinstance(v, Mapping) for v in value):
    raise wrong(
      name,
      value,
      "a list of changes, such as ({'name': '84px', 'model.image_size': 84}, {'name': '224px', "
      "'model.image_size': 224})",
    )


@dataclasses.dataclass(frozen=True)
class DemoSettings(Section):
  """Procedurally generated scenes, created in workdir/data if missing."""

  train_examples: int = setting(0, integer(0, 10**8))  # 0 disables demo data
  eval_examples: int = setting(512, integer(1, 10**8))
  zero_shot_examples: int = setting(64, integer(1, 10**8))  # labeled images
  probe_examples: int = setting(0, integer(0, 10**8))  # labeled images to train probes on
  # one object: shape | colour | colour_shape; two objects: colours
  classes: Literal["shape", "colour", "colour_shape", "colours"] = setting("shape")
  image_size: int = setting(64, integer(32, 256))


@dataclasses.dataclass(frozen=True)
class InputSettings(Section):
  """Training and held-out data, and their preprocessing on the host."""

  # folder of shards (TFRecord, tar, Parquet, ArrayRecord), glob or TFDS directory; also gs://, s3://
  data_dir: str = setting("", string)
  split: str = setting("", string)  # TFDS split; "" for plain shards
  # several sources instead of data_dir: ({"path": ..., "weight": 2.0}, ...)
  sources: tuple[Any, ...] = setting(
    (),
    several(
      fields(
        {
          "path": one_or_several(string, "('/data/a', '/data/b')"),
          "split": optional(string),
          "weight": real(0, above=True),
          "image_key": string,
          "caption_keys": _NAMES,
          "image_root": optional(string),
          "format": string,
          "follow_links": flag,
          "keep_list": optional(string),
          "recaptions": optional(string),
        },
        "path",
      ),
      "({'path': '/data/a', 'weight': 2.0}, {'path': '/data/b'})",
    ),
  )
  # file with the records of data_dir to train on, of //tools/data:keep; "" uses all
  keep_list: str = setting("", string)
  # folder of //tools/data:recaption with new captions of data_dir, the feature "recaption"
  recaptions: str = setting("", string)
  image_key: str = setting("jpg", string)
  # short text of an image, the first positive; () uses caption_keys only
  alt_keys: tuple[str, ...] = setting(("txt",), _NAMES)
  # long text of an image, the caption; if there are several, one is drawn
  caption_keys: tuple[str, ...] = setting(("llava_caption",), _NAMES)
  # use one sentence of the long text as a second positive
  sentence_positive: bool = setting(True, flag)
  shuffle: Literal["global", "block", "none"] = setting("global")
  # block shuffle: number of hosts, so that each host reads its own blocks
  lanes: int = setting(1, integer(1, _MAX_ROWS))
  # crop: random crops for training, center crops for evaluation; squash: resize without crop
  fit: Literal["crop", "squash"] = setting("crop")
  # minimum fraction of the image area in a training crop
  area_min: float = setting(0.4, real(0, 1, above=True))
  color_jitter: bool = setting(True, flag)  # on the device
  # normalization of the channels, for pixels in [0, 1]
  mean: tuple[float, ...] = setting((0.485, 0.456, 0.406), exactly(3, _FRACTION, _CHANNEL))
  std: tuple[float, ...] = setting((0.229, 0.224, 0.225), exactly(3, _STD, _CHANNEL))
  num_threads: int = setting(0, integer(0, 1024))  # decoding threads; 0 uses one per core
  # maximum fraction of invalid records before the run stops
  max_bad_fraction: float = setting(0.01, _FRACTION)
  eval_data_dir: str = setting("", string)  # held-out shards; "" disables evaluation
  eval_split: str = setting("", string)
  demo: DemoSettings = DemoSettings()


@dataclasses.dataclass(frozen=True)
class TokenizerSettings(Section):
  """Tokenizer of the captions."""

  # vocabulary file, tokenizer.json or a saved tokenizer; "" trains a tokenizer
  path: str = setting("", string)
  # vocabulary size of a tokenizer trained on the captions of this data
  train_vocab_size: int = setting(4096, integer(8, _MAX_VOCABULARY))
  # True as in the released code; also removes vowel signs of many scripts
  train_strip_accents: bool = setting(False, flag)
  # remove the punctuation of prompts, as in the evaluation of OpenVision
  canonical_prompts: bool = setting(True, flag)
  # pieces: WordPiece; words: whole words, for small closed vocabularies
  train_kind: Literal["pieces", "words"] = setting("pieces")


@dataclasses.dataclass(frozen=True)
class ScheduleSettings(Section):
  """Learning-rate schedule of a stage."""

  kind: str = setting("warmup_cosine", _schedule)  # warmup_cosine | wsd | rsqrt | constant
  warmup_steps: int = setting(0, integer(0))
  min_multiplier: float = setting(0.0, real(0, 1, below=True))
  cooldown_steps: int = setting(0, integer(0))  # wsd: length of the final decay
  cooldown_shape: str = setting("linear", _cooldown)  # linear | cosine | sqrt
  timescale: int = setting(10000, integer(1))  # rsqrt, in steps


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Section):
  """Optimizer; b1 to second_moment are settings of AdamW, which Muon uses for non-matrices."""

  # name in apps/trainer/optimizers: adamw | adafactor | muon | lion
  name: str = setting("adamw", _optimizer)
  # fields of the dataclass of the optimizer, such as {"beta": 0.9} for muon
  options: Mapping[str, Any] = setting({}, plain_dict)
  learning_rate: float = setting(1e-3, real(0))  # peak
  schedule: ScheduleSettings = ScheduleSettings()
  b1: float = setting(0.9, real(0, 1, below=True))
  b2: float = setting(0.95, real(0, 1, below=True))
  eps: float = setting(1e-08, real(0, 1, above=True))
  # dtype of the first moment
  mu_dtype: Literal["bfloat16", "float32", "int8"] = setting("bfloat16")
  # full | factored | int8: 4, about 0, 1 bytes per parameter
  second_moment: Literal["full", "factored", "int8"] = setting("full")
  weight_decay: float = setting(0.2, real(0))
  decay_regex: str = setting(r"(^|/)kernel$", regex)
  grad_clip_norm: float | None = setting(None, optional(real(0, above=True)))  # None: disabled
  # (regex, factor) pairs
  lr_multipliers: tuple[Any, ...] = setting(
    (), several(pair(regex, real(0), "('^encoder/', 0.1)"), "(('^encoder/', 0.1),)")
  )
  layer_decay: float | None = setting(None, optional(real(0, 1, above=True)))  # None: disabled
  layer_decay_regex: str = setting("^encoder/", regex)
  frozen: tuple[str, ...] = setting((), _REGEXES)  # regexes of parameter paths
  # (regex, N) pairs: of matching blocks, only the last N are trained
  last_blocks: tuple[Any, ...] = setting(
    (), several(pair(regex, integer(0), "('^encoder/', 2)"), "(('^encoder/', 2),)")
  )
  # None: no parameter average
  ema_decay: float | None = setting(None, optional(real(0, 1, above=True, below=True)))


@dataclasses.dataclass(frozen=True)
class MeshSettings(Section):
  """Devices along each axis of the mesh; -1: all remaining devices."""

  data: int = setting(-1, integer(1, 2**20, also=-1))
  fsdp: int = setting(1, integer(1, 2**20, also=-1))
  tensor: int = setting(1, integer(1, 2**20, also=-1))


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Section):
  """Frequency, retention and location of checkpoints."""

  every: int = setting(1000, integer(1))  # steps between checkpoints; the last step is always saved
  keep_last: int = setting(2, integer(1))  # 2 keeps a fallback
  keep_every: int = setting(0, integer(0))  # steps; also keep their multiples; 0 disables it
  dir: str = setting("", string)  # other location than workdir/checkpoints, such as gs://bucket/run


@dataclasses.dataclass(frozen=True)
class InitFromSettings(Section):
  """Initial parameters from other runs."""

  # workdir or checkpoint of another run or of the released code
  path: str = setting("", string)
  step: int | None = setting(None, optional(integer(0)))  # None: the newest checkpoint
  part: Literal["params", "ema"] = setting("params")
  # regexes of parameter paths; () includes all
  include: tuple[str, ...] = setting((), _REGEXES)
  exclude: tuple[str, ...] = setting((), _REGEXES)
  # resampling of patch kernels of another size: pseudoinverse | bilinear
  patch_resize: str = setting("pseudoinverse", _PATCH_RESIZE)
  # further sources, e.g. {"path": ..., "include": ("^text/",)}
  more: tuple[Any, ...] = setting(
    (),
    several(
      fields(
        {
          "path": string,
          "step": optional(integer(0)),
          "part": _PART,
          "include": _REGEXES,
          "exclude": _REGEXES,
          "patch_resize": _PATCH_RESIZE,
        },
        "path",
      ),
      "({'path': '/runs/a', 'include': ('^text/',)},)",
    ),
  )


@dataclasses.dataclass(frozen=True)
class LoraSettings(Section):
  """Low-rank adapters; `optimizer.frozen=('^(?!lora/|losses/)',)` freezes the rest of the model."""

  rank: int = setting(0, integer(0, 2**16))  # 0: no adapters
  alpha: float = setting(16.0, real(0, above=True))  # adapters are scaled by alpha / rank
  # regexes of the kernels [L, in, out] with adapters
  include: tuple[str, ...] = setting((r"(^|/)blocks/(attn|mlp)/\w+/kernel$",), _REGEXES)


@dataclasses.dataclass(frozen=True)
class HostSettings(Section):
  """Timeouts for slow or dead processes, in seconds."""

  # seconds that a process may delay the others before it is reported
  slow_after: int = setting(60, _SECONDS)
  # seconds without heartbeat after which the other processes stop
  gone_after: int = setting(30, _SECONDS)


@dataclasses.dataclass(frozen=True)
class ProfileSettings(Section):
  """Steps to profile; the trace is written to workdir/profile."""

  start: int = setting(0, integer(0))
  steps: int = setting(0, integer(0))


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section):
  """Sizes and options of the model; see ov_models for details."""

  encoder: str = setting("Ti/16", string)  # ViT variant / patch size
  text: str = setting("Ti", optional(string))  # text tower; "" disables it
  decoder: str = setting("Ti", optional(string))  # caption decoder; "" disables it
  # queries as in OpenVision | teacher_forced as in OpenVision 2
  decoder_kind: Literal["queries", "teacher_forced"] = setting("queries")
  # fields of ov_models.ViTConfig, such as {"depth": 3}
  encoder_options: Mapping[str, Any] = setting({}, plain_dict)
  text_options: Mapping[str, Any] = setting({}, plain_dict)  # fields of ov_models.TextConfig
  # fields of QueryDecoderConfig or DecoderConfig
  decoder_options: Mapping[str, Any] = setting({}, plain_dict)
  image_size: int = setting(160, integer(1, MAX_IMAGE_SIZE))  # pixels per side
  token_len: int = setting(80, integer(3, MAX_TEXT))  # tokens per text of the text tower
  # tokens per caption of the decoder; 0: token_len - 1
  caption_len: int = setting(128, integer(3, MAX_TEXT, also=0))
  # rows of embedding and head; 0: size of the tokenizer
  vocab_size: int = setting(32000, integer(0, _MAX_VOCABULARY))
  preset: str = setting("default", string)  # key of ov_models.PRESETS, e.g. "openvision_released"
  # fraction of image tokens that the decoder receives in training
  keep_ratio: float = setting(1.0, real(0, 1, above=True))
  embed_dim: int = setting(0, integer(0, 2**16))  # of the shared embedding space; 0: by variant
  scale_init: float = setting(1 / 0.07, real(0, above=True))  # initial inverse temperature
  # initial bias of the logits, for SigLIP; None: no bias
  bias_init: float | None = setting(None, optional(real(-1e6, 1e6)))
  image_head: bool = setting(True, flag)  # project image features to the shared space
  text_head_bias: bool = setting(False, flag)  # of the projection of text features
  # fraction of examples captioned in parallel, as in CapPa
  parallel_ratio: float = setting(0.0, _FRACTION)
  # compute dtype of the towers; params stay float32
  dtype: Literal["float32", "bfloat16"] = setting("float32")
  remat: str = setting("none", string)  # none | full | dots | offload
  attention: Literal["xla", "cudnn", "tpu"] = setting("xla")


@dataclasses.dataclass(frozen=True)
class LossSettings(Section):
  """Weights of the losses, 0 to disable one, and shared options."""

  clip: float = setting(1.0, _WEIGHT)  # softmax over the batch
  siglip: float = setting(0.0, _WEIGHT)  # sigmoid of each pair
  caption: float = setting(2.0, _WEIGHT)  # next-token or learned-query captioning
  # implementation of the contrastive losses, all equal; see ov_losses
  form: Literal["gathered", "ring", "naive"] = setting("gathered")
  chunk: int = setting(0, integer(0, _MAX_ROWS))  # rows of a block of similarities; 0: automatic
  # images with equal texts are not negatives of each other
  mask_duplicates: bool = setting(False, flag)
  # upper limit of the inverse temperature; None as in the released code
  max_scale: float | None = setting(None, optional(real(1)))
  label_smoothing: float = setting(0.0, real(0, 1, below=True))  # of the caption loss
  z_loss: float = setting(0.0, _WEIGHT)
  # further losses in apps/trainer/losses, by name, such as {"siglip": {"weight": 0.5}}
  more: Mapping[str, Any] = setting({}, dicts)


@dataclasses.dataclass(frozen=True)
class ZeroShotSettings(Section):
  """Zero-shot classification of labeled images; disabled without `classes`."""

  # shards, TFDS directory or folder of class folders; "": input.eval_data_dir
  dir: str = setting("", string)
  split: str = setting("", string)
  # file of class names or of JSON {class: [prompt, ...]}; imagenet; folders (of `dir`)
  classes: str = setting("", string)
  templates: str = setting("photo", string)  # prompt templates: file, or a set of ov_eval
  image_key: str = setting("", string)  # "": as in the training data
  label_key: str = setting("label", string)
  examples: int = setting(0, _EXAMPLES)  # 0: all


@dataclasses.dataclass(frozen=True)
class FeatureSettings(Section):
  """Probes on features of the frozen encoder."""

  train_dir: str = setting("", string)  # labeled images for training
  train_split: str = setting("", string)
  dir: str = setting("", string)  # labeled images for testing; "": train_dir
  split: str = setting("", string)
  image_key: str = setting("", string)
  label_key: str = setting("label", string)
  examples: int = setting(0, _EXAMPLES)  # of each split; 0: all
  k: int = setting(20, integer(1))  # nearest neighbours
  # examples per class of the few-shot probes, such as (1, 5, 10)
  shots: tuple[int, ...] = setting((), several(integer(1, 10**6), "(1, 5, 10)"))


@dataclasses.dataclass(frozen=True)
class RetrievalSettings(Section):
  """Image-to-text and text-to-image retrieval."""

  dir: str = setting("", string)  # images with captions; "": input.eval_data_dir
  split: str = setting("", string)
  image_key: str = setting("", string)  # "": as in the training data
  # folder of the images if `dir` is a Karpathy split file
  image_root: str = setting("", string)
  caption_keys: tuple[str, ...] = setting((), _NAMES)  # (): input.alt_keys
  # count equal texts as one query, for which every image with that text is correct
  merge_equal_texts: bool = setting(False, flag)
  examples: int = setting(0, _EXAMPLES)  # 0: all


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section):
  """Evaluation on held-out data. An evaluator without data is disabled."""

  every: int = setting(0, integer(0))  # steps; 0: only at the end of each stage
  # weights alpha * trained + (1 - alpha) * initial (WiSE-FT); None: trained weights
  wise_ft: float | None = setting(None, optional(_FRACTION))
  # evaluate the initial model too, and warn when a main metric falls below this fraction of its
  # value; 0: neither
  warn_below_initial: float = setting(0.0, _FRACTION)
  # checkpoint for eval_only; None: the newest
  checkpoint_step: int | None = setting(None, optional(integer(0)))
  batch_size: int = setting(0, integer(0, _MAX_ROWS))  # 0: the training batch size
  # pairs of input.eval_data_dir for the caption likelihood; 0: all
  examples: int = setting(0, _EXAMPLES)
  # tokenization for BLEU-4 and CIDEr: words, for any script | ptb, as for COCO
  caption_tokens: Literal["words", "ptb"] = setting("words")
  # captions to generate with an autoregressive decoder; 0: none
  caption_examples: int = setting(64, _EXAMPLES)
  method: Literal["greedy", "sample", "beam"] = setting("greedy")
  num_beams: int = setting(4, integer(1, 1024))
  temperature: float = setting(1.0, real(0, 1e6, above=True))
  top_p: float = setting(1.0, real(0, 1, above=True))
  truth_key: str = setting("", string)  # record feature with the ground truth of a demo scene
  zero_shot: ZeroShotSettings = ZeroShotSettings()
  features: FeatureSettings = FeatureSettings()
  retrieval: RetrievalSettings = RetrievalSettings()
  # benchmark suite: clip_benchmark | datacomp38 | vtab; "": none
  suite: str = setting("", _suite)
  suite_dir: str = setting("", string)  # folder that contains the data sets of the suite
  # data sets of the suite to evaluate, such as ("vtab/pets",); (): all
  suite_datasets: tuple[str, ...] = setting((), several(_data_set, "('vtab/pets',)"))
  suite_examples: int = setting(0, _EXAMPLES)  # of each data set; 0: all
  # images of each kind in the report; 0: none, metrics are not affected
  gallery: int = setting(12, integer(0, 10**4))
  # folder for the results of every example as JSON lines
  per_example: str = setting("", string)


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
  """All settings of a run or of one of its stages."""

  seed: int = setting(0, integer(0))
  # examples per step over all devices and hosts
  batch_size: int = setting(256, integer(1, _MAX_ROWS))
  total_steps: int = setting(1000, integer(1))  # of the whole run; stages set their own
  # micro-batches per step; gradients stay exact
  accumulate: int = setting(1, integer(1, _MAX_ROWS))
  eval_only: bool = setting(False, flag)
  input: InputSettings = InputSettings()
  tokenizer: TokenizerSettings = TokenizerSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  mesh: MeshSettings = MeshSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  init_from: InitFromSettings = InitFromSettings()
  ft_from: str = setting("", string)  # name of init_from.path in the released code
  lora: LoraSettings = LoraSettings()
  hosts: HostSettings = HostSettings()
  log_every: int = setting(50, integer(1))  # steps between lines of metrics.jsonl
  tensorboard: bool = setting(True, flag)
  # name of a W&B project; the API key is read from the environment only
  wandb_project: str = setting("", string)
  profile: ProfileSettings = ProfileSettings()
  # local folder; "" compiles at every start
  compile_cache: str = setting("~/.cache/openvision/xla", string)
  # folder or gs://bucket/folder shared between machines; must be trusted like code
  compile_store: str = setting("", string)
  # dicts of changes, e.g. {"name": "84px", "total_steps": 9, "model.image_size": 84}
  stages: tuple[Any, ...] = setting((), _changes)
  model: ModelSettings = ModelSettings()
  loss: LossSettings = LossSettings()
  eval: EvalSettings = EvalSettings()
