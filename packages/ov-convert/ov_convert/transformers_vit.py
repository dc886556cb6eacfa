"""transformers format: image towers, and models with one, for the Auto classes.

  model = AutoModel.from_pretrained(folder)           # .pooler_output, .hidden_states[-2]
  processor = AutoImageProcessor.from_pretrained(folder)
  tokenizer = AutoTokenizer.from_pretrained(f"{folder}/text")

pool="gap" becomes a BeitModel without relative positions and layer scales: `pooler_output` is our
pooled vector, `last_hidden_state` holds the tokens before any norm. The blocks of ViTModel are the
same, but it pools only the cls token. pool="tok" becomes a ViTModel with an identity pooler. A
model with a text tower becomes a ForImageClassification class, whose `logits` are the unnormalised
embedding; AutoModel loads its tower. The text tower is stored in text/ (see transformers_text).
Decoders are not supported.

Dimensions: B batch, T tokens, D width, F mlp, P patch, E embed, L layers.
"""

from collections.abc import Iterator
import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np

from ov_convert import (
  fields,
  reading,
  transformers_families,
  transformers_forms,
  transformers_text,
  vision,
)
from ov_convert.families.family import Family
from ov_convert.name_map import (
  CONV,
  LEAD_1,
  LEAD_1_1,
  SAME,
  TRANSPOSE,
  Dropped,
  Entry,
  Fixed,
  NameMap,
  Params,
)
from ov_convert.release import Config, Imported, Release, encoder_of, option_problems
from ov_convert.transformers_text import CONFIG_FILE, WEIGHTS_FILE
from ov_convert.writing import write_json, write_weights
import ov_models

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR_FILE = "preprocessor_config.json"
TEXT_FOLDER = "text"
# By our pool: model_type, which is also the prefix of the tower in other classes, and class prefix.
KINDS = {"gap": ("beit", "Beit"), "tok": ("vit", "ViT")}

# theirs (below the layer), ours (below the blocks), transform
_BLOCK_MAP = (
  *(
    (f"attention.attention.{name}.{a}", f"attn/{name}/{b}", transform)
    for name in ("query", "key", "value")
    for a, b, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", SAME))
  ),
  *(
    (f"{theirs}.{a}", f"{ours}/{b}", transform)
    for theirs, ours in (
      ("attention.output.dense", "attn/out"),
      ("intermediate.dense", "mlp/up"),
      ("output.dense", "mlp/down"),
    )
    for a, b, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", SAME))
  ),
  *(
    (f"{theirs}.{a}", f"{ours}/{b}", SAME)
    for theirs, ours in (("layernorm_before", "norm1"), ("layernorm_after", "norm2"))
    for a, b in (("weight", "scale"), ("bias", "bias"))
  ),
)
_POSITIONS = "embeddings.position_embeddings"
_KEY_BIAS = "blocks/attn/key/bias"


def check(release: Release) -> None:
  """Raise ValueError listing all fields for which `transformers` has no class."""
  if _family(release) is not None:
    return
  if found := option_problems(release.config):
    nearest = transformers_families.nearest_problems(release.config)
    raise ValueError(f"transformers has no class for {', '.join(found)}: {nearest}.")
  pool, text = release.encoder.pool, release.text
  problems = []
  if pool not in KINDS:
    problems.append(f"encoder.pool={pool!r} (supported: gap and tok)")
  if text is not None:
    problems += transformers_text.problems(text)
    if release.words is None:
      problems.append("words=None (the text tower requires its tokenizer)")
  if problems:
    raise ValueError("transformers has no class for this model:\n  " + "\n  ".join(problems))


def _family(release: Release) -> Family | None:
  """Return the family that represents a model with options; None for the classes of this module."""
  if not option_problems(release.config):
    return None
  return transformers_families.of_config(release.config)


def write(folder: pathlib.Path, release: Release) -> None:
  """Write config.json, model.safetensors, preprocessor_config.json, and text/ for a text tower.

  Models of a family with its own class are written as such, see `transformers_families`.

  Raises:
    ValueError: see `check`; also if the parameters do not match the config.
  """
  check(release)
  if (family := _family(release)) is not None:
    transformers_families.write(folder, release, family)
    write_json(folder / PREPROCESSOR_FILE, transformers_forms.preprocessor(release.preprocess))
    return
  names = name_map(release.config)
  flat = names.to_theirs(release.params, release.config)
  folder.mkdir(parents=True, exist_ok=True)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, names.fixed)
  write_json(folder / CONFIG_FILE, image_config(release))
  write_json(folder / PREPROCESSOR_FILE, transformers_forms.preprocessor(release.preprocess))
  if release.text is not None:
    transformers_text.write(folder / TEXT_FOLDER, release)


