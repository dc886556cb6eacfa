"""Names of the released OpenVision code, and their counterparts here.

Only this table contains these names: the parsers of arguments and flags use it, and README.md shows
it (`python -m apps.configs.published` prints the tables; a test compares them).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

FAMILIES = ("openvision", "openvision2")


class Argument(NamedTuple):
  """Argument of `--config=FILE.py:ARGUMENTS`.

  Attributes:
    name: name in the released code.
    openvision: support in openvision.py: "same", "same: DIFFERENCE", "renamed: NEW",
      "ignored: WHY" or "refused: REMEDY".
    openvision2: support in openvision2.py.
  """

  name: str
  openvision: str
  openvision2: str


class Setting(NamedTuple):
  """Leaf of the configuration tree, `--config.NAME=VALUE`, or another flag.

  Attributes:
    name: name in the released code; a trailing ".*" matches every leaf below.
    here: replacement, with {} for the value; "" if there is none.
    note: difference, or reason why none is needed.
  """

  name: str
  here: str
  note: str = ""


# Values of the argument `remat` and of `remat_policy`.
REMAT = {"minimal": "dots", "minimal_offloaded": "offload", "minimal_flash": "dots"}

_NO_TEXT_TOWER = "refused: OpenVision 2 has no text tower; leave it out"
_REMAT = "same: of all towers; " + ", ".join(f"{old} is {new} here" for old, new in REMAT.items())
_TOKENIZER = "same: true is refused; vocab_path takes any tokenizer.json"
_INIT = "same: the parameters at this path start the run; unused in the published code"
_MESH = "same: the default is all devices"
_NEVER = "ignored: it has no effect in the published code either"

ARGUMENTS = (
  Argument("res", "same", "same"),
  Argument("img", "same", "same"),
  Argument("txt_name", "same", _NO_TEXT_TOWER),
  Argument("txt_decoder_name", "same", "same"),
  Argument("batch_factor", "same", "same"),
  Argument("base_lr", "same", "same"),
  Argument("imagenet_epoch", "same", "same"),
  Argument("vitual_warmup_epoch", "renamed: virtual_warmup_epoch", "renamed: virtual_warmup_epoch"),
  Argument("token_len", "same", "same"),
  Argument(
    "output_token_len", "same", "refused: token_len is the length of the caption here; give that"
  ),
  Argument("txt_key1", "same", "refused: OpenVision 2 has one text; give its name as txt_key"),
  Argument("txt_key2", "same", "refused: OpenVision 2 has one text; give its name as txt_key"),
  Argument(
    "txt_key", "ignored: txt_key1 and txt_key2 name the texts, as in the published code", "same"
  ),
  Argument("vocab_size", "same", "same"),
  Argument("vocab_path", "same", "same: fixed in the published code"),
  Argument("mask_ratio", "same", "same: missing in the published code"),
  Argument(
    "keep_ratio",
    "refused: the decoder of OpenVision sees every image token; leave it out, or drop patches in "
    "the image tower with mask_ratio",
    "same",
  ),
  Argument("color_jitter", "same", "same: always on in the published code"),
  Argument("remat", _REMAT, _REMAT),
  Argument("use_sovit", "same", "refused: OpenVision 2 has no shared space; leave it out"),
  Argument(
    "img_head",
    "same: false is refused; the image tower has a head",
    "ignored: OpenVision 2 has no image head",
  ),
  Argument("use_openclip_tokenizer", _TOKENIZER, _TOKENIZER),
  Argument(
    "txt", "ignored: vocab_path names the vocabulary", "ignored: vocab_path names the vocabulary"
  ),
  Argument("concat", _NEVER, "refused: OpenVision 2 has one text; leave it out"),
  Argument("prob", _NEVER, "refused: OpenVision 2 has one text; leave it out"),
  Argument("init", _INIT, _INIT),
  Argument(
    "load_pretrain",
    f"{_NEVER}; init=PATH starts from other parameters",
    f"{_NEVER}; init=PATH starts from other parameters",
  ),
  Argument("data_parallelism", _MESH, _MESH),
  Argument("fsdp_parallelism", "same", "same"),
  Argument("tensor_parallelism", "same", "same"),
  Argument("runlocal", "same", "same"),
)

_FLICKR = "a run has one retrieval set; measure the other one with --config.eval_only=True"
_FIXED = "part of the code"
_PIXELS = "evaluation resizes the shorter side and crops the center, as published"

SETTINGS = (
  Setting("ft_from", "--config.ft_from={}", "the same as --config.init_from.path"),
  Setting("seed", "--config.seed={}"),
  Setting("total_steps", "--config.total_steps={}"),
  Setting("eval_only", "--config.eval_only={}"),
  Setting("model.keep_ratio", "--config.model.keep_ratio={}", "OpenVision keeps every token"),
  Setting(
    "resume", "", "the same --workdir resumes; --config.init_from.path takes parameters only"
  ),
  Setting("masked_init", "--config.init_from.path={}", "reads checkpoint folders, not .npz files"),
  Setting(
    "load_transform",
    "--config.init_from.path={}",
    "patch kernels are resized; --config.init_from.patch_resize=bilinear does it as published",
  ),
  Setting("load_config.*", "", "init_from.path reads the sizes from the checkpoint"),
  Setting("save_ckpt", "", "a run always saves; --config.checkpoint.every sets the interval"),
  Setting("ckpt_steps", "--config.checkpoint.every={}"),
  Setting(
    "keep_ckpt", "", "unused in the published code; --config.checkpoint.keep_last sets the number"
  ),
  Setting("keep_ckpt_steps", "--config.checkpoint.keep_every={}"),
  Setting("log_training_steps", "--config.log_every={}"),
  Setting("wandb.log_wandb", "", "--config.wandb_project=NAME turns it on"),
  Setting("wandb.project", "--config.wandb_project={}"),
  Setting("wandb.experiment", "WANDB_NAME={}", "an environment variable"),
  Setting("wandb.entity", "WANDB_ENTITY={}", "an environment variable"),
  Setting("wandb.wandb_offline", "WANDB_MODE=offline", "an environment variable"),
  Setting("wandb.resume", "", "a resumed run continues its W&B run"),
  Setting("wandb.debug_data", "", "unused in the published code"),
  Setting("wandb.*", "--config.wandb_project=NAME", "the rest are W&B's environment variables"),
  Setting("input.data.data_dir", "--config.input.data_dir={}"),
  Setting("input.data.split", "--config.input.split={}"),
  Setting("input.data.name", "", "--config.input.data_dir names the TFDS folder or the shards"),
  Setting("input.data.*", "--config.input.data_dir=PATH"),
  Setting("input.batch_size", "--config.batch_size={}"),
  Setting(
    "input.shuffle_buffer_size",
    "",
    "--config.input.shuffle=global shuffles exactly, without a buffer",
  ),
  Setting(
    "input.cach_raw", "", "records are read when needed; misspelt and off in the published code"
  ),
  Setting("input.txt_token_length", "--config.model.token_len={}", "use the argument token_len"),
  Setting("input.pp", "", "--config.input.fit, area_min and color_jitter set the preprocessing"),
  Setting("input.use_mixup", "", "unused in the published code"),
  Setting("input.mixup.*", "", "unused in the published code"),
  Setting("input.cutmix.*", "", "unused in the published code"),
  Setting("input.switch_prob", "", "unused in the published code"),
  Setting("pp_modules", "", _FIXED),
  Setting("init_shapes", "", "follow from image_size and token_len"),
  Setting("init_types", "", "follow from the model"),
  Setting("sharding.meshshape.data_parallelism", "--config.mesh.data={}"),
  Setting("sharding.meshshape.fsdp_parallelism", "--config.mesh.fsdp={}"),
  Setting("sharding.meshshape.tensor_parallelism", "--config.mesh.tensor={}"),
  Setting("sharding.*", "", "the axes are data, fsdp and tensor, with the published rules"),
  Setting("lr", "--config.optimizer.learning_rate={}"),
  Setting("wd", "--config.optimizer.weight_decay={}"),
  Setting("wd_mults", "--config.optimizer.decay_regex=REGEX"),
  Setting("lr_mults", "--config.optimizer.lr_multipliers={}"),
  Setting("lwd", "--config.optimizer.layer_decay={}", "without effect in the published code"),
  Setting(
    "schedule.*",
    "--config.optimizer.schedule.warmup_steps=STEPS",
    "also kind, min_multiplier; optimizer.frozen takes the place of (REGEX, None)",
  ),
  Setting("grad_clip_norm", "--config.optimizer.grad_clip_norm={}"),
  Setting("optax.mu_dtype", "--config.optimizer.mu_dtype={}"),
  Setting("optax.b1", "--config.optimizer.b1={}"),
  Setting("optax.b2", "--config.optimizer.b2={}"),
  Setting("optax.eps", "--config.optimizer.eps={}"),
  Setting("optax.*", "--config.optimizer.NAME=VALUE"),
  Setting("optax_name", "", "the optimizer is AdamW, the published scale_by_adam with decay"),
  Setting(
    "loss_type",
    "--config=apps/configs/openvision.py:loss=NAME",
    "an argument; one of openvision, clip, siglip, coca, cappa",
  ),
  Setting("clip_loss_weight", "--config.loss.clip={}"),
  Setting("coca_caption_loss_weight", "--config.loss.caption={}"),
  Setting("loss_use_global_batch", "", "contrastive losses always compare the global batch"),
  Setting(
    "local_loss", "", "--config.loss.form selects the implementation of the contrastive loss"
  ),
  Setting("mask_ratio", "", "unused in the published code; the argument mask_ratio drops patches"),
  Setting("cpu_unit8", "", "images always go to the device as uint8"),
  Setting("l", "", "unused in the published code"),
  Setting("m", "", "unused in the published code"),
  Setting("model_name", "", "//apps:clip_train or //apps:caption_train"),
  Setting(
    "model_load.*",
    "",
    "unused in the published code; --config.init_from.path starts from other parameters",
  ),
  Setting("model.image_model", "", _FIXED),
  Setting("model.text_model", "", _FIXED),
  Setting("model.text_decoder", "", _FIXED),
  Setting("model.image_model_name", "", _FIXED),
  Setting("model.text_decoder_name", "", _FIXED),
  Setting("model.image.variant", "--config.model.encoder={}"),
  Setting("model.text.variant", "--config.model.text={}", "without a patch size"),
  Setting("model.text_decoder_config.variant", "--config.model.decoder={}"),
  Setting("model.image.dtype", "--config.model.dtype={}", "one for all towers"),
  Setting("model.text.dtype", "--config.model.dtype={}", "one for all towers"),
  Setting("model.text_decoder_config.dtype", "--config.model.dtype={}", "one for all towers"),
  Setting("model.image.param_dtype", "", "parameters are always float32"),
  Setting("model.text.param_dtype", "", "parameters are always float32"),
  Setting("model.text_decoder_config.param_dtype", "", "parameters are always float32"),
  Setting("model.image.remat_policy", "--config.model.remat={}", "one for all towers"),
  Setting("model.text.remat_policy", "--config.model.remat={}", "one for all towers"),
  Setting(
    "model.text_decoder_config.remat_policy", "--config.model.remat={}", "one for all towers"
  ),
  Setting(
    "model.image.use_flash_attn",
    "",
    "--config.model.attention is xla, cudnn or tpu, for all towers",
  ),
  Setting(
    "model.text.use_flash_attn", "", "--config.model.attention is xla, cudnn or tpu, for all towers"
  ),
  Setting(
    "model.text_decoder_config.use_flash_attn",
    "",
    "--config.model.attention is xla, cudnn or tpu, for all towers",
  ),
  Setting("model.image.mask_ratio", "--config.model.encoder_options=\"{{'mask_ratio': {}}}\""),
  Setting(
    "model.image.posemb",
    "--config.model.encoder_options=\"{{'position': 'sincos2d'}}\"",
    "or 'learned'",
  ),
  Setting(
    "model.image.pool_type",
    "--config.model.encoder_options=\"{{'pool': '{}'}}\"",
    "gap, tok or map",
  ),
  Setting("model.image.width", "--config.model.encoder_options=\"{{'width': {}}}\""),
  Setting("model.image.depth", "--config.model.encoder_options=\"{{'depth': {}}}\""),
  Setting("model.image.mlp_dim", "--config.model.encoder_options=\"{{'mlp_dim': {}}}\""),
  Setting("model.image.num_heads", "--config.model.encoder_options=\"{{'num_heads': {}}}\""),
  Setting(
    "model.image.*",
    "",
    "the image tower computes as published; --config.model.encoder_options has its fields",
  ),
  Setting(
    "model.text.pool_type",
    "--config.model.text_options=\"{{'pool': '{}'}}\"",
    "the published code ignores it and takes the last token",
  ),
  Setting("model.text.vocab_size", "--config.model.vocab_size={}", "use the argument vocab_size"),
  Setting(
    "model.text.casual_mask",
    "--config.model.text_options=\"{{'mask': 'causal'}}\"",
    "or 'none'",
  ),
  Setting(
    "model.text.*",
    "",
    "the text tower computes as published; --config.model.text_options has its fields",
  ),
  Setting(
    "model.text_decoder_config.num_classes",
    "--config.model.vocab_size={}",
    "use the argument vocab_size",
  ),
  Setting(
    "model.text_decoder_config.num_learnable_tokens",
    "--config.model.caption_len={}",
    "use the argument output_token_len",
  ),
  Setting(
    "model.text_decoder_config.*",
    "",
    "the decoder computes as published; --config.model.decoder_options has its fields",
  ),
  Setting("model.temperature_init", "--config.model.scale_init={}"),
  Setting("model.out_dim", "--config.model.embed_dim={}", "one number for both towers"),
  Setting(
    "evals.disclf.data_dir",
    "--config.eval.zero_shot.dir={} --config.eval.zero_shot.classes=imagenet "
    "--config.eval.zero_shot.templates=openvision_81",
  ),
  Setting("evals.disclf.split", "--config.eval.zero_shot.split={}"),
  Setting("evals.disclf.dataset_names", "--config.eval.zero_shot.classes=imagenet"),
  Setting("evals.disclf.log_steps", "--config.eval.every={}", "one for all evaluations"),
  Setting("evals.disclf.pp_img", "", _PIXELS),
  Setting("evals.disclf.canonicalize", "", "prompts are always canonical"),
  Setting("evals.disclf.*", "", "--config.eval.zero_shot has dir, split, classes and templates"),
  Setting("evals.retrieval.data_dir", "--config.eval.retrieval.dir={}"),
  Setting("evals.retrieval.split", "--config.eval.retrieval.split={}"),
  Setting(
    "evals.retrieval.txt_name",
    "--config.eval.retrieval.caption_keys=\"('captions/text',)\"",
  ),
  Setting("evals.retrieval.log_steps", "--config.eval.every={}", "one for all evaluations"),
  Setting("evals.retrieval.pp_img", "", _PIXELS),
  Setting("evals.retrieval.*", "", "--config.eval.retrieval has dir, split and caption_keys"),
  Setting("evals.retrieval_flikr.data_dir", "--config.eval.retrieval.dir={}", _FLICKR),
  Setting("evals.retrieval_flikr.split", "--config.eval.retrieval.split={}", _FLICKR),
  Setting(
    "evals.retrieval_flikr.txt_name",
    "--config.eval.retrieval.caption_keys=\"('captions',)\"",
    _FLICKR,
  ),
  Setting("evals.retrieval_flikr.log_steps", "--config.eval.every={}", "one for all evaluations"),
  Setting("evals.retrieval_flikr.*", "", _FLICKR),
  Setting("evals.*", "", "--config.eval has zero_shot, retrieval and features"),
  Setting("hf_upload.repo_name", "//apps:export -- --push_to_hub={}"),
  Setting("hf_upload.save_directory", "//apps:export -- --out={}"),
  Setting("hf_upload.token", "HF_TOKEN", "an environment variable; no configuration holds a token"),
  Setting("hf_upload.*", "", "//apps:export writes the model card, config and tokenizer itself"),
)

FLAGS = (
  Setting(
    "--config=src/configs/openvision.py:ARGUMENTS", "--config=apps/configs/openvision.py:ARGUMENTS"
  ),
  Setting(
    "--config=src/configs/openvision2.py:ARGUMENTS",
    "--config=apps/configs/openvision2.py:ARGUMENTS",
  ),
  Setting("--workdir=PATH", "--workdir=PATH"),
  Setting("--cleanup", "", "a run never deletes its workdir"),
  Setting("--disable_gpu", "", "TensorFlow reads files here and uses no accelerator"),
)


def arguments(family: str, kind: str) -> dict[str, str]:
  """Return the arguments that a recipe supports in one way.

  Args:
    family: one of FAMILIES.
    kind: "renamed", "ignored" or "refused".

  Returns:
    Name in the released code -> new name, reason or remedy.
  """
  taken = {row.name: getattr(row, family).partition(": ") for row in ARGUMENTS}
  return {name: text for name, (how, _, text) in taken.items() if how == kind}


def names(family: str) -> dict[str, Any]:
  """Return the keyword arguments of `parse_arguments` for the names of the released code."""
  kinds = {"aliases": "renamed", "ignored": "ignored", "refused": "refused"}
  found = {keyword: arguments(family, kind) for keyword, kind in kinds.items()}
  return {**found, "values": {"remat": REMAT}}


def find_setting(name: str) -> Setting | None:
  """Return the row of a leaf of the released code such as "wandb.project", or None."""
  rows = {row.name: row for row in SETTINGS}
  parts = name.split(".")
  whole = [".".join(parts[:n]) + ".*" for n in range(len(parts), 0, -1)]
  return next((rows[key] for key in (name, *whole) if key in rows), None)


def explain_setting(name: str, value: str | None) -> str | None:
  """Return the replacement of a leaf of the released code, as part of a sentence.

  Args:
    name: name of the leaf, without "config.".
    value: value of the leaf, if given.

  Returns:
    The text; None if the released code has no such leaf.
  """
  row = find_setting(name)
  if row is None:
    return None
  if not row.here:
    return (
      f"--config.{name} of the published code has no counterpart here ({row.note}); leave it out"
    )
  value = REMAT.get(value or "", value) if name.endswith("remat_policy") else value
  note = f" ({row.note})" if row.note else ""
  return f"--config.{name} is called {row.here.format(value or 'VALUE')} here{note}"


def tables() -> Mapping[str, str]:
  """Return the tables of README.md in Markdown: "arguments", "flags" and "settings"."""

  def taken(text: str) -> str:
    how, _, rest = text.partition(": ")
    return {"same": f"yes{rest and ': '}{rest}", "renamed": f"yes, as `{rest}`"}.get(how, text)

  def here(row: Setting) -> str:
    return f"`{row.here.format('X')}`" if row.here else "none"

  def table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])

  settings = [f"| `config.{row.name}` | {here(row)} | {row.note} |" for row in SETTINGS]
  flags = [f"| `{row.name}` | {here(row)} | {row.note} |" for row in FLAGS]
  names = [f"| `{a.name}` | {taken(a.openvision)} | {taken(a.openvision2)} |" for a in ARGUMENTS]
  return {
    "arguments": table("| Published argument | openvision.py | openvision2.py |", names),
    "flags": table("| Published flag | Here | |", flags),
    "settings": table("| Published setting | Here | |", settings),
  }


if __name__ == "__main__":
  print("\n\n".join(tables().values()))
