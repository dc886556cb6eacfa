"""Format "safetensors": complete models for ov_models, with a single-file PyTorch module."""

from pathlib import Path
from typing import TYPE_CHECKING

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from apps.exporter.source import Source
  from ov_convert.parity import Row
  from ov_convert.release import Imported, Release


def _check(release: "Release") -> None:
  from ov_convert import torch_module

  torch_module.check(release)


def _write(folder: Path, release: "Release") -> None:
  from ov_convert import torch_module

  torch_module.write(folder, release)


def _read(folder: Path, options: form.ReadOptions) -> "Imported":
  from ov_convert import torch_module

  return torch_module.read(folder)


def _complete(folder: Path, source: "Source") -> "list[Row]":
  add_tokenizer(folder, source)
  return compare_loaded(folder, source.release)


def add_tokenizer(folder: Path, source: "Source") -> None:
  """Write the tokenizer in the format of ov_data."""
  if source.processor is not None:
    source.processor.save(folder / "tokenizer")
  elif source.tokenizer is not None:
    source.tokenizer.save(folder / "tokenizer")


def compare_loaded(folder: Path, release: "Release") -> "list[Row]":
  """Return a row that states whether `ov_models.load` returns bitwise equal parameters."""
  import numpy as np

  from ov_convert.name_map import flatten
  from ov_convert.parity import Row
  import ov_models

  config, params = ov_models.load(folder)
  problem = "" if config == release.config else f"config.json has {config}"
  want, have = flatten(release.params), flatten(params)
  unequal = [n for n in want if n not in have or not np.array_equal(want[n], have[n])]
  if unequal:
    problem = problem or f"{len(unequal)} tensors differ, for example {unequal[0]}"
  return [Row("ov_models.load", float(len(unequal)), None, 0.0, 0.0, problem)]


def _sizes(release: "Release") -> str:
  if release.encoder.position == "learned":
    return form.fixed_size(release)
  side = release.encoder.image_size
  return f"The programs read images of {side} x {side} pixels; the models take any size."


_PROGRAM = """\
import jax
import numpy as np
import ov_data
import ov_models

folder = "{{ folder }}"
config, params = ov_models.load(folder)
model = ov_models.bind(config, params)

with open("{{ photo }}", "rb") as file:
  picture = ov_data.decode.whole(file.read(), {{ size }}, "{{ pre.fit }}"
{%- if pre.interpolation != "bilinear" %}, interpolation="{{ pre.interpolation }}"{% endif %})
mean, std = np.float32({{ pre.mean | numbers }}), np.float32({{ pre.std | numbers }})
pixels = (picture[None] / np.float32(255) - mean) / std  # [1, {{ size }}, {{ size }}, 3]
{% if texts %}
image = jax.jit(lambda pixels: model.encode_image(pixels))(pixels)
{% elif kind == "VisionLanguage" %}
image = jax.jit(lambda pixels: model.encoder(pixels))(pixels)
{% else %}
image = jax.jit(lambda pixels: model(pixels))(pixels)
{% endif %}
print(image.pooled.shape, image.tokens.shape)
{% if texts %}

texts = ov_data.TextProcessor.load(f"{folder}/tokenizer")
ids = texts.encode({{ prompts }})
text = jax.jit(lambda ids: model.encode_text(ids))(ids)
similarity = np.exp(params["log_scale"]) * image.unit @ text.unit.T
{% if sigmoid %}
print(jax.nn.sigmoid(similarity + params["bias"]))
{% else %}
print(jax.nn.softmax(similarity))
{% endif %}
{% endif %}
{% if captions %}

words = ov_data.Tokenizer.load(f"{folder}/tokenizer")
captions = ov_models.generate(
  model, pixels, max_len={{ max_len }},
  bos_id=words.bos_id, eos_id=words.eos_id, pad_id=words.pad_id,
)
print(words.decode_batch(captions.ids))
{% endif %}
"""

_TORCH = """\
import sys

import numpy as np
from PIL import Image
{% if texts or captions %}
import tokenizers
{% endif %}
import torch


{{ read_picture() }}

folder = "{{ folder }}"
sys.path.insert(0, folder)
from openvision_torch import OpenVision  # the file in this folder

model = OpenVision.from_folder(folder)
{{ normalised() -}}
pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [1, 3, {{ size }}, {{ size }}]
with torch.inference_mode():
  image = model.encode_image(pixels)
print(image.pooled.shape, image.tokens.shape)
{% if texts or captions %}

{{ tokenizer() -}}
{% endif %}
{% if texts %}
{{ token_ids("np.int64") -}}
with torch.inference_mode():
  text = model.encode_text(torch.from_numpy(ids))
  logits = model.logits(image.embedding, text.embedding)
print(logits.{{ "sigmoid()" if sigmoid else "softmax(dim=-1)" }})
{% endif %}
{% if captions %}
with torch.inference_mode():
  captions = model.generate(
    pixels, max_len={{ max_len }},
    bos_id={{ words.bos_id }}, eos_id={{ words.eos_id }}, pad_id={{ words.pad_id }},
  ).tolist()
{{ print_captions() -}}
{% endif %}
"""

FORMAT = form.ExportFormat(
  name="safetensors",
  title="ov-models and PyTorch",
  library="openvision",
  read=_read,
  check=_check,
  write=_write,
  client="run_torch.py",
  offers=(*form.IMAGE, *form.TEXT, *form.CAPTIONS),
  complete=_complete,
  programs=(
    form.Program(form.PURPOSES, "safetensors", "packages/ov-models packages/ov-data", _PROGRAM),
    form.Program("In PyTorch", "torch", "torch safetensors numpy pillow" + form.TOKENIZERS, _TORCH),
  ),
  decoder="any",
  sizes=_sizes,
)
