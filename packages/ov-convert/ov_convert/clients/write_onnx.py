"""Export the towers of a folder in our format as ONNX graphs.

  python write_onnx.py FOLDER OUTPUT OPSET

FOLDER is written by ov_convert.torch_module. The existing towers are written to OUTPUT: image.onnx
(`pixel_values` float32 [batch, 3, S, S] to `pooled`, `tokens` and, with two towers, `embedding`)
and text.onnx (`input_ids` int64 [batch, T] to `text_embedding`, or `text_pooled` of a single
tower). Weights are stored in a separate file next to each graph.
"""

import pathlib
import sys
from typing import Any

from openvision_torch import OpenVision
import torch


class Image(torch.nn.Module):
  """Image tower [B, 3, S, S] with a tuple of outputs."""

  def __init__(self, model: Any) -> None:
    super().__init__()
    self.model = model

  def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(a for a in self.model.encode_image(pixel_values) if a is not None)


class Text(torch.nn.Module):
  """Text tower [B, T] with output [B, E], or [B, D] of a single tower."""

  def __init__(self, model: Any) -> None:
    super().__init__()
    self.model = model

  def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
    out = self.model.encode_text(input_ids)
    return out.pooled if out.embedding is None else out.embedding


def main() -> None:
  """Export the existing towers."""
  folder, output = map(pathlib.Path, sys.argv[1:3])
  opset = int(sys.argv[3])
  model = OpenVision.from_folder(str(folder))
  joint = hasattr(model, "image_head")
  if model.encoder is not None:
    size = model.encoder.config.image_size
    names = ["pooled", "tokens", "embedding"][: 2 + joint]
    pixels = torch.zeros(2, 3, size, size)
    export(Image(model), pixels, output / "image.onnx", "pixel_values", names, opset)
  if model.text is not None:
    ids = torch.ones(2, model.text.config.max_len, dtype=torch.int64)
    # Not "embedding", which clashes with the name of an internal value.
    name = "text_embedding" if joint else "text_pooled"
    export(Text(model), ids, output / "text.onnx", "input_ids", [name], opset)


def export(
  module: torch.nn.Module,
  example: torch.Tensor,
  file: pathlib.Path,
  name: str,
  outputs: list[str],
  opset: int,
) -> None:
  """Export one graph with dynamic batch size."""
  with torch.no_grad():
    program = torch.onnx.export(
      module.eval(), (example,), input_names=[name], output_names=outputs, dynamo=True,
      dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=opset,
      verbose=False,
    )  # fmt: skip
  batch = program.model.graph.inputs[0].shape[0]
  if isinstance(batch, int):
    sys.exit(f"{file.name}: the batch size was traced as {batch}, expected a dynamic one")
  written = program.model.opset_imports[""]
  if written != opset:  # the exporter only warns if it falls back to another opset
    sys.exit(f"{file.name}: opset {opset} is not supported, PyTorch wrote {written}")
  for node in program.model.graph.all_nodes():
    node.metadata_props.clear()  # remove stack traces, which contain local paths
  program.save(str(file), external_data=True)


if __name__ == "__main__":
  main()
