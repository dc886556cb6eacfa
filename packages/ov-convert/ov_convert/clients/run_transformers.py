"""Loads an exported folder by the Auto classes of `transformers`: see client_io."""

import json
import pathlib
from typing import Any

import client_io
import torch
import transformers


def main() -> None:
  """Runs the image tower, and the text tower where there is one."""
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  config = json.loads((pathlib.Path(folder) / "config.json").read_text("utf-8"))
  with torch.no_grad():
    arrays, facts = image(folder, probe, config)
    if (pathlib.Path(folder) / "text").is_dir():
      found, more = text(f"{folder}/text", probe)
      arrays, facts = arrays | found, facts | more
      joint = config["openvision"]
      similarity = arrays["image/embedding"] @ arrays["text/embedding"].T
      arrays["logits"] = joint["logit_scale"] * similarity + (joint["logit_bias"] or 0.0)
  client_io.write(output, arrays, facts, ["transformers", "torch", "tokenizers"])


def image(
  folder: str, probe: client_io.Probe, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Arrays and facts of the image tower."""
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  pixels = processor(images=probe.images(), return_tensors="pt").pixel_values
  arrays = {"image/pixels": client_io.channels_last(pixels)}
  model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
  out = model(probe.torch_pixels(), output_hidden_states=True)
  arrays |= blocks("image", out.hidden_states)
  arrays["image/tokens"] = out.hidden_states[-1][:, 1:]
  arrays["image/pooled"] = out.pooler_output
  facts = client_io.module_facts(model, "image")
  facts |= {"image/processor": type(processor).__name__, "image/class": type(model).__name__}
  embedded = out.pooler_output  # without a head that is all there is
  if config["architectures"][0].endswith("ForImageClassification"):
    auto = transformers.AutoModelForImageClassification
    whole = auto.from_pretrained(folder, dtype=torch.float32).eval()
    embedded = whole(probe.torch_pixels()).logits
  arrays["image/embedding"] = client_io.unit(embedded)
  return arrays, facts


def text(folder: str, probe: client_io.Probe) -> tuple[dict[str, Any], dict[str, Any]]:
  """Arrays and facts of the text tower."""
  config = json.loads((pathlib.Path(folder) / "config.json").read_text("utf-8"))
  how, length = config["openvision"], config["max_position_embeddings"]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer(
    probe.texts, truncation=True, max_length=length - how["append_cls"], padding="max_length",
    return_tensors="pt",
  )  # fmt: skip
  ids = inputs.input_ids
  if how["append_cls"]:
    ids = torch.nn.functional.pad(ids, (0, 1), value=tokenizer.cls_token_id)
  arrays: dict[str, Any] = {"text/ids": ids}

  classes = (transformers.SiglipTextModel, transformers.CLIPTextModelWithProjection)
  by_name = {found.__name__: found for found in classes}
  model = by_name[config["architectures"][0]].from_pretrained(folder, dtype=torch.float32).eval()
  given = torch.from_numpy(probe.ids)
  mask = (given != config["pad_token_id"]).long() if how["padding"] == "mask" else None
  out = model(given, attention_mask=mask, output_hidden_states=True)
  arrays |= blocks("text", out.hidden_states)
  arrays["text/embedding"] = client_io.unit(
    out.text_embeds if "text_embeds" in out else out.pooler_output
  )
  return arrays, client_io.module_facts(model, "text") | {"text/class": type(model).__name__}


def blocks(tower: str, hidden_states: tuple[Any, ...]) -> dict[str, Any]:
  """What enters the first block, then what leaves each."""
  return {f"{tower}/block_{i:02}": state for i, state in enumerate(hidden_states)}


if __name__ == "__main__":
  main()
