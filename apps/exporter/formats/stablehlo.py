"""Format "stablehlo": a model as serialized functions for `jax.export` and XLA runtimes."""

from pathlib import Path
from typing import TYPE_CHECKING

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.release import Release


def _check(release: "Release") -> None:
  from ov_convert import stablehlo

  stablehlo.check(release)


def _write(folder: Path, release: "Release") -> None:
  from ov_convert import stablehlo

  stablehlo.write(folder, release)


_PROGRAM = """\
{% if texts %}
import json

{% endif %}
from jax import export
import numpy as np
from PIL import Image
from safetensors.flax import load_file
{% if texts or captions %}
import tokenizers
{% endif %}

folder = "{{ folder }}"
params = load_file(f"{folder}/model.safetensors")


{{ read_picture() }}

def load(name):
  with open(f"{folder}/{name}.stablehlo", "rb") as file:
    return export.deserialize(bytearray(file.read())).call


{{ normalised() -}}
image = load("image")(params, pixels)
print({name: array.shape for name, array in image.items()})
{% if texts or captions %}

{{ tokenizer() -}}
{% endif %}
{% if texts %}
{{ token_ids("np.int32") -}}
text = load("text")(params, ids)
with open(f"{folder}/export.json") as file:
  joint = json.load(file)
similarity = joint["logit_scale"] * np.asarray(image["embedding"] @ text["embedding"].T)
{{ numpy_probabilities('joint["logit_bias"]') -}}
{% endif %}
{% if captions %}
captions = load("caption")(params, pixels)["ids"].tolist()
{{ print_captions() -}}
{% endif %}
"""

FORMAT = form.ExportFormat(
  name="stablehlo",
  title="StableHLO",
  library=None,
  check=_check,
  write=_write,
  client="run_stablehlo.py",
  here=True,
  offers=(*form.IMAGE, *form.TEXT, *form.CAPTIONS),
  programs=(
    form.Program(
      form.PURPOSES,
      "stablehlo",
      "jax flatbuffers safetensors numpy pillow" + form.TOKENIZERS,
      _PROGRAM,
    ),
  ),
  # jax before 0.8.2 cannot load functions exported by jax 0.10.
  tested={
    "jax": form.Versions("0.8.2", "0.10.2"),
    "flatbuffers": form.Versions("23.5.26", "25.12.19"),
  },
  decoder="autoregressive",
  sizes=form.fixed_size,
)
