"""Format "onnx": graphs of the image and the text tower for onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from apps.exporter.source import Source
  from ov_convert.accuracy import Accuracy
  from ov_convert.release import Release


def check(release: "Release") -> None:
  """Raise ValueError if the graphs cannot hold a model."""
  from ov_convert import onnx_export

  onnx_export.check(release)


def write(
  folder: Path, release: "Release", *, opset: int | None = None, **rest: float | str | None
) -> None:
  """Write float32 graphs with their preprocessing and tokenizer; `rest` are options of `finish`."""
  del rest
  from ov_convert import onnx_export

  onnx_export.write(folder, release, opset=_opset(opset))


def finish(
  folder: Path,
  source: "Source",
  probe: Callable[[], Path],
  *,
  weights: str | None = None,
  min_cosine: float | None = None,
  min_agreement: float | None = None,
  **rest: int | None,
) -> "Accuracy | None":
  """Convert the weights of the graphs, unless they stay float32; `rest` are options of `write`."""
  del source, rest
  from ov_convert import onnx_weights

  weights = weights_of(weights)
  if weights == onnx_weights.WEIGHTS[0]:
    return None
  return onnx_weights.convert(
    folder, weights, probe(),
    min_cosine=min_cosine_of(min_cosine), min_agreement=min_agreement_of(min_agreement),
  )  # fmt: skip


def weights_of(value: str | None) -> str:
  """Return the type of the weights; raise ValueError if it is unknown."""
  from ov_convert import onnx_weights

  weights = onnx_weights.WEIGHTS[0] if value is None else value
  onnx_weights.check_weights(weights)
  return weights


def min_cosine_of(value: float | None) -> float:
  """Return the smallest accepted cosine; raise ValueError if it is none."""
  from ov_convert import onnx_weights

  bound = onnx_weights.DEFAULT_MIN_COSINE if value is None else value
  onnx_weights.check_min_cosine(bound)
  return bound


def min_agreement_of(value: float | None) -> float:
  """Return the smallest accepted zero-shot agreement; raise ValueError if it is no fraction."""
  from ov_convert import onnx_weights

  bound = 0.0 if value is None else value
  onnx_weights.check_min_agreement(bound)
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
  check=check,
  write=write,
  client="run_onnx.py",
  finish=finish,
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
      weights_of,
      str,
    ),
    form.Option(
      "min_cosine",
      "With --onnx_weights: smallest accepted cosine of embeddings to those in float32; "
      "0.98 by default.",
      min_cosine_of,
      float,
      requires="weights",
    ),
    form.Option(
      "min_agreement",
      "With --onnx_weights: smallest accepted fraction of images whose zero-shot class is that in "
      "float32; 0 by default.",
      min_agreement_of,
      float,
      requires="weights",
    ),
  ),
)
