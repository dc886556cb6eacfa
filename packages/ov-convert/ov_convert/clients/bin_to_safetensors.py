"""Convert a PyTorch state dict to safetensors without executing code from the file.

  python bin_to_safetensors.py FILE OUTPUT.safetensors LIMIT

Floats become float32. Exits with status 1 if FILE is not a state dict of plain tensors, or has more
than LIMIT bytes of them. The last line is the reason, to be appended to the name of the file.
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
  """Return the content of the file, read by the restricted unpickler."""
  zipped = zipfile.is_zipfile(file)
  if zipped:
    with zipfile.ZipFile(file) as archive:
      entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
      refuse("is a TorchScript program, not a state dict; save its state_dict() instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      refuse("is a compressed archive, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > limit:
      refuse(f"has more than {limit} bytes")
  try:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
  except pickle.UnpicklingError as error:
    # The original message is long and explains how to execute the code anyway.
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"calls {named[1]}" if named else "is not a plain state dict"
    refuse(f"{what}; no code was run. Request a safetensors file from its author")
  except Exception as error:
    refuse(f"is damaged: {' '.join(str(error).split())[:200]}; download the file again")


def state_dict(content: Any) -> dict[str, torch.Tensor]:
  """Return the tensors by name after checking that they are plain and fully stored."""
  if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
    content = content["state_dict"]
  if not isinstance(content, dict):
    refuse(f"contains a {type(content).__name__}, expected a state dict")
  for name, tensor in content.items():
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
      refuse(f"contains a {type(tensor).__name__} under {name!r}, expected tensors only")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
      refuse(f"contains {name!r}, which is sparse, quantized or complex; expected plain tensors")
    if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
      refuse(f"contains {name!r} of shape {tuple(tensor.shape)}, but stores fewer bytes")
  return content


def copy(tensor: torch.Tensor) -> torch.Tensor:
  """Copy a tensor, because tied weights share memory; floats become float32."""
  dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
  return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def refuse(reason: str) -> Any:
  sys.exit(f"{reason}.")


def main() -> None:
  file, output, limit = sys.argv[1:]
  tensors = state_dict(load(file, int(limit)))
  # Tied weights share storage; a small file with many names must not exhaust memory.
  most = min(int(limit), 4 * os.path.getsize(file))
  if (total := sum(tensor.nbytes for tensor in tensors.values())) > most:
    refuse(f"declares tensors of {total} bytes, but stores fewer bytes")
  safetensors.torch.save_file({name: copy(t) for name, t in tensors.items()}, output)


if __name__ == "__main__":
  main()
