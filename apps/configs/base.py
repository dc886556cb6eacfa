"""Every setting of both trainers with its default; a recipe changes what it needs.

Each leaf can be set on the command line: `--config.optimizer.learning_rate=3e-4`.
Relative paths are read from the directory the command is started in.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def caption_config() -> ConfigDict:
  """The full configuration of //apps:caption_train."""
  return ConfigDict(_shared() | {"model": model_config(), "eval": eval_config()})


def clip_config() -> ConfigDict:
  """The full configuration of //apps:clip_train."""
  shared = _shared()
  shared["input"] |= {
    "alt_keys": ("txt",),  # the short text of a picture: the first positive
    "caption_keys": ("llava_caption",),  # the long one: what the decoder writes
    "sentence_positive": True,  # one sentence of the long text is a second positive
  }
  return ConfigDict(
    shared | {"model": two_towers_config(), "loss": loss_config(), "eval": clip_eval_config()}
  )


def _shared() -> dict:
  """What every trainer has."""
  return {
    "seed": 0,
    "batch_size": 256,  # examples per step over all devices and hosts
    "total_steps": 1000,  # of the whole run; a stage sets its own
    "accumulate": 1,  # micro-batches per step; the step stays exact
    "eval_only": False,
    "input": input_config(),
    "tokenizer": {
      "path": "",  # vocabulary file, tokenizer.json or a saved tokenizer; "" trains one
      "train_vocab_size": 4096,  # entries of a tokenizer trained on the captions of this data
      "train_strip_accents": False,  # True: as released; also removes vowel signs of many scripts
      "train_kind": "pieces",  # pieces: WordPiece; words: whole words, for small closed languages
    },
    "optimizer": optimizer_config(),
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: the devices that are left
    "checkpoint": {
      "every": 1000,  # steps between checkpoints; the last step is always saved
      "keep_last": 2,  # one to fall back to
      "keep_every": 0,  # steps; these checkpoints are never deleted; 0: none
      "dir": "",  # another place than workdir/checkpoints, such as gs://bucket/run
    },
    "init_from": {
      # Workdir or checkpoint of another run or of the published code, whose params start this one.
      "path": "",
      "step": placeholder(int),  # None: its newest checkpoint
      "part": "params",  # or "ema"
      "include": (),  # regular expressions on parameter paths; () takes all
      "exclude": (),
      "patch_resize": "pseudoinverse",  # of patch kernels of another size; or "bilinear"
      "more": (),  # then from other runs, e.g. {"path": ..., "include": ("^text/",)}
    },
    "ft_from": "",  # the published name of init_from.path
    "hosts": {
      "slow_after": 60,  # seconds that a process may hold the others back before it is named
      "gone_after": 30,  # seconds without a sign of life of a process until the others end
    },
    "log_every": 50,  # steps between lines of metrics.jsonl
    "tensorboard": True,
    "wandb_project": "",  # name of a W&B project; its key comes from the environment only
    "profile": {"start": 0, "steps": 0},  # trace steps start..start+steps into workdir/profile
    "compile_cache": "~/.cache/openvision/xla",  # local folder; "" compiles anew at every start
    "compile_store": "",  # folder or gs://bucket/folder that machines share; trust it as your code
    # Dicts of changes, e.g. {"name": "84px", "total_steps": 9, "model.image_size": 84}.
    "stages": (),
  }


def model_config() -> dict:
  """Shapes and behaviour of the captioner; see ov_models for the meaning of each."""
  return {
    "encoder": "Ti/16",  # ViT variant / patch size
    "decoder": "Ti",
    "encoder_options": {},  # fields of ov_models.ViTConfig, such as {"depth": 3}
    "decoder_options": {},  # fields of ov_models.DecoderConfig
    "image_size": 160,  # pixels
    "token_len": 128,  # caption length in the predecessor's count: decoder positions + 1
    "vocab_size": 32000,  # rows of embedding and head; at least the tokenizer's size
    "preset": "default",  # "default" | "openvision2_released"
    "keep_ratio": 0.35,  # share of image tokens the decoder sees in training
    "dtype": "float32",  # compute of both towers; params stay float32
    "remat": "none",  # none | full | dots | offload
    "attention": "xla",  # xla | cudnn | tpu
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "caption_weight": 1.0,  # factor on the caption loss; the predecessor uses 2
  }


