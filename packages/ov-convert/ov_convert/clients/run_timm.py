"""Run an exported folder in timm; see client_io."""

from typing import Any

import client_io
import timm
import torch


def main() -> None:
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
  settings = timm.data.resolve_model_data_config(model)
  preprocess = timm.data.create_transform(**settings, is_training=False)
  facts = client_io.module_facts(model, "image")
  facts["preprocessing"] = str(preprocess)
  pixels = torch.stack([preprocess(image) for image in probe.images()])
  arrays: dict[str, Any] = {"image/pixels": client_io.channels_last(pixels)}
  states: list[torch.Tensor] = []
  model.blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
  for block in model.blocks:
    block.register_forward_hook(lambda _, inputs, out: states.append(out))
  with torch.no_grad():
    features = model.forward_features(probe.torch_pixels())
    pooled = model.forward_head(features, pre_logits=True)
    projected = model.forward_head(features)
  arrays |= {f"image/block_{i:02d}": state for i, state in enumerate(states)}
  arrays |= {"image/tokens": states[-1][:, model.num_prefix_tokens :], "image/pooled": pooled}
  arrays["image/embedding"] = client_io.unit(projected)  # of the pooled vector without a head
  client_io.write(output, arrays, facts, ["timm", "torch", "torchvision"])


if __name__ == "__main__":
  main()
