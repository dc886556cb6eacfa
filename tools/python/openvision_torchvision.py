"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

PyPI has torchvision for Linux with CUDA only; beside torch without CUDA its import ends in
"operator torchvision::nms does not exist". open_clip and timm import torchvision for its picture
transforms, which need no operator. This module lies in the site-packages of the clients'
environment and is loaded at start by the .pth file beside it: it does nothing until torchvision is
imported, and then declares the two operators, without an implementation, where nobody did.
"""

import importlib.abc
import importlib.machinery
import sys


class _Finder(importlib.abc.MetaPathFinder):
  """Finds nothing; sees torchvision being imported."""

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
  _kept.append(library)  # its declarations end with it


_kept: list[object] = []
sys.meta_path.insert(0, _Finder())
