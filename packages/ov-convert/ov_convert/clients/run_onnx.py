"""Run exported ONNX graphs in onnxruntime; see client_io."""

import json
import pathlib
from typing import Any

import client_io
import numpy as np
import onnxruntime


def main() -> None:
  """Run the existing towers; graphs do not expose blocks."""
  folder, probe_folder, output = client_io.arguments()
  probe = client_io.Probe(probe_folder)
  arrays: dict[str, Any] = {}
  facts: dict[str, Any] = {}
  if (file := pathlib.Path(folder) / "image.onnx").exists():
    pixels = np.ascontiguousarray(probe.pixels.transpose(0, 3, 1, 2))
    found = run(file, pixels, facts)
    arrays |= {f"image/{name}": array for name, array in found.items()}
  if (file := pathlib.Path(folder) / "text.onnx").exists() and probe.ids is not None:
    found = run(file, probe.ids, facts)
    arrays |= {name.replace("_", "/"): array for name, array in found.items()}
  if "image/embedding" in arrays and "text/embedding" in arrays:
    joint = json.loads((pathlib.Path(folder) / "preprocessor.json").read_text("utf-8"))
    similarity = arrays["image/embedding"] @ arrays["text/embedding"].T
    arrays["logits"] = joint["logit_scale"] * similarity + joint["logit_bias"]
  client_io.write(output, arrays, facts, ["onnxruntime"])


def run(file: pathlib.Path, given: np.ndarray, facts: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the outputs of one graph by name; add its signature to the facts."""
  session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
  (source,), outputs = session.get_inputs(), session.get_outputs()
  facts[f"{file.name} {source.name}"] = [source.type, *source.shape]
  names = [value.name for value in outputs]
  return dict(zip(names, session.run(names, {source.name: given})))


if __name__ == "__main__":
  main()