def two_towers_config() -> dict:
  """Shapes and behaviour of the two towers and their decoder; see ov_models for each."""
  return {
    "encoder": "Ti/16",  # ViT variant / patch size
    "text": "Ti",  # text tower; "": none
    "decoder": "Ti",  # caption decoder; "": none
    "decoder_kind": "queries",  # queries: as released | teacher_forced
    "encoder_options": {},  # fields of ov_models.ViTConfig, such as {"depth": 3}
    "text_options": {},  # fields of ov_models.TextConfig
    "decoder_options": {},  # fields of QueryDecoderConfig or DecoderConfig
    "image_size": 160,  # pixels
    "token_len": 80,  # tokens of a text of the text tower
    "caption_len": 128,  # tokens of a caption of the decoder
    "vocab_size": 32000,  # rows of embedding and head; 0: the tokenizer's size
    "preset": "default",  # "default" | "openvision_released"
    "embed_dim": 0,  # of the shared space; 0: by variant
    "scale_init": 1 / 0.07,  # inverse temperature at the start
    "bias_init": placeholder(float),  # of the logits, for SigLIP; None: no bias
    "parallel_ratio": 0.0,  # share of examples captioned in parallel, as in CapPa
    "dtype": "float32",  # compute of the towers; params stay float32
    "remat": "none",  # none | full | dots | offload
    "attention": "xla",  # xla | cudnn | tpu
  }


def loss_config() -> dict:
  """Weights of the losses, and how the contrastive ones are computed."""
  return {
    "clip": 1.0,  # softmax over the batch
    "siglip": 0.0,  # sigmoid of each pair
    "caption": 2.0,  # next token or learned queries
    "form": "gathered",  # gathered | ring | naive, all equal: see ov_losses
    "chunk": 0,  # rows of a block of similarities; 0: chosen
    "mask_duplicates": False,  # pictures with equal texts are no negatives of each other
    "max_scale": placeholder(float),  # limit of the inverse temperature; None: none, as released
    "label_smoothing": 0.0,  # of the caption loss
    "z_loss": 0.0,
  }


def input_config() -> dict:
  """Where examples come from and what happens to them on the host."""
  return {
    "data_dir": "",  # folder of record shards, glob, or TFDS directory; local or gs://
    "split": "",  # TFDS split; "" for plain shards
    "sources": (),  # several sources: ({"path": ..., "weight": 2.0}, ...), instead of data_dir
    "image_key": "jpg",
    "caption_keys": ("txt",),  # one is drawn per example when there are several
    "shuffle": "global",  # global | block | none
    "lanes": 1,  # block shuffle: number of hosts, so that each reads its own blocks
    "fit": "crop",  # crop: random crops in training, central ones later; squash: whole pictures
    "area_min": 0.4,  # smallest share of the picture a training crop may take
    "color_jitter": True,  # on the device
    "num_threads": 0,  # decoding threads; 0: one per core
    "max_bad_fraction": 0.01,  # the run stops when more records than this are broken
    "eval_data_dir": "",  # held-out shards; "" evaluates nothing
    "eval_split": "",
    "demo": {  # procedurally drawn scenes, made in workdir/data when missing
      "train_examples": 0,  # 0: no demo data
      "eval_examples": 512,
      "zero_shot_examples": 64,  # labelled pictures
      "probe_examples": 0,  # the same, for probes to learn from
      "classes": "shape",  # of one object: shape | colour | colour_shape; of two: colours
      "image_size": 64,
    },
  }


