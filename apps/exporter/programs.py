"""The programs of `snippets` as templates, and which format shows which.

The values they are filled with are those of `snippets._values`. Braces are doubled for the template
and single for Python.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Program:
  """A snippet before it is filled in.

  Attributes:
    title, library, code: as of Snippet.
    install: names of what pip installs, separated by blanks.
    needs: the value without which it is left out; "" for none.
  """

  title: str
  library: str
  install: str
  code: str
  needs: str = ""


_OPEN_CLIP = """\
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

_OPEN_CLIP_PATCHES = """\
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
layers = out["image_intermediates"]  # of each block: [1, patches, width], before the final norm
print(len(layers), layers[-1].shape)
"""

_TIMM = """\
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
  tokens = model.forward_features(pixels)  # [1, 1 + patches, width], [CLS] first
  pooled = model.forward_head(tokens, pre_logits=True)  # [1, width]
print(tokens.shape, pooled.shape)
{% if text %}

with torch.inference_mode():  # in the space that pictures share with texts
  embedding = torch.nn.functional.normalize(model.forward_head(tokens), dim=-1)
print(embedding.shape)
{% endif %}
"""

_TRANSFORMERS = """\
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
penultimate = out.hidden_states[-2][:, 1:]  # the layer that multimodal models read
print(pooled.shape, patches.shape, penultimate.shape)
"""

_TRANSFORMERS_TEXT = """\
{% set text_class = "SiglipTextModel" if text.pool == "last" else "CLIPTextModelWithProjection" %}
import numpy as np
from PIL import Image
import torch
from torch.nn.functional import normalize, pad
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers import AutoTokenizer, {{ text_class }}


{{ read_picture() }}

folder = "{{ folder }}"
full = {"dtype": torch.float32}  # whatever the files hold
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
# [CLS] comes behind the padding, where the tokenizer itself cannot put it.
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
  out = text_tower(ids)  # without the mask: in training, padding was seen
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

_ONNX = """\
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

_STABLEHLO = """\
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

_SAFETENSORS = """\
import jax
import numpy as np
import ov_data
import ov_models

folder = "{{ folder }}"
config, params = ov_models.load(folder)
model = ov_models.bind(config, params)

with open("{{ photo }}", "rb") as file:
  picture = ov_data.decode.whole(file.read(), {{ size }}, "{{ pre.fit }}")
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


_READS = "{{ ' tokenizers' if texts else '' }}"
_READS_OR_WRITES = "{{ ' tokenizers' if texts or captions else '' }}"
_PURPOSES = "{{ purpose if texts or not captions else 'Captions' }}" + (
  "{{ ' and captions' if texts and captions else '' }}"
)
_PICTURE = "Features of a picture"
# A program is run where these libraries, what they depend on, and nothing else is installed. Their
# versions are in `libraries`.
_OPEN_CLIP_PIP = (
  "open_clip_torch torch numpy pillow{{ ' transformers' if texts else '' }}"  # for the tokenizer
)
# From 5.4 on some versions of transformers read pictures with torchvision only.
_TRANSFORMERS_PIP = "transformers torch torchvision numpy pillow"
_ONNX_PIP = "onnxruntime numpy pillow" + _READS
_STABLEHLO_PIP = "jax flatbuffers safetensors numpy pillow" + _READS_OR_WRITES
_OWN_PIP = "packages/ov-models packages/ov-data"
_TORCH_PIP = "torch safetensors numpy pillow" + _READS_OR_WRITES
PROGRAMS = {
  "open_clip": (
    Program("{{ purpose }}", "open_clip", _OPEN_CLIP_PIP, _OPEN_CLIP),
    Program("Features of each patch", "open_clip", _OPEN_CLIP_PIP, _OPEN_CLIP_PATCHES),
  ),
  "timm": (Program(_PICTURE, "timm", "timm torch numpy pillow", _TIMM),),
  "transformers": (
    Program(_PICTURE, "transformers", _TRANSFORMERS_PIP, _TRANSFORMERS),
    Program("{{ purpose }}", "transformers", _TRANSFORMERS_PIP, _TRANSFORMERS_TEXT, "texts"),
  ),
  "onnx": (Program("{{ purpose }}", "onnx", _ONNX_PIP, _ONNX),),
  "stablehlo": (Program(_PURPOSES, "stablehlo", _STABLEHLO_PIP, _STABLEHLO),),
  "safetensors": (
    Program(_PURPOSES, "safetensors", _OWN_PIP, _SAFETENSORS),
    Program("In PyTorch", "torch", _TORCH_PIP, _TORCH),
  ),
}
