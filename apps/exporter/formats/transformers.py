"""Format "transformers": image and text tower as two models for transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.release import Imported, Release


def _check(release: "Release") -> None:
  from ov_convert import transformers_vit

  transformers_vit.check(release)


def _write(folder: Path, release: "Release") -> None:
  from ov_convert import transformers_vit

  transformers_vit.write(folder, release)


def _read(folder: Path, options: form.ReadOptions) -> "Imported":
  from ov_convert import transformers_vit

  return transformers_vit.read(folder, options.python)


def _notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  from ov_convert.release import option_problems

  if release.encoder.pool != "gap" or option_problems(release.config):
    return ()
  return (
    "The class of the image tower is BEiT without relative positions and layer scales, which is "
    "equivalent to this tower, including the pooled vector.",
  )


_PROGRAM = """\
import numpy as np
from PIL import Image
import torch
from transformers import AutoImageProcessor, AutoModel


{{ read_picture() }}

folder = "{{ folder }}"
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
picture = read_picture("{{ photo }}")
pixels = processor(images=picture, return_tensors="pt").pixel_values

with torch.inference_mode():
  out = model(pixels, output_hidden_states=True)
pooled = out.pooler_output  # [1, width]
patches = out.hidden_states[-1][:, 1:]  # [1, patches, width], before the final norm
penultimate = out.hidden_states[-2][:, 1:]  # the layer used by multimodal models
print(pooled.shape, patches.shape, penultimate.shape)
"""

_FAMILY = """\
import numpy as np
from PIL import Image
import torch
from transformers import AutoImageProcessor, AutoModel


{{ read_picture() }}

folder = "{{ folder }}"
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
tower = getattr(model, "vision_model", model)
picture = read_picture("{{ photo }}")
pixels = processor(images=picture, return_tensors="pt").pixel_values

with torch.inference_mode():
  out = tower(pixels, output_hidden_states=True)
print(out.last_hidden_state.shape)  # [1, tokens, width], tokens of cls and registers first
if out.pooler_output is not None:
  print(out.pooler_output.shape)  # [1, width]
"""

_TEXTS = """\
{% set text_class = "SiglipTextModel" if text.pool == "last" else "CLIPTextModelWithProjection" %}
import numpy as np
from PIL import Image
import torch
from torch.nn.functional import normalize, pad
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers import AutoTokenizer, {{ text_class }}


{{ read_picture() }}

folder = "{{ folder }}"
full = {"dtype": torch.float32}  # for any dtype of the files
processor = AutoImageProcessor.from_pretrained(folder)
image_tower = AutoModelForImageClassification.from_pretrained(folder, **full).eval()
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/text")
text_tower = {{ text_class }}.from_pretrained(f"{folder}/text", **full).eval()

picture = read_picture("{{ photo }}")
pixels = processor(images=picture, return_tensors="pt").pixel_values
texts = tokenizer(
  {{ prompts }},
  padding="max_length", max_length={{ words.length - words.append_cls }}, truncation=True,
  return_tensors="pt",
)
{% if words.append_cls %}
# Append [CLS] after the padding, which the tokenizer cannot do.
ids = pad(texts.input_ids, (0, 1), value=tokenizer.cls_token_id)
mask = pad(texts.attention_mask, (0, 1), value=1)
{% else %}
ids, mask = texts.input_ids, texts.attention_mask
{% endif %}

with torch.inference_mode():
  image = normalize(image_tower(pixels).logits, dim=-1)
{% if text.padding == "mask" %}
  out = text_tower(ids, attention_mask=mask)
{% else %}
  out = text_tower(ids)  # without the mask: padding is attended to, as in training
{% endif %}
  text = normalize(out.{{ "pooler_output" if text.pool == "last" else "text_embeds" }}, dim=-1)
joint = AutoConfig.from_pretrained(folder).openvision
similarity = joint["logit_scale"] * image @ text.T
{% if sigmoid %}
print((similarity + joint["logit_bias"]).sigmoid())
{% else %}
print(similarity.softmax(dim=-1))
{% endif %}
"""

# Some versions of transformers from 5.4 on require torchvision to preprocess images.
_INSTALL = "transformers torch torchvision numpy pillow"

FORMAT = form.ExportFormat(
  name="transformers",
  title="transformers",
  library="transformers",
  read=_read,
  check=_check,
  write=_write,
  client="run_transformers.py",
  offers=(*form.PIXELS, *form.IMAGE, *form.IDS, *form.TEXT),
  programs=(
    form.Program("Image features", "transformers", _INSTALL, _PROGRAM, "plain"),
    form.Program("{{ purpose }}", "transformers", _INSTALL, _TEXTS, "plain_texts"),
    form.Program("Image features", "transformers", _INSTALL, _FAMILY, "family"),
  ),
  # In 4.56.0 to 4.57.1 the last hidden state is after the final norm; earlier versions lack
  # `dtype=`.
  tested={
    "transformers": form.Versions("4.57.2", "5.24.0"),
    "torchvision": form.Versions("0.21.0", "0.29.2"),
  },
  joint=False,
  preprocesses=True,
  sizes=form.interpolating("transformers interpolates the position table"),
  notes=_notes,
)
