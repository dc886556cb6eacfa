"""Convert the weights of exported ONNX graphs to a smaller type.

  python convert_onnx.py FOLDER OUTPUT WEIGHTS

FOLDER is written by write_onnx.py. The existing graphs are written to OUTPUT, which must be empty,
under the same names. WEIGHTS is one of:

  float16   all large tensors in float16; graphs cast them to float32 and compute in float32
  int8      constant matrices of MatMul in 8 bits per output channel, activations quantized at run
            time with one scale per batch, so that outputs depend slightly on the rest of the batch;
            other large tensors in float16
  int4      constant matrices of MatMul in 4 bits per block of 32 inputs, activations in float32;
            other large tensors in float16

Embedding tables, convolutions and the projection to the shared space are among the other tensors.
"""

import pathlib
import sys

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer

_SMALL = 1024  # tensors of fewer elements stay in float32: biases, norms
_BLOCK = 32  # inputs per scale of int4 weights, the default of onnxruntime's kernels


def main() -> None:
  """Convert the existing graphs."""
  folder, output = map(pathlib.Path, sys.argv[1:3])
  quantize = {"float16": None, "int8": to_int8, "int4": to_int4}[sys.argv[3]]
  for file in sorted(folder.glob("*.onnx")):
    model = onnx.load(file)
    halve(model, keep="" if quantize is None else "MatMul")
    if quantize is not None:
      model = quantize(model, output / "quantized.onnx")
    onnx.save_model(
      model, output / file.name, save_as_external_data=True, location=f"{file.name}.data",
      size_threshold=_SMALL,
    )  # fmt: skip


def halve(model: onnx.ModelProto, keep: str) -> None:
  """Store large float32 tensors as float16, followed by a cast that runtimes apply on loading.

  Args:
    model: graph, changed in place. Tensors with values beyond the range of float16 stay float32.
    keep: type of the nodes whose tensors stay float32.
  """
  graph = model.graph
  kept = {name for node in graph.node if node.op_type == keep for name in node.input}
  casts = []
  for tensor in graph.initializer:
    if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in kept:
      continue
    values = numpy_helper.to_array(tensor)
    if values.size < _SMALL or np.abs(values).max() > np.finfo(np.float16).max:
      continue
    name, stored = tensor.name, f"{tensor.name}_float16"
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
  nodes = [*casts, *graph.node]
  del graph.node[:]
  graph.node.extend(nodes)


def to_int8(model: onnx.ModelProto, scratch: pathlib.Path) -> onnx.ModelProto:
  """Return the graph with dynamically quantized MatMul; `scratch` is written and deleted."""
  # Unsigned, because on x86 without VNNI, products of unsigned activations and signed weights
  # saturate at 16 bits, so that results would depend on the CPU.
  quantization.quantize_dynamic(
    model, scratch, op_types_to_quantize=["MatMul"], per_channel=True,
    weight_type=quantization.QuantType.QUInt8, use_external_data_format=True,
    extra_options={"MatMulConstBOnly": True},
  )  # fmt: skip
  quantized = onnx.load(scratch)
  for file in scratch.parent.glob(f"{scratch.name}*"):
    file.unlink()
  return quantized


def to_int4(model: onnx.ModelProto, scratch: pathlib.Path) -> onnx.ModelProto:
  """Return the graph with MatMulNBits; `scratch` is unused."""
  del scratch
  quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
    model, bits=4, block_size=_BLOCK, is_symmetric=False
  )
  quantizer.process()
  return quantizer.model.model


if __name__ == "__main__":
  main()
