"""Deliberately broken exports: the parity check detects each and names the broken part."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from apps.exporter import probe
from apps.exporter.exporting import judge
from apps.exporter.formats.table import EXPORTS
from apps.exporter.source import Source, load_source
from ov_convert import parity
import ov_models
from tests.clients.random_models import make_workdir

# Small enough to load a dozen times; D = 64 makes as many kernels as possible square.
_BLOCK = {"width": 64, "depth": 2, "mlp_dim": 96, "num_heads": 2}
CLIP = ov_models.VisionLanguageConfig.from_names(
  "Ti/8", "Ti", None, image_size=32, vocab_size=512, text_len=16, preset="openvision_released",
  embed_dim=64, encoder_options=_BLOCK, text_options=_BLOCK,
)  # fmt: skip


@dataclasses.dataclass
class Made:
  """A source, its probe, and the outputs of our model."""

  source: Source
  probe: Path
  ours: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
  folder = tmp_path_factory.mktemp("made")
  make_workdir(folder / "workdir", CLIP, fit="squash")
  source = load_source(folder / "workdir")
  inputs = probe.write_probe(folder / "probe", source, probe.pictures(None))
  return Made(source, folder / "probe", probe.our_outputs(source.release, inputs, None))


def edit_json(file: Path, *keys: str, **values) -> None:
  content = json.loads(file.read_text())
  node = content
  for key in keys:
    node = node[key]
  node.update(values)
  file.write_text(json.dumps(content))


def transpose(file: Path, name: str) -> None:
  tensors = dict(safetensors.numpy.load_file(file))
  assert tensors[name].shape[0] == tensors[name].shape[1]
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


OPEN_CLIP, TIMM, BEIT = "open_clip_model.safetensors", "model.safetensors", "model.safetensors"
CONFIG = "open_clip_config.json"
CASES = {
  # format, broken part, name in the message
  "open_clip transposed kernel": (
    "open_clip",
    lambda f: transpose(f / OPEN_CLIP, "visual.transformer.resblocks.1.attn.out_proj.weight"),
    "image/block_02",
  ),
  "open_clip transposed text kernel": (
    "open_clip",
    lambda f: transpose(f / OPEN_CLIP, "transformer.resblocks.0.attn.out_proj.weight"),
    "text/block_01",
  ),
  "open_clip transposed head": (
    "open_clip",
    lambda f: transpose(f / OPEN_CLIP, "visual.proj"),
    "image/embedding",
  ),
  "open_clip wrong GELU": (
    "open_clip",
    lambda f: edit_json(f / CONFIG, "model_cfg", "vision_cfg", act_kwargs={"approximate": "tanh"}),
    "activation: is gelu tanh, expected gelu",
  ),
  "open_clip wrong eps": (
    "open_clip",
    lambda f: edit_json(f / CONFIG, "model_cfg", "vision_cfg", norm_kwargs={"eps": 1e-5}),
    "layer norm eps: is 1e-05, expected 1e-06",
  ),
  "open_clip wrong filter": (
    "open_clip",
    lambda f: edit_json(f / CONFIG, "preprocess_cfg", interpolation="bicubic"),
    "image/pixels",
  ),
  "open_clip wrong fit": (
    "open_clip",
    lambda f: edit_json(f / CONFIG, "preprocess_cfg", resize_mode="shortest"),
    "image/pixels",
  ),
  "open_clip wrong packing of texts": (
    "open_clip",
    lambda f: edit_json(f / CONFIG, "model_cfg", "text_cfg", tokenizer_mode=None),
    "text/ids",
  ),
  "timm transposed kernel": (
    "timm",
    lambda f: transpose(f / TIMM, "blocks.0.attn.proj.weight"),
    "image/block_01",
  ),
  "timm wrong GELU": (
    "timm",
    lambda f: edit_json(f / "config.json", "model_args", act_layer="gelu_tanh"),
    "activation: is gelu tanh, expected gelu",
  ),
  "timm wrong filter": (
    "timm",
    lambda f: edit_json(f / "config.json", "pretrained_cfg", interpolation="bicubic"),
    "image/pixels",
  ),
  "transformers transposed kernel": (
    "transformers",
    lambda f: transpose(f / BEIT, "beit.encoder.layer.1.attention.output.dense.weight"),
    "image/block_02",
  ),
  "transformers wrong GELU": (
    "transformers",
    lambda f: edit_json(f / "config.json", hidden_act="gelu_pytorch_tanh"),
    "activation: is gelu tanh, expected gelu",
  ),
  "transformers wrong eps": (
    "transformers",
    lambda f: edit_json(f / "text" / "config.json", layer_norm_eps=1e-5),
    "layer norm eps: is 1e-05, expected 1e-06",
  ),
  "transformers wrong filter": (
    "transformers",
    lambda f: edit_json(f / "preprocessor_config.json", resample=3),
    "image/pixels",
  ),
  "safetensors transposed kernel": (
    "safetensors",
    lambda f: transpose(f / TIMM, "image_head/kernel"),
    "image/embedding",
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_export_is_detected(made, tmp_path, case):
  name, sabotage, named = CASES[case]
  chosen = EXPORTS[name]
  chosen.write(tmp_path, made.source.release)
  sabotage(tmp_path)
  rows, _ = judge(chosen, tmp_path, made.probe, made.ours)
  failure = parity.first_failure(rows)
  assert failure is not None, parity.table(rows)
  assert named in parity.explain(failure), parity.table(rows)
  print(f"{case}: {parity.explain(failure)}")


@pytest.mark.parametrize("name", ["open_clip", "timm", "transformers", "safetensors"])
def test_an_intact_export_agrees(made, tmp_path, name):
  chosen = EXPORTS[name]
  chosen.write(tmp_path, made.source.release)
  rows, _ = judge(chosen, tmp_path, made.probe, made.ours)
  assert parity.first_failure(rows) is None, parity.table(rows)