def read(folder: str | os.PathLike[str], python: str | os.PathLike[str] | None = None) -> Imported:
  """Read a folder written by `write`, a compatible ViT or BEiT, or a family with a separate class.

  Args:
    folder: directory with config.json and weights as *.safetensors or *.bin.
    python: interpreter with PyTorch for *.bin; see `reading.read_tensors`.

  Returns:
    The image tower, or two towers if text/ exists. Notes list what was changed or omitted.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if the architecture is incompatible or tensors do not match, listing all differing
      fields or tensors; or if a file is damaged.
  """
  root = pathlib.Path(folder)
  content = reading.read_json(root / CONFIG_FILE)
  if (family := transformers_families.of_content(content)) is not None:
    return transformers_families.read(root, content, family, python)
  vit = transformers_forms.vit_config(content)
  given = reading.read_tensors(root, WEIGHTS_FILES, python)
  sizes = {"hidden_size": vit.width, "intermediate_size": vit.mlp_dim}
  fields.check_against_weights(given, vit.depth, sizes, str(root / CONFIG_FILE))
  flat, notes = transformers_forms.canonical(given, content, vit)
  table = flat.get(_POSITIONS)
  if table is not None and table.ndim == 3:
    position = vision.kind_of_positions(table[0], vit.image_size, vit.patch_size)
    vit = dataclasses.replace(vit, position=position)
  preprocess = None
  if (root / PREPROCESSOR_FILE).exists():
    settings = reading.read_json(root / PREPROCESSOR_FILE)
    preprocess, more = transformers_forms.preprocess_from(settings, vit.image_size)
    notes += more
  if (root / TEXT_FOLDER).is_dir() and "openvision" in content:
    text = transformers_text.read(root / TEXT_FOLDER, python)
    joint, params = _joint(content["openvision"], vit, flat, text)
    return Imported(joint, params, preprocess, text.words, tuple(notes))
  if classes := [name for name in flat if name.startswith("classifier.")]:
    notes.append(f"{', '.join(classes)} not imported: it is a classifier, not a part of the tower")
  flat = {name: tensor for name, tensor in flat.items() if name not in classes}
  params = _with_key_bias(name_map(vit).to_ours(flat, vit), vit)
  ov_models.bind(vit, params)
  return Imported(vit, params, preprocess, None, tuple(notes))


def _joint(
  about: Any,
  vit: ov_models.ViTConfig,
  flat: dict[str, np.ndarray],
  text: transformers_text.TextTower,
) -> tuple[ov_models.VisionLanguageConfig, Params]:
  """Return a model of an image tower in `canonical` form and the text tower of text/."""
  given = about if isinstance(about, dict) else {}
  scale: Any = given.get("logit_scale")
  bias: Any = given.get("logit_bias", "")
  if not (fields.is_number(scale) and scale > 0 and (bias is None or fields.is_number(bias))):
    raise ValueError(
      f"config.json has openvision={fields.shown(about)}; expected logit_scale above 0, and "
      "logit_bias, a number or null."
    )
  bias = None if bias is None else float(bias)
  log_scale = math.log(scale)
  config = ov_models.VisionLanguageConfig(
    encoder=vit, text=text.config, decoder=None, embed_dim=text.embed_dim, bias_init=bias
  )
  prefix = f"{KINDS[vit.pool][0]}."
  named = {k if k.startswith("classifier.") else prefix + k: v for k, v in flat.items()}
  params = name_map(config).to_ours(named, config)
  params["encoder"] = _with_key_bias(params["encoder"], vit)
  params |= transformers_text.name_map(config).to_ours(text.flat, config)
  params["log_scale"] = np.float32(log_scale)
  if bias is not None:
    params["bias"] = np.float32(bias)
  ov_models.bind(config, params)
  return config, params


def _with_key_bias(encoder: Params, vit: ov_models.ViTConfig) -> Params:
  """Return the parameters of a tower, with zeros for those that `write` drops."""
  zeros = np.zeros((vit.depth, vit.width), np.float32)
  encoder["blocks"]["attn"]["key"].setdefault("bias", zeros)
  return encoder


