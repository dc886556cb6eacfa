"""Fine-tune an imported model, or the model of a run, with its own sizes, texts and preprocessing.

  bazel run //apps:export -- --from=transformers:/data/clip-vit-base-patch16
      --to_workdir=/data/start
  bazel run //apps:clip_train -- --workdir=/data/run
      --config=apps/configs/finetune.py:init=/data/start,batch_size=1024
      --config.input.data_dir=/data/shards

The options of the model, tokenizer, normalization and crops come from the metadata of `init`.
docs/fine_tune.md describes the modes.
"""

import os
from typing import Any

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.configs.base import clip_config, model_of
from apps.configs.objectives import use_objective

# Starting points of the learning rate. Full: FLYP, arXiv:2212.00638; LiT: arXiv:2111.07991; LoRA:
# arXiv:2106.09685.
RATES = {"full": 1e-5, "lit": 1e-3, "lora": 2e-4}
# Settings of the data that a run passes on.
_INPUTS = ("fit", "mean", "std", "alt_keys", "caption_keys", "sentence_positive")
# The layers before the first block of the image tower.
_STEM = r"^encoder/(patch_embed|patch_norm|pre_norm|position_embedding|cls|registers)(/|$)"
_IMAGE_TOWER = r"^(encoder|image_head)/"
_TEXT_GIVEN = "text={} is for an init that is an image tower alone; omit it"

