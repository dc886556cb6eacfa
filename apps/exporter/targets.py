"""The formats of //apps:export: how each is written, and how its library is asked."""

from collections.abc import Callable
import dataclasses
import importlib
from pathlib import Path
import sys
import tempfile

import numpy as np

from ov_convert import client_env, parity
from ov_convert.release import Release
import ov_models


@dataclasses.dataclass(frozen=True)
class Target:
  """One format.

  Attributes:
    check: raises ValueError where the format cannot hold a model.
    write: writes the folder; formats may take options by name.
    script: of ov_convert/clients, which loads the folder by its library's documented call.
    offers: names of arrays that the library must give, where ours has them.
    here: whether the script runs in this environment: it needs jax and no client library.
  """

  check: Callable[[Release], None]
  write: Callable[..., None]
  script: str
  offers: tuple[str, ...]
  here: bool = False


_IMAGE = ("image/tokens", "image/pooled", "image/embedding")
_TEXT = ("text/embedding", "logits")
_PIXELS, _IDS = ("image/pixels",), ("text/ids",)
# format: module of ov_convert, script, what it offers
FORMATS = {
  "safetensors": ("torch_module", "run_torch.py", (*_IMAGE, *_TEXT, "caption/ids")),
  "open_clip": ("open_clip", "run_open_clip.py", (*_PIXELS, *_IMAGE, *_IDS, *_TEXT)),
  "timm": ("timm_vit", "run_timm.py", (*_PIXELS, *_IMAGE)),
  "transformers": ("transformers_vit", "run_transformers.py", (*_PIXELS, *_IMAGE, *_IDS, *_TEXT)),
  "onnx": ("onnx_export", "run_onnx.py", (*_IMAGE, *_TEXT)),
  "stablehlo": ("stablehlo", "run_stablehlo.py", (*_IMAGE, *_TEXT, "caption/ids")),
}


def target(name: str) -> Target:
  """The format of that name; imports what writes it."""
  module, script, offers = FORMATS[name]
  writer = importlib.import_module(f"ov_convert.{module}")
  return Target(writer.check, writer.write, script, offers, here=name == "stablehlo")


def judge(
  target: Target,
  folder: Path,
  probe: Path,
  ours: dict[str, np.ndarray],
  python: Path | None = None,
) -> tuple[list[parity.Row], dict[str, str]]:
  """Loads a written folder in its library and compares.

  Args:
    target: the format.
    folder: as `target.write` wrote it.
    probe: as `write_probe` wrote it.
    ours: of `our_outputs`.
    python: an interpreter that has the library; by default that of the clients' environment.

  Returns:
    Rows, and the versions of the libraries.

  Raises:
    client_env.ClientError: the library did not load or run it.
  """
  with tempfile.TemporaryDirectory() as scratch:
    output = Path(scratch) / "output.npz"
    python = python or (Path(sys.executable) if target.here else None)
    client_env.run_client(target.script, [folder, probe, output], python=python)
    theirs = parity.Output.load(output)
  pictures = len(ours["image/pixels"])
  exact = len(ours["image/pooled"])  # the models are tried on those
  crops = exact if exact < pictures else None
  return parity.compare(ours, theirs, target.offers, crops), theirs.versions


def judge_ours(folder: Path, release: Release) -> list[parity.Row]:
  """Whether `ov_models.load` gives the model back, bit for bit."""
  config, params = ov_models.load(folder)
  problem = "" if config == release.config else f"config.json says {config}"
  want, have = (dict(_leaves(tree)) for tree in (release.params, params))
  unequal = [n for n in want if n not in have or not np.array_equal(want[n], have[n])]
  if unequal:
    problem = problem or f"{len(unequal)} tensors differ, the first is {unequal[0]}"
  return [parity.Row("ov_models.load", float(len(unequal)), None, 0.0, 0.0, problem)]


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, np.ndarray]]:
  found: list[tuple[str, np.ndarray]] = []
  for name, value in tree.items():
    path = f"{prefix}{name}"
    found += _leaves(value, f"{path}/") if isinstance(value, dict) else [(path, value)]
  return found
