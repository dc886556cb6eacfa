"""Make torchvision's CUDA build importable with a CPU build of torch.

PyPI's torchvision for Linux requires CUDA. With a CPU build of torch its import fails with
"operator torchvision::nms does not exist". open_clip and timm import torchvision only for its image
transforms, which use no operator. This module is in the site-packages of the clients' environment
and is loaded at startup by a .pth file. When torchvision is imported, it declares the two operators
without an implementation, unless they exist.
"""

import importlib.abc
import importlib.machinery
import sys


class _Finder(importlib.abc.MetaPathFinder):
  """Meta path finder that detects the import of torchvision and finds no module."""

  def find_spec(
    self, fullname: str, path: object = None, target: object = None
  ) -> importlib.machinery.ModuleSpec | None:
    if fullname == "torchvision":
      sys.meta_path.remove(self)
      _declare()
    return None


def _declare() -> None:
  import torch

  if torch.version.cuda is not None:
    return
  library = torch.library.Library("torchvision", "DEF")
  library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  _kept.append(library)  # the declarations live as long as the library object


_kept: list[object] = []
sys.meta_path.insert(0, _Finder())
