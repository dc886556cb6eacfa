"""The formats of //apps:export. A new format is a module in this folder and a line in `FORMATS`."""

from apps.exporter.formats import (
  onnx,
  open_clip,
  openvision_jax,
  safetensors,
  stablehlo,
  timm,
  transformers,
  web,
)
from apps.exporter.formats.format import ExportFormat, Format

FORMATS: tuple[Format, ...] = (
  openvision_jax.FORMAT,
  safetensors.FORMAT,
  open_clip.FORMAT,
  timm.FORMAT,
  transformers.FORMAT,
  onnx.FORMAT,
  web.FORMAT,
  stablehlo.FORMAT,
)
EXPORTS = {f.name: f for f in FORMATS if isinstance(f, ExportFormat)}
IMPORTS = {f.name: f for f in FORMATS if f.read is not None}
