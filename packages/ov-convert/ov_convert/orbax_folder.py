"""Import of orbax checkpoints of the published OpenVision and OpenVision 2 training code.

A run of that code has a directory `checkpoint.npz` with orbax checkpoints `<step>/default`:
{"params": ..., "opt": ...}. The checkpoint does not state the model; its config is inferred from
names and shapes. Two values cannot be inferred and are arguments: the resolution, and the number of
heads of unpublished sizes with 2-D kernels.
"""

from collections import Counter
from collections.abc import Callable, Mapping
import gc
import logging
import math
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from ov_convert import openvision_jax
from ov_convert.name_map import Shape, flatten, unflatten
from ov_convert.reading import MAX_HEADER_BYTES, MAX_TENSOR_BYTES
from ov_convert.release import Imported, Preprocess, encoder_of
import ov_models

Folder = str | os.PathLike[str]
Sizes = Mapping[str, tuple[int, int, int, int]]  # as in ov_models.VIT_VARIANTS

# Caption length of OpenVision 2, whose decoder has no positions to infer it from.
_CAPTION_TOKENS = 127


def read(
  folder: Folder, *, step: int | None = None, image_size: int = 224, num_heads: int | None = None
) -> Imported:
  """Read a model from a checkpoint; optimizer state is not read.

  Args:
    folder: directory of a run (with `checkpoint.npz`), `checkpoint.npz` itself, one of its steps,
      or `default`; a local path, or an etils.epath path in a bucket. Partial models are supported:
      single towers, models without decoder.
    step: step to read; the newest by default.
    image_size: side of the input image S, in pixels. Ignored for learned positions, which determine
      it; no published model has these.
    num_heads: number of heads of towers with 2-D kernels and unpublished sizes.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    ValueError: if the checkpoint is unreadable or of another model, or tensors are missing,
      unexpected, of a wrong shape or contain NaN or Inf; lists all of them.
  """
  path = find(folder, step)
  flat = restore(path)
  config, notes = infer_config({n: a.shape for n, a in flat.items()}, image_size, num_heads)
  ignore: list[str] = []
  if isinstance(config, ov_models.ViTConfig | ov_models.TextConfig):
    # A single tower has no head; heads belong to the contrastive model.
    flat = {re.sub("^img_encoder/", "img/", name): array for name, array in flat.items()}
    ignore = [name for name in ("img/head/kernel", "txt/head/kernel") if name in flat]
    notes += [f"{name} is not imported: a single tower has no head" for name in ignore]
  params = openvision_jax.to_ours(flat, config, ignore)
  preprocess = None
  if not isinstance(config, ov_models.TextConfig):
    preprocess = Preprocess(encoder_of(config).image_size, "center")  # as their evaluation
  return Imported(config, params, preprocess, notes=tuple(notes))


def find(folder: Folder, step: int | None = None) -> pathlib.Path:
  """Return the orbax directory of one checkpoint; see `read`."""
  path = _as_path(folder)
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder.")
  for below in ("jax_orbax_weight", "checkpoint.npz"):  # the former in published repositories
    if (path / below).is_dir():
      path = path / below
  steps = {int(p.name): p for p in path.iterdir() if p.name.isdecimal() and p.is_dir()}
  if steps and not (path / "_METADATA").exists():
    if step is not None and step not in steps:
      raise ValueError(f"{path} has no step {step}; it has {', '.join(map(str, sorted(steps)))}.")
    path = steps[max(steps) if step is None else step]
  elif step is not None:
    raise ValueError(f"step={step}, but {path} contains no steps; omit it.")
  if (path / "default").is_dir():
    path = path / "default"
  if not (path / "_METADATA").is_file():
    raise FileNotFoundError(
      f"{path} is not a checkpoint: _METADATA is missing. Expected the folder of a run with "
      "checkpoint.npz/<step>/default in it, or one of those."
    )
  return path