ARGUMENTS = {
  "init": "",  # workdir of an import or of a run
  "mode": "full",  # full | lit: image tower frozen | lora: adapters of all blocks only
  "batch_size": 256,
  "steps": 1000,
  "lr": 0.0,  # peak; 0: that of the mode in RATES
  "res": 0,  # pixels; 0: as in `init`
  "layer_decay": 1.0,  # factor of the rate per layer of the image tower; 1: disabled
  "last_blocks": 0,  # train only the last blocks of the image tower; 0: all
  "rank": 8,  # of the adapters
  "alpha": 16.0,  # scale of the adapters is alpha / rank
  "loss": "",  # see objectives.py; "": that of a run, or the one of the imported model
  # record feature with the text; several as a+b, one is drawn; "": that of a run, or txt
  "txt_key": "",
  "text": "",  # variant of a new text tower, if `init` is an image tower alone
  "vocab_path": "",  # tokenizer, if `init` has none; "" trains one on the captions
  "dtype": "float32",
  "remat": "none",
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the configuration of a fine-tuning run.

  Raises:
    ValueError: an argument is invalid, or `init` is no workdir or has no text tower.
  """
  a = parse_arguments(arg, ARGUMENTS)
  if a.mode not in RATES:
    raise ValueError(f"mode={a.mode!r}: expected one of {', '.join(RATES)}")
  if a.text and a.mode == "lora":
    raise ValueError(
      f"text={a.text} with mode=lora, which would not train the new text tower; use lit or full"
    )
  if a.last_blocks and a.mode != "full":
    raise ValueError(
      f"last_blocks={a.last_blocks} needs mode=full; mode={a.mode} freezes the whole image tower"
    )
  metadata = _read(a.init)
  config = clip_config()
  config.batch_size, config.total_steps = a.batch_size, a.steps
  keys = tuple((a.txt_key or "txt").split("+"))
  config.input.update(alt_keys=keys, caption_keys=keys, color_jitter=False)
  if saved := metadata.get("config"):
    if a.text:
      raise ValueError(_TEXT_GIVEN.format(a.text))
    _as_in_run(config, saved)
    if a.txt_key:
      config.input.update(alt_keys=keys if config.model.text else (), caption_keys=keys)
  else:
    _as_imported(config, metadata, a.text)
  if a.loss:
    use_objective(config, a.loss)
  config.model.update(dtype=a.dtype, remat=a.remat)
  config.init_from.path = a.init
  _set_texts(config, a)
  _set_mode(config, a)
  if a.res:
    config.model.image_size = a.res
  config.eval.warn_below_initial = 0.5
  return config


def _read(init: str) -> dict[str, Any]:
  """Return the metadata of the newest checkpoint of a workdir."""
  # JAX is slow to import, and errors of other arguments do not need it.
  from apps.trainer.checkpoint import find_checkpoint, read_metadata

  if not init:
    raise ValueError(
      "init= is missing; give the workdir of an import or of a run: init=/data/start"
    )
  try:
    return read_metadata(find_checkpoint(os.path.expanduser(init)))
  except (ValueError, OSError) as error:
    raise ValueError(f"init={init}: {error}") from error


def _as_in_run(config: ConfigDict, saved: dict[str, Any]) -> None:
  """Set model, losses and preprocessing of a run."""
  config.model.update(model_of(saved["model"]).to_dict())
  for section, names in (("loss", config.loss), ("input", _INPUTS)):
    given = {name: saved[section][name] for name in names if name in saved.get(section, {})}
    config[section].update({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _as_imported(config: ConfigDict, metadata: dict[str, Any], text: str) -> None:
  """Set model and preprocessing of an import, and the losses that its parts allow."""
  from apps.trainer.config import model_settings
  import ov_models

  model = ov_models.config_from_dict(metadata["model"])
  if isinstance(model, ov_models.TextConfig):
    raise ValueError("init has only a text tower; expected a model with an image tower")
  config.model.update(model_settings(model).to_dict())
  alone = isinstance(model, ov_models.ViTConfig)
  if alone and not text:
    raise ValueError("init has only an image tower; add the variant of a new text tower: text=B")
  if not alone and text:
    raise ValueError(_TEXT_GIVEN.format(text))
  if alone:
    # Texts are projected to the pooled vector of an image, which needs no new head.
    config.model.update(text=text, vocab_size=0, image_head=False, embed_dim=model.width)
  if config.model.text:
    siglip = config.model.bias_init is not None
    scale, bias = config.model.scale_init, config.model.bias_init
    use_objective(config, "openvision" if config.model.decoder else "siglip" if siglip else "clip")
    config.input.sentence_positive = False  # one text per image
    config.model.update(scale_init=scale, bias_init=bias)
  else:
    config.loss.update(clip=0.0, caption=1.0)
    config.input.update(alt_keys=(), sentence_positive=False)
  if given := metadata.get("preprocess"):
    config.input.update(
      fit="squash" if given["fit"] == "squash" else "crop",
      mean=tuple(given["mean"]),
      std=tuple(given["std"]),
    )


def _set_texts(config: ConfigDict, a: ConfigDict) -> None:
  """Set the tokenizer of `init`, if it has one."""
  import ov_data

  folder = os.path.join(os.path.expanduser(a.init), "tokenizer")
  if a.vocab_path and os.path.isdir(folder):
    raise ValueError(f"vocab_path={a.vocab_path}: init has its own tokenizer, {folder}; omit it")
  if os.path.isfile(os.path.join(folder, "text_processor.json")):
    processor = ov_data.TextProcessor.load(folder)
    config.tokenizer.canonical_prompts = processor.canonical
  if os.path.isdir(folder):
    config.tokenizer.path = folder
  elif a.vocab_path or a.text:
    config.tokenizer.path = os.path.expanduser(a.vocab_path)
  else:
    raise ValueError(
      f"init={a.init} has no tokenizer; give that of the model as vocab_path=, or import it from a "
      "folder with its tokenizer"
    )


def _set_mode(config: ConfigDict, a: ConfigDict) -> None:
  """Set optimizer, frozen parameters and adapters."""
  config.optimizer.update(
    learning_rate=a.lr or RATES[a.mode], weight_decay=0.1, grad_clip_norm=1.0, b2=0.98
  )
  config.optimizer.schedule.warmup_steps = a.steps // 10
  if a.layer_decay != 1:
    config.optimizer.layer_decay = a.layer_decay
  if a.mode == "lit":
    config.optimizer.frozen = (_IMAGE_TOWER,)
  elif a.mode == "lora":
    config.lora.update(rank=a.rank, alpha=a.alpha)
    config.optimizer.frozen = (r"^(?!lora/|losses/)",)
  elif a.last_blocks:
    config.optimizer.frozen = (_STEM,)
    config.optimizer.last_blocks = (("^encoder/", a.last_blocks),)