def name_map(config: Config) -> NameMap:
  """Return the name map of the image tower, and of the head if there is a text tower.

  Names are those in files of versions 4.x and 5.x of the library.

  Args:
    config: configuration of a model with an image tower with pool "gap" or "tok".
  """
  vit = encoder_of(config)
  kind = KINDS[vit.pool][0]
  ours = "" if config is vit else "encoder/"
  pair = config if isinstance(config, ov_models.VisionLanguageConfig) else None
  with_head = pair is not None and pair.text is not None
  prefix = f"{kind}." if with_head else ""
  entries = list(_tower(vit, prefix, ours))
  fixed = [
    Fixed(
      f"{prefix}embeddings.patch_embeddings.projection.bias",
      np.zeros(vit.width, np.float32),
      "the patch embedding of OpenVision has no bias",
    )
  ]
  positions = vision.position(prefix + _POSITIONS, vit, ours, LEAD_1)
  if isinstance(positions, Entry):
    entries.append(positions)
  else:
    fixed.append(positions)
  if vit.pool == "tok":
    why = "the pooler returns the normed cls token"
    fixed.append(Fixed(f"{prefix}pooler.dense.weight", np.eye(vit.width, dtype=np.float32), why))
    fixed.append(Fixed(f"{prefix}pooler.dense.bias", np.zeros(vit.width, np.float32), why))
  if pair is not None and with_head:
    entries.append(Entry("classifier.weight", ("image_head/kernel",), TRANSPOSE))
    zeros = np.zeros(pair.embed_dim, np.float32)
    fixed.append(Fixed("classifier.bias", zeros, "the head of OpenVision has no bias"))
  return NameMap(
    "transformers", tuple(entries), tuple(fixed), tuple(_dropped(vit, ours, with_head))
  )


def _tower(vit: ov_models.ViTConfig, prefix: str, ours: str) -> Iterator[Entry]:
  norm = "pooler.layernorm" if vit.pool == "gap" else "layernorm"
  for a, b, transform in (
    ("embeddings.cls_token", "cls", LEAD_1_1),
    ("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", CONV),
    (f"{norm}.weight", "norm/scale", SAME),
    (f"{norm}.bias", "norm/bias", SAME),
  ):
    yield Entry(prefix + a, (ours + b,), transform)
  for layer in range(vit.depth):
    for a, b, transform in _BLOCK_MAP:
      if vit.pool == "tok" or f"blocks/{b}" != _KEY_BIAS:
        theirs = f"{prefix}encoder.layer.{layer}.{a}"
        yield Entry(theirs, (f"{ours}blocks/{b}",), transform, layer)


def _dropped(vit: ov_models.ViTConfig, ours: str, with_head: bool) -> Iterator[Dropped]:
  if vit.pool == "gap":
    why = "adds a constant to all scores of a query, which has no effect on the softmax"
    yield Dropped(ours + _KEY_BIAS, why)
  if ours:
    yield Dropped("decoder/", "the library has no class for the decoder")
  if with_head:
    yield Dropped("text/", "in the folder text")
    yield Dropped("text_head/kernel", "in the folder text")
    yield Dropped("log_scale", "in config.json, as logit_scale")
    yield Dropped("bias", "in config.json, as logit_bias")


def image_config(release: Release) -> dict[str, Any]:
  """Return the content of config.json of the image tower."""
  vit = release.encoder
  kind, name = KINDS[vit.pool]
  with_head = release.text is not None
  content: dict[str, Any] = {
    "architectures": [f"{name}ForImageClassification" if with_head else f"{name}Model"],
    "model_type": kind,
    "hidden_size": vit.width,
    "num_hidden_layers": vit.depth,
    "num_attention_heads": vit.num_heads,
    "intermediate_size": vit.mlp_dim,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": vit.image_size,
    "patch_size": vit.patch_size,
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "dtype": release.dtype,
  }
  if kind == "beit":
    content |= {
      "use_mean_pooling": True,
      "use_absolute_position_embeddings": True,
      "use_relative_position_bias": False,
      "use_shared_relative_position_bias": False,
      "use_mask_token": False,
      "layer_scale_init_value": 0.0,
      "drop_path_rate": 0.0,
    }
  else:
    content |= {"qkv_bias": True, "pooler_act": "linear", "pooler_output_size": vit.width}
  if with_head:
    scale = math.exp(float(release.params["log_scale"]))
    bias = float(release.params["bias"]) if "bias" in release.params else None
    content["num_labels"] = release.params["image_head"]["kernel"].shape[1]
    content["openvision"] = {"logit_scale": scale, "logit_bias": bias}
  return content