def restore(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the parameters in a directory returned by `find`, by name, as float32 on the host."""
  # orbax is an optional dependency, needed only for these checkpoints.
  import orbax.checkpoint as ocp

  path = path if "://" in str(path) else path.absolute()
  if (size := _size(path / "_METADATA")) > MAX_HEADER_BYTES:
    raise ValueError(f"{path}/_METADATA has {size} bytes; expected at most {MAX_HEADER_BYTES}.")
  tree = _read(path, lambda: ocp.PyTreeCheckpointHandler().metadata(path).tree)
  if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
    raise ValueError(f"{path} contains no params; expected a checkpoint with params and opt.")
  saved = flatten(tree["params"])
  if odd := [name for name, leaf in saved.items() if not hasattr(leaf, "shape")]:
    raise ValueError(f"{path}: {', '.join(odd)} are not arrays; expected a tree of arrays.")
  total = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in saved.values())
  if total > MAX_TENSOR_BYTES:
    raise ValueError(
      f"{path} declares {total} bytes of arrays; expected at most {MAX_TENSOR_BYTES}."
    )
  wanted = {"params": unflatten(dict.fromkeys(saved, 0))}
  args = {"params": unflatten({n: ocp.RestoreArgs(restore_type=np.ndarray) for n in saved})}
  request = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    read = flatten(_read(path, lambda: reader.restore(path, args=request))["params"])
  flat = {name: np.asarray(array, np.float32) for name, array in read.items()}
  if broken := [name for name, array in flat.items() if not np.isfinite(array).all()]:
    raise ValueError(f"{path}: {', '.join(broken)} contains NaN or Inf; use an intact checkpoint.")
  return flat


def infer_config(
  shapes: Mapping[str, Shape], image_size: int = 224, num_heads: int | None = None
) -> tuple[openvision_jax.Config, list[str]]:
  """Infer the config of a model from names and shapes of its tensors, with notes on assumptions.

  Raises:
    ValueError: if the model is neither OpenVision nor OpenVision 2, or tensors that determine sizes
      are missing.
  """
  tops = {name.split("/")[0] for name in shapes}
  if tops.isdisjoint(("img", "txt", "img_encoder")):
    raise ValueError(
      f"the parameters are {', '.join(sorted(tops)) or 'none'}; expected img, txt, txt_decoder and "
      "t of OpenVision, or img_encoder and txt_decoder of OpenVision 2."
    )
  sizes = _Sizes(shapes, num_heads)
  second = "img_encoder" in tops
  image = text = decoder = None
  embed_dim = 0
  if second or "img" in tops:
    image = sizes.image("img_encoder" if second else "img", image_size)
  if "txt" in tops and not second:
    text = sizes.text()
    embed_dim = sizes.dim("img/head/kernel", 1, 2) if image else 0
  if "txt_decoder" in tops and image:
    decoder = sizes.captions() if second else sizes.queries()
  sizes.check()

  if image is None:
    return ov_models.TextConfig(**text or {}), sizes.notes
  encoder = ov_models.ViTConfig(**image)
  if text is None and decoder is None:
    return encoder, sizes.notes
  if second:
    writer = ov_models.DecoderConfig(**decoder or {})
    sizes.notes.append(
      "the decoder is causal over image and text and has no positions; its captions are taken to "
      f"have {_CAPTION_TOKENS} tokens at most, as published"
    )
    config = ov_models.VisionLanguageConfig(encoder=encoder, decoder=writer, keep_order="random")
    return config, sizes.notes
  towers = ov_models.VisionLanguageConfig(
    encoder=encoder,
    text=ov_models.TextConfig(**text) if text else None,
    decoder=ov_models.QueryDecoderConfig(**decoder) if decoder else None,
    embed_dim=embed_dim or encoder.width,
  )
  return towers, sizes.notes


class _Sizes:
  """Sizes inferred from shapes. Problems are collected and raised by `check`."""

  def __init__(self, shapes: Mapping[str, Shape], num_heads: int | None) -> None:
    self.shapes = shapes
    self.num_heads = num_heads
    self.problems: list[str] = []
    self.notes: list[str] = []

  def check(self) -> None:
    """Raise ValueError listing all problems."""
    if self.problems:
      raise ValueError(
        "the sizes of the model cannot be determined:\n  " + "\n  ".join(self.problems)
      )

  def dim(self, name: str, axis: int, rank: int) -> int:
    """Return one dimension of a tensor, or 1 after recording a problem."""
    shape = self.shapes.get(name)
    if shape is None:
      self.problems.append(f"missing {name}")
    elif len(shape) != rank or not all(shape):
      self.problems.append(f"{name} is {shape}, expected {rank} dimensions")
    else:
      return shape[axis]
    return 1

  def most(self, tower: str, name: str, axis: int, rank: int) -> int | None:
    """Return the most common dimension over layers, so that one wrong tensor stands out."""
    pattern = re.compile(f"{tower}/Transformer/encoderblock_[0-9]+/{name}")
    found = [s for n, s in self.shapes.items() if pattern.fullmatch(n) and len(s) == rank]
    counts = Counter(shape[axis] for shape in found if all(shape))
    return counts.most_common(1)[0][0] if counts else None

  def tower(self, name: str, published: Sizes) -> dict[str, Any]:
    """Return width, depth, mlp_dim and num_heads of a tower."""
    layers = {
      int(match[1])
      for path in self.shapes
      if (match := re.match(f"{name}/Transformer/encoderblock_([0-9]{{1,4}})/", path))
    }
    depth = max(layers, default=-1) + 1
    width = self.most(name, "LayerNorm_[01]/scale", 0, 1)
    mlp = self.most(name, "MlpBlock_0/Dense_0/bias", 0, 1)
    if width is None or mlp is None:
      self.problems.append(f"missing {name}/Transformer/encoderblock_0 and all other layers")
      return {}
    gaps = sorted(set(range(depth)) - layers)
    self.problems += [f"missing {name}/Transformer/encoderblock_{layer}" for layer in gaps]
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp}
    return sizes | {"num_heads": self.heads(name, sizes, published)}

  def heads(self, name: str, sizes: Mapping[str, int], published: Sizes) -> int:
    """Return the number of heads: from split kernels, published sizes, or the argument."""
    width, depth, mlp = sizes.values()
    split = self.most(name, "MultiHeadDotProductAttention_0/(query|key|value)/kernel", 1, 3)
    alike = {v for v in published.values() if (v[0], v[2]) == (width, mlp)}
    if exact := {heads for _, d, _, heads in alike if d == depth}:
      return split or exact.pop()
    if self.num_heads:
      return split or self.num_heads
    have = f"{name} has {depth} layers of width {width} and mlp {mlp}"
    if alike:  # the last layers may be missing
      layers = " or ".join(str(d) for _, d, _, _ in sorted(alike))
      self.problems.append(
        f"{have}, but the published model has {layers} layers: encoderblock_{depth} and later "
        "ones are missing. Set num_heads if the model has this depth"
      )
    elif split is None:
      self.problems.append(f"{have}, which is not a published size; set num_heads")
    return split or 1

  def image(self, name: str, image_size: int) -> dict[str, Any]:
    """Return the fields of the image tower."""
    fields = self.tower(name, ov_models.VIT_VARIANTS) | {"image_size": image_size}
    fields["patch_size"] = self.dim(f"{name}/embedding/kernel", 0, 4)
    if f"{name}/pos_embedding" in self.shapes:
      side = math.isqrt(self.dim(f"{name}/pos_embedding", 1, 3) - 1)
      fields |= {"position": "learned", "image_size": side * fields["patch_size"]}
      self.notes.append(f"{name} has learned positions for {fields['image_size']} pixels")
    return fields

  def text(self) -> dict[str, Any]:
    """Return the fields of the text tower."""
    fields = self.tower("txt", ov_models.TEXT_VARIANTS) | {
      "vocab_size": self.dim("txt/Embed_0/embedding", 0, 2),
      "max_len": self.dim("txt/pos_embedding", 1, 3),
    }
    return fields | ov_models.PRESETS["openvision_released"].text

  def queries(self) -> dict[str, Any]:
    """Return the fields of the OpenVision decoder."""
    return self.tower("txt_decoder", ov_models.DECODER_VARIANTS) | {
      "vocab_size": self.dim("txt_decoder/head/kernel", 1, 2),
      "num_queries": self.dim("txt_decoder/learnable_tokens", 0, 2),
    }

  def captions(self) -> dict[str, Any]:
    """Return the fields of the OpenVision 2 decoder."""
    return self.tower("txt_decoder", ov_models.DECODER_VARIANTS) | {
      "vocab_size": self.dim("txt_decoder/Embed_0/embedding", 0, 2),
      "max_len": _CAPTION_TOKENS,
      "mask": "causal",
      "position": "none",
    }


def _as_path(folder: Folder) -> Any:
  """Return a pathlib path; other path objects, such as etils.epath, are returned unchanged."""
  return folder if isinstance(folder, pathlib.PurePath) else pathlib.Path(folder)


def _size(file: Any) -> int:
  """Return the size in bytes of a local or etils.epath file."""
  stat = file.stat()
  return stat.st_size if hasattr(stat, "st_size") else stat.length


def _read(path: pathlib.Path, read: Callable[[], Any]) -> Any:
  """Return what `read` returns; raise a one-line ValueError if files are damaged."""
  logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
  before, logger.disabled = logger.disabled, True

  def quiet(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  sys.unraisablehook = quiet
  found, problem = None, ""
  try:
    found = read()
    sys.unraisablehook = hook
  except Exception as error:  # the libraries raise arbitrary errors for damaged files
    # Arrays are read concurrently. Failures after the first are unraisable and would each print a
    # traceback, possibly later, so the hook stays installed.
    problem = " ".join(str(error).split())[:300] or type(error).__name__
  finally:
    gc.collect()
    logger.disabled = before
  if problem:
    raise ValueError(f"{path} is damaged: {problem}; download it again.")
  return found
