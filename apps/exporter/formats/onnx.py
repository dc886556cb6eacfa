"""Format "onnx": graphs of the image and the text tower for onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.accuracy import Accuracy
  from ov_convert.release import Release


def _check(release: "Release") -> None:
  from ov_convert import onnx_export

  onnx_export.check(release)


def _write(
  folder: Path, release: "Release", *, opset: int | None = None, **finish: float | str | None
) -> None:
  del finish  # options of `_finish`
  from ov_convert import onnx_export

  onnx_export.write(folder, release, opset=_opset(opset))


def _finish(
  folder: Path,
  probe: Callable[[], Path],
  *,
  weights: str | None = None,
  min_cosine: float | None = None,
  **write: int | None,
) -> "Accuracy | None":
  """Convert the weights of the graphs, unless they stay float32."""
  del write  # options of `_write`
  from ov_convert import onnx_weights

  weights = _weights(weights)
  if weights == onnx_weights.WEIGHTS[0]:
    return None
  return onnx_weights.convert(folder, weights, probe(), min_cosine=_min_cosine(min_cosine))


def _weights(value: str | None) -> str:
  from ov_convert import onnx_weights

  weights = onnx_weights.WEIGHTS[0] if value is None else value
  onnx_weights.check_weights(weights)
  return weights


def _min_cosine(value: float | None) -> float:
  from ov_convert import onnx_weights

  bound = onnx_weights.DEFAULT_MIN_COSINE if value is None else value
  onnx_weights.check_min_cosine(bound)
  return bound


def _opset(value: int | None) -> int:
  from ov_convert import onnx_export

  opset = onnx_export.DEFAULT_OPSET if value is None else value
  onnx_export.check_opset(opset)
  return opset


def _notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  notes = []
  if opset := facts.get("opset"):
    notes.append(f"The graphs use version {opset} of the ONNX operators (opset).")
  if weights := _SMALLER.get(facts.get("weights", "")):
    notes.append(f"{weights} The graphs compute in float32 otherwise.")
  return notes


_REST = "and the other large tensors are float16."
_SMALLER = {
  "float16": "The large tensors are float16.",
  "int8": (
    "The matrices of the layers have 8 bits per weight and are multiplied in int8 (dynamic "
    f"quantization), {_REST}"
  ),
  "int4": f"The matrices of the layers have 4 bits per weight in blocks of 32, {_REST}",
}


_PROGRAM = """\
{% if texts %}
import json

{% endif %}
import numpy as np
import onnxruntime
from PIL import Image
{% if texts %}
import tokenizers
{% endif %}


{{ read_picture() }}

folder = "{{ folder }}"
{{ normalised() -}}
pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # [1, 3, {{ size }}, {{ size }}]

image_tower = onnxruntime.InferenceSession(f"{folder}/image.onnx")
names = [output.name for output in image_tower.get_outputs()]
image = dict(zip(names, image_tower.run(names, {"pixel_values": pixels})))
print({name: array.shape for name, array in image.items()})
{% if texts %}

{{ tokenizer() -}}
{{ token_ids("np.int64") }}
text_tower = onnxruntime.InferenceSession(f"{folder}/text.onnx")
(text,) = text_tower.run(["text_embedding"], {"input_ids": ids})
with open(f"{folder}/preprocessor.json") as file:
  joint = json.load(file)
similarity = joint["logit_scale"] * image["embedding"] @ text.T
{{ numpy_probabilities('joint["logit_bias"]') -}}
{% endif %}
"""

FORMAT = form.ExportFormat(
  name="onnx",
  title="ONNX",
  library="onnx",
  check=_check,
  write=_write,
  client="run_onnx.py",
  finish=_finish,
  offers=(*form.IMAGE, *form.TEXT),
  programs=(
    form.Program(
      "{{ purpose }}", "onnx", "onnxruntime numpy pillow" + form.TOKENIZERS_FOR_TEXTS, _PROGRAM
    ),
  ),
  # onnxruntime before 1.19 does not support numpy 2.
  tested={"onnxruntime": form.Versions("1.19.0", "1.32.0")},
  sizes=form.fixed_size,
  notes=_notes,
  options=(
    form.Option(
      "opset",
      "With --format=onnx: version of the ONNX operators, 18 to 23; 18 by default.",
      _opset,
    ),
    form.Option(
      "weights",
      "With --format=onnx: type of the weights, float32 (default), float16, int8 or int4.",
      _weights,
      str,
    ),
    form.Option(
      "min_cosine",
      "With --onnx_weights: smallest accepted cosine of embeddings to those in float32; "
      "0.98 by default.",
      _min_cosine,
      float,
    ),
  ),
)
