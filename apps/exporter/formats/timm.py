"""Format "timm": the image tower for timm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.release import Imported, Release


def _check(release: "Release") -> None:
  from ov_convert import timm_vit

  timm_vit.check(release)


def _write(folder: Path, release: "Release") -> None:
  from ov_convert import timm_vit

  timm_vit.write(folder, release)


def _read(folder: Path, options: form.ReadOptions) -> "Imported":
  from ov_convert import timm_vit

  return timm_vit.read(folder, options.python)


def _notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  return ("timm 1.0.16 to 1.0.25 also load the folder, with torch 2.15.",)


_PROGRAM = """\
import numpy as np
from PIL import Image
import timm
import torch


{{ read_picture() }}

model = timm.create_model("local-dir:{{ folder }}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
pixels = transform(read_picture("{{ photo }}"))[None]

with torch.inference_mode():
  tokens = model.forward_features(pixels)  # [1, tokens, width], [CLS] and registers first
  pooled = model.forward_head(tokens, pre_logits=True)  # [1, width]
print(tokens.shape, pooled.shape)
{% if text %}

with torch.inference_mode():  # embedding in the shared image-text space
  embedding = torch.nn.functional.normalize(model.forward_head(tokens), dim=-1)
print(embedding.shape)
{% endif %}
"""

FORMAT = form.ExportFormat(
  name="timm",
  title="timm",
  library="timm",
  read=_read,
  check=_check,
  write=_write,
  client="run_timm.py",
  offers=(*form.PIXELS, *form.IMAGE),
  programs=(form.Program("Image features", "timm", "timm torch numpy pillow", _PROGRAM),),
  # `local-dir:` was added in 1.0.16. Before 1.0.26 timm relies on torch to read safetensors, which
  # torch 2.6 does not support.
  tested={"timm": form.Versions("1.0.26", "1.0.31")},
  texts=False,
  preprocesses=True,
  sizes=form.interpolating(
    "timm raises an error, or interpolates the position table if configured to"
  ),
  notes=_notes,
)
