"""Format "open_clip": image and text tower for open_clip."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.release import Imported, Release


def _check(release: "Release") -> None:
  from ov_convert import open_clip

  open_clip.check(release)


def _write(folder: Path, release: "Release") -> None:
  from ov_convert import open_clip

  open_clip.write(folder, release)


def _read(folder: Path, options: form.ReadOptions) -> "Imported":
  from ov_convert import open_clip

  return open_clip.read(folder, options.python)


def _notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  if release.text is None:
    return (
      "open_clip requires a text tower. The one here is a dummy: it has one word and zero weights; "
      "use only encode_image and visual.",
    )
  repairs = (
    "open_clip cleans texts before tokenization: texts with typographic quotes, control characters "
    "or HTML entities get different ids than in training."
  )
  if release.text.padding != "mask":
    return (repairs,)
  return (
    "Texts are padded with [eos] instead of padding tokens, so that open_clip masks the positions "
    "after a text. Embeddings are the same as in training.",
    repairs,
  )


_PROGRAM = """\
import numpy as np
import open_clip
from PIL import Image
import torch


{{ read_picture() }}

folder = "{{ folder }}"
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
model.eval()
pixels = preprocess(read_picture("{{ photo }}"))[None]
{% if texts %}
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
texts = tokenizer({{ prompts }})

with torch.inference_mode():
  image = model.encode_image(pixels, normalize=True)
  text = model.encode_text(texts, normalize=True)
  similarity = model.logit_scale.exp() * image @ text.T
{% if sigmoid %}
print((similarity + model.logit_bias).sigmoid())
{% else %}
print(similarity.softmax(dim=-1))
{% endif %}
{% else %}

with torch.inference_mode():
  pooled = model.encode_image(pixels)  # [1, width]
print(pooled.shape)
{% endif %}
"""

_PATCHES = """\
import numpy as np
import open_clip
from PIL import Image
import torch


{{ read_picture() }}

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{{ folder }}")
model.eval()
pixels = preprocess(read_picture("{{ photo }}"))[None]

with torch.inference_mode():
  out = model.visual.forward_intermediates(pixels, output_fmt="NLC")
layers = out["image_intermediates"]  # outputs of blocks, [1, patches, width], before the final norm
print(len(layers), layers[-1].shape)
"""

_INSTALL = (
  "open_clip_torch torch numpy pillow{{ ' transformers' if texts else '' }}"  # for the tokenizer
)

FORMAT = form.ExportFormat(
  name="open_clip",
  title="open_clip",
  library="open_clip",
  read=_read,
  check=_check,
  write=_write,
  client="run_open_clip.py",
  offers=(*form.PIXELS, *form.IMAGE, *form.IDS, *form.TEXT),
  programs=(
    form.Program("{{ purpose }}", "open_clip", _INSTALL, _PROGRAM),
    form.Program("Patch features", "open_clip", _INSTALL, _PATCHES),
  ),
  # `local-dir:` was added in 3.0.
  tested={"open_clip_torch": form.Versions("3.0.0", "3.3.0")},
  preprocesses=True,
  sizes=form.interpolating(
    "open_clip raises an error, or interpolates the position table if configured to"
  ),
  notes=_notes,
)
