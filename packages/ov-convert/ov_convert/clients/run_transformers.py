"""Run an exported folder with the Auto classes of `transformers`; see client_io."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import client_io
import torch
import transformers


def main() -> None:
  """Run the image tower, and the text tower if there is one."""
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  config = json.loads((pathlib.Path(folder) / "config.json").read_text("utf-8"))
  with torch.no_grad():
    if config["model_type"] not in ("vit", "beit"):
      arrays, facts = family(folder, probe)
      client_io.write(output, arrays, facts, ["transformers", "torch", "tokenizers"])
      return
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
  """Return arrays and facts of the image tower."""
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
  embedded = out.pooler_output  # without a head
  if config["architectures"][0].endswith("ForImageClassification"):
    auto = transformers.AutoModelForImageClassification
    model_with_head = auto.from_pretrained(folder, dtype=torch.float32).eval()
    embedded = model_with_head(probe.torch_pixels()).logits
  arrays["image/embedding"] = client_io.unit(embedded)
  return arrays, facts


def family(folder: str, probe: client_io.Probe) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return arrays and facts of a model with its own class: CLIP, SigLIP, DINOv2 and others."""
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  prepared = processor(images=probe.images(), return_tensors="pt").pixel_values
  arrays: dict[str, Any] = {"image/pixels": client_io.channels_last(prepared)}
  # The fused attention of AIMv2 ignores its causal mask.
  how = {"attn_implementation": "eager", "dtype": torch.float32}
  model = transformers.AutoModel.from_pretrained(folder, **how).eval()
  tower, words = getattr(model, "vision_model", model), getattr(model, "text_model", None)
  pixels = probe.torch_pixels()
  with Blocks(tower, tower.config.num_hidden_layers) as states:
    out = tower(pixel_values=pixels)
  arrays |= blocks("image", states.outputs)
  patches = (tower.config.image_size // tower.config.patch_size) ** 2
  arrays["image/tokens"] = states.outputs[-1][:, -patches:]
  pooled = out.pooler_output
  arrays["image/pooled"] = out.last_hidden_state.mean(1) if pooled is None else pooled
  facts = client_io.module_facts(tower, "image")
  facts |= {"image/processor": type(processor).__name__, "image/class": type(model).__name__}
  if words is not None and probe.ids is not None:
    ids = torch.from_numpy(probe.ids)
    # No padding mask: padding is attended to, or follows the pooled token of a causal tower.
    with Blocks(words, words.config.num_hidden_layers) as states:
      out = model(input_ids=ids, pixel_values=pixels, attention_mask=full_mask(model, ids))
    arrays |= blocks("text", states.outputs)
    arrays |= {"image/embedding": out.image_embeds, "text/embedding": out.text_embeds}
    arrays["logits"] = out.logits_per_image
    facts |= client_io.module_facts(words, "text")
    if (pathlib.Path(folder) / "tokenizer_config.json").exists():
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
      arrays["text/ids"] = tokenizer(
        probe.texts, truncation=True, max_length=ids.shape[1], padding="max_length",
        return_tensors="pt",
      ).input_ids  # fmt: skip
  return arrays, facts


def full_mask(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
  """Return the mask that AIMv2 requires to apply its causal mask; None for other models."""
  return torch.ones_like(ids) if model.config.model_type == "aimv2" else None


class Blocks:
  """Records the input of the first block of a tower and the outputs of all blocks."""

  def __init__(self, tower: Any, depth: int) -> None:
    lists = (m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    layers = next(lists)
    self.outputs: list[torch.Tensor] = []
    self.handles = [layers[0].register_forward_pre_hook(self.enter, with_kwargs=True)]
    self.handles += [layer.register_forward_hook(self.leave) for layer in layers]

  def enter(self, module: Any, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
    self.outputs.append(inputs[0] if inputs else kwargs["hidden_states"])

  def leave(self, module: Any, inputs: Any, output: Any) -> None:
    self.outputs.append(output[0] if isinstance(output, tuple) else output)

  def __enter__(self) -> "Blocks":
    return self

  def __exit__(self, *_: Any) -> None:
    for handle in self.handles:
      handle.remove()


def text(folder: str, probe: client_io.Probe) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return arrays and facts of the text tower."""
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


def blocks(tower: str, hidden_states: Sequence[Any]) -> dict[str, Any]:
  """Return the input of the first block and the outputs of all blocks as arrays of client_io."""
  return {f"{tower}/block_{i:02}": state for i, state in enumerate(hidden_states)}


if __name__ == "__main__":
  main()