def optimizer_config() -> dict:
  """Fields of apps.trainer.optimizer.OptimizerConfig, with its ScheduleConfig inside.

  b1 to second_moment are those of AdamW, which muon uses too, for what is no matrix.
  """
  return {
    "name": "adamw",  # of apps/trainer/optimizers: adamw | adafactor | muon | lion
    "options": {},  # fields of the dataclass of that optimizer, such as {"beta": 0.9} of muon
    "learning_rate": 1e-3,  # peak
    "schedule": {
      "kind": "warmup_cosine",  # warmup_cosine | wsd | rsqrt | constant
      "warmup_steps": 0,
      "min_multiplier": 0.0,
      "cooldown_steps": 0,  # wsd: length of the final decay
      "cooldown_shape": "linear",  # linear | cosine | sqrt
      "timescale": 10_000,  # rsqrt, in steps
    },
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "mu_dtype": "bfloat16",  # of the first moment: bfloat16 | float32 | int8
    "second_moment": "full",  # full | factored | int8: 4, about 0, 1 bytes a parameter
    "weight_decay": 0.2,
    "decay_regex": r"(^|/)kernel$",
    "grad_clip_norm": placeholder(float),  # None: no clipping
    "lr_multipliers": (),  # pairs (regular expression, factor)
    "layer_decay": placeholder(float),  # None: none
    "layer_decay_regex": "^encoder/",
    "frozen": (),  # regular expressions
    "ema_decay": placeholder(float),  # None: no averaged params
  }


def eval_config() -> dict:
  """What is measured on held-out data, and how often. An evaluator without data is off."""
  return {
    "every": 0,  # steps; 0: only at the end of each stage
    "checkpoint_step": placeholder(int),  # of the checkpoint for eval_only; None: the newest
    "batch_size": 0,  # 0: the training batch size
    "examples": 0,  # pairs of input.eval_data_dir for the likelihood of captions; 0: all
    "caption_tokens": "words",  # of BLEU-4 and CIDEr: words, in any script | ptb, as for COCO
    "caption_examples": 64,  # captions written, by a decoder that writes word by word; 0: none
    "method": "greedy",  # greedy | sample | beam
    "num_beams": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "truth_key": "",  # record feature with the ground truth of a demo scene
    "zero_shot": zero_shot_config(),
    "features": feature_eval_config(),
    "gallery": 24,  # pictures of each kind in the report; 0: none, the figures stay
    "per_example": "",  # folder that gets what was found for every example, as JSON lines
  }


def clip_eval_config() -> dict:
  """The same, and retrieval."""
  return eval_config() | {
    "retrieval": {
      "dir": "",  # pictures with captions; "": input.eval_data_dir
      "split": "",
      "image_key": "",  # "": that of the training data
      "image_root": "",  # folder of the pictures, where `dir` is a Karpathy split file
      "caption_keys": (),  # (): input.alt_keys
      "examples": 0,  # 0: all
    },
    "gallery": 12,
  }


def zero_shot_config() -> dict:
  """Classification of labelled pictures by texts; off without `classes`."""
  return {
    "dir": "",  # shards, TFDS directory, folder of class folders; "": input.eval_data_dir
    "split": "",
    "classes": "",  # file of names or of JSON {class: [prompt, ...]}; imagenet; folders (of `dir`)
    "templates": "photo",  # what names are put into: file, or a set of ov_eval
    "image_key": "",  # "": that of the training data
    "label_key": "label",
    "examples": 0,  # 0: all
  }


def feature_eval_config() -> dict:
  """Probes on the frozen encoder."""
  return {
    "train_dir": "",  # labelled pictures to learn from
    "train_split": "",
    "dir": "",  # labelled pictures to be tested on; "": train_dir
    "split": "",
    "image_key": "",
    "label_key": "label",
    "examples": 0,  # of each; 0: all
    "k": 20,  # nearest neighbours
    "shots": (),  # examples per class of few-shot probes, such as (1, 5, 10)
  }
