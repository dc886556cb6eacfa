"""Holds one engine ready and times it whenever it is asked: for tools/bench.

  python time_engine.py ENGINE FOLDER PIXELS.npy THREADS

ENGINE is "onnxruntime", "timm", "timm_compiled", "torch" or "torch_compiled"; FOLDER is in its
format, PIXELS.npy float32 [B, 3, S, S]. Each line on stdin is answered by a line of JSON on stdout:
an empty line runs the image tower once and tells `wall` and `cpu` in seconds; any other line is the
name of a file to save the pooled output to.
"""

from collections.abc import Callable
import json
import sys
import time

import numpy as np

Run = Callable[[], np.ndarray]


def main() -> None:
  """Answers until stdin ends."""
  engine, folder, pixels, threads = sys.argv[1:]
  run = make(engine, folder, np.load(pixels), int(threads))
  run()  # what is compiled is compiled now
  print(json.dumps({"ready": engine}), flush=True)
  for line in sys.stdin:
    if line.strip():
      np.save(line.strip(), run())
      print(json.dumps({}), flush=True)
      continue
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(answer), flush=True)


def make(engine: str, folder: str, pixels: np.ndarray, threads: int) -> Run:
  """A function that runs the tower and gives the pooled output."""
  if engine == "onnxruntime":
    return onnx(folder, pixels, threads)
  import torch

  torch.set_num_threads(threads)
  given = torch.from_numpy(pixels)
  name, _, compiled = engine.partition("_")
  if name == "timm":
    import timm

    module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    call = torch.compile(module) if compiled else module
    pooled = lambda: call(given)
  else:
    from openvision_torch import OpenVision

    module = OpenVision.from_folder(folder)
    encode = torch.compile(module.encode_image) if compiled else module.encode_image
    pooled = lambda: encode(given).pooled

  def run() -> np.ndarray:
    with torch.inference_mode():
      return pooled().numpy()

  return run


def onnx(folder: str, pixels: np.ndarray, threads: int) -> Run:
  """onnxruntime, without threads that spin while others are timed."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.inter_op_num_threads = 1
  options.add_session_config_entry("session.intra_op.allow_spinning", "0")
  session = onnxruntime.InferenceSession(
    f"{folder}/image.onnx", options, providers=["CPUExecutionProvider"]
  )
  return lambda: session.run(["pooled", "tokens"], {"pixel_values": pixels})[0]


if __name__ == "__main__":
  main()
