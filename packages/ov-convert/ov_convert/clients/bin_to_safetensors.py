"""Turns a state dict of PyTorch into safetensors without running anything that it may hold.

  python bin_to_safetensors.py FILE OUTPUT.safetensors LIMIT

Floats become float32. What is no state dict of plain tensors, or has more than LIMIT bytes of them,
is refused: exit status 1 and the reason as the last line, to be put behind the name of the file.
"""

import os
import pickle
import re
import sys
from typing import Any
import zipfile

import safetensors.torch
import torch


def load(file: str, limit: int) -> Any:
  """What the file holds, if the restricted unpickler can read it."""
  zipped = zipfile.is_zipfile(file)
  if zipped:
    with zipfile.ZipFile(file) as archive:
      entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
      refuse("is a program of TorchScript, not a state dict; save its state_dict() instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      refuse("is a compressed archive, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > limit:
      refuse(f"has more than {limit} bytes")
  try:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
  except pickle.UnpicklingError as error:
    # The message is long, and tells how to run the code all the same.
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"asks to run {named[1]}" if named else "is no plain state dict"
    refuse(f"{what}; nothing was run. Ask its author for safetensors")
  except Exception as error:
    refuse(f"is damaged: {' '.join(str(error).split())[:200]}; fetch the file again")


def state_dict(content: Any) -> dict[str, torch.Tensor]:
  """The tensors by name, all plain and none larger than what is stored of it."""
  if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
    content = content["state_dict"]
  if not isinstance(content, dict):
    refuse(f"holds a {type(content).__name__}, expected a state dict")
  for name, tensor in content.items():
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
      refuse(f"holds a {type(tensor).__name__} under {name!r}, expected tensors only")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
      refuse(f"holds {name!r}, which is sparse, quantized or complex; expected plain tensors")
    if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
      refuse(f"holds {name!r} of shape {tuple(tensor.shape)}, of which it stores less")
  return content


def copy(tensor: torch.Tensor) -> torch.Tensor:
  """Memory of its own, for tied weights share theirs; float32 where floating."""
  dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
  return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def refuse(reason: str) -> Any:
  sys.exit(f"{reason}.")


def main() -> None:
  file, output, limit = sys.argv[1:]
  tensors = state_dict(load(file, int(limit)))
  # Tied weights share what is stored; a small file of many names must not fill the memory.
  most = min(int(limit), 4 * os.path.getsize(file))
  if (total := sum(tensor.nbytes for tensor in tensors.values())) > most:
    refuse(f"claims tensors of {total} bytes, of which it stores less")
  safetensors.torch.save_file({name: copy(t) for name, t in tensors.items()}, output)


if __name__ == "__main__":
  main()
