"""Run exported StableHLO with jax only, without OpenVision code; see client_io.

  python run_stablehlo.py FOLDER PROBE OUTPUT.npz

Needs jax and safetensors. A function gets all tensors of model.safetensors by name, in the dtype
of the file, and its input.
"""

import json
import pathlib
from typing import Any

import client_io
import jax
import numpy as np
from safetensors.flax import load_file


def main() -> None:
  """Run all functions of the folder; they do not expose blocks."""
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  about = json.loads((pathlib.Path(folder) / "export.json").read_text("utf-8"))
  params = load_file(f"{folder}/model.safetensors")
  ids = None if probe.ids is None else probe.ids.astype(np.int32)
  arrays: dict[str, Any] = {}
  facts: dict[str, Any] = {}
  for name, given in (("image", probe.pixels), ("text", ids), ("caption", probe.pixels)):
    if name in about["functions"] and given is not None:
      exported = jax.export.deserialize(
        bytearray((pathlib.Path(folder) / f"{name}.stablehlo").read_bytes())
      )
      facts[f"{name} platforms"] = list(exported.platforms)
      facts[f"{name} input"] = str(exported.in_avals[-1])
      found = exported.call(params, given)
      arrays |= {f"{name}/{field}": np.asarray(value) for field, value in found.items()}
  if "image/embedding" in arrays and "text/embedding" in arrays:
    similarity = arrays["image/embedding"] @ arrays["text/embedding"].T
    arrays["logits"] = about["logit_scale"] * similarity + about["logit_bias"]
  client_io.write(output, arrays, facts, ["jax", "safetensors"])


if __name__ == "__main__":
  main()
