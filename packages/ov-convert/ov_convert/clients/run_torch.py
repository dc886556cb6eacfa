"""Run a folder in our format with its PyTorch module; see client_io."""

import json
import pathlib
import sys
from typing import Any

import client_io
import torch


def main() -> None:
  """Compute all arrays of client_io except pixels and ids, which are inputs of the module."""
  folder, probe_folder, output = client_io.arguments()
  sys.path.insert(0, folder)  # use the exported copy, not the one next to this script
  from openvision_torch import OpenVision

  probe = client_io.Probe(probe_folder)
  model = OpenVision.from_folder(folder)
  words = json.loads((pathlib.Path(folder) / "config.json").read_text("utf-8"))["words"]
  arrays: dict[str, Any] = {}
  facts: dict[str, Any] = {}
  with torch.inference_mode():
    if model.encoder is not None:
      facts |= client_io.module_facts(model.encoder, "image")
      arrays |= tower("image", model.hidden_states(probe.torch_pixels()))
      arrays |= encoded("image", model.encode_image(probe.torch_pixels()))
    if model.text is not None and probe.ids is not None:
      facts |= client_io.module_facts(model.text, "text")
      ids = torch.from_numpy(probe.ids)
      arrays |= tower("text", model.hidden_states(ids=ids))
      arrays |= encoded("text", model.encode_text(ids))
    if "image/embedding" in arrays and "text/embedding" in arrays:
      arrays["logits"] = model.logits(arrays["image/embedding"], arrays["text/embedding"])
    if model.decoder is not None:
      facts |= client_io.module_facts(model.decoder, "decoder")
      arrays |= caption(model, probe, words)
  client_io.write(output, arrays, facts, ["torch", "safetensors"])


def tower(name: str, states: list[Any]) -> dict[str, Any]:
  """Return hidden states as arrays of client_io."""
  return {f"{name}/block_{layer:02d}": state for layer, state in enumerate(states)}


def encoded(name: str, out: Any) -> dict[str, Any]:
  """Return the outputs of a tower as arrays of client_io."""
  fields = {f"{name}/{field}": value for field, value in out._asdict().items()}
  return {field: value for field, value in fields.items() if value is not None}


def caption(model: Any, probe: client_io.Probe, words: dict[str, Any] | None) -> dict[str, Any]:
  """Return `caption/ids`; for a query decoder `caption/logits` of the first image and text."""
  pixels, config = probe.torch_pixels(), model.decoder.config
  if config.kind == "QueryDecoder":
    ids = None if probe.ids is None else torch.from_numpy(probe.ids[:1])
    return {"caption/logits": model.caption_logits(pixels[:1], ids)}
  if words is None:
    return {}
  special = {name: words[name] for name in ("bos_id", "eos_id", "pad_id")}
  return {"caption/ids": model.generate(pixels, max_len=config.max_len, **special)}


if __name__ == "__main__":
  main()
