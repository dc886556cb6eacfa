"""Starts a run from the parameters of another one, whatever its resolution, patch or text length.

  params, report = init_from(workdir_of_the_other_run, state["params"])
  state = state_lib.replace_params(state, params)
  print(report.text())

Parameters go by their path. Of a path that both have:

  same shape                      taken
  position table of a tower with  its grid resampled (`ov_models.resample_positions`); square grids
    patches  [1 + h * w, D]
  other position table [T, D]     rows resampled linearly
  patch embedding [P, P, 3, D]    resized to the new patch size, see `resize_patches`
  anything else (depth, width,    left fresh, with the reason
    vocabulary)

What only the new model has stays fresh, what only the old one has is not used; the report names
all of it. Towers can come from several runs: one call for each, with `include`. Optimizer state,
step and data position are not touched.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import re
from typing import Any, Literal

from etils import epath
import jax
import jax.numpy as jnp

from apps.trainer.checkpoint import (
  find_checkpoint,
  read_metadata,
  restore_arrays,
  saved_arrays,
)
from apps.trainer.optimizer import flatten_paths, path_str
import ov_models

PyTree = Any
Resample = Callable[[jax.Array], jax.Array]

_OF_TOKENS = re.compile("embed/embedding$|decoder/head/kernel$")  # a row or column for each
_CHOSEN = ("not included", "excluded")  # why a parameter stays as it is: it was asked for


@dataclasses.dataclass(frozen=True)
class InitReport:
  """What became of every parameter of the new and of the old model.

  Attributes:
    source: the checkpoint directory.
    taken: paths copied as they were.
    resampled: path -> what was done.
    fresh: path -> why it keeps the value it had.
    unused: paths of the old model that the new one does not have.
  """

  source: str
  taken: tuple[str, ...]
  resampled: dict[str, str]
  fresh: dict[str, str]
  unused: tuple[str, ...]

  def text(self) -> str:
    """A few lines for the terminal; what is as expected is only counted."""
    lines = [f"initialised from {self.source}: {len(self.taken)} arrays taken"]
    lines += [f"  resampled {path}: {how}" for path, how in self.resampled.items()]
    for why in _CHOSEN:
      if count := list(self.fresh.values()).count(why):
        lines.append(f"  left as they are: {count} arrays {why}")
    lines += [f"  fresh {path}: {why}" for path, why in self.fresh.items() if why not in _CHOSEN]
    lines += [f"  unused {path}" for path in self.unused]
    return "\n".join(lines)

  def save(self, path: epath.PathLike) -> None:
    """Writes everything as JSON."""
    epath.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def init_from(
  source: epath.PathLike,
  params: PyTree,
  *,
  step: int | None = None,
  part: Literal["params", "ema"] = "params",
  include: Sequence[str] = (),
  exclude: Sequence[str] = (),
  patch_resize: Literal["pseudoinverse", "bilinear"] = "pseudoinverse",
) -> tuple[PyTree, InitReport]:
  """Copies what fits from a checkpoint into fresh parameters.

  Args:
    source: workdir, checkpoints directory or one checkpoint, see `checkpoint.find_checkpoint`.
    params: arrays of the new model, fresh or from another source, with their final shardings.
    step: which checkpoint, by default the newest.
    part: the trained parameters or their average.
    include: regexes of paths to take; none means all.
    exclude: regexes of paths to leave fresh.
    patch_resize: see `resize_patches`.

  Returns:
    Arrays in the tree and the shardings of `params`, and the report.

  Raises:
    ValueError: if a regex matches no parameter, or nothing at all fits.
    CheckpointError: if there is no intact checkpoint.
  """
  checkpoint = find_checkpoint(source, step)
  new = flatten_paths(params)
  saved = saved_arrays(checkpoint)
  old = {p.removeprefix(f"{part}/"): a for p, a in saved.items() if p.startswith(f"{part}/")}
  if not old:
    parts = sorted({path.split("/")[0] for path in saved})
    raise ValueError(f"{checkpoint} holds no {part!r}; it holds {', '.join(parts)}.")
  for name, regexes in (("include", include), ("exclude", exclude)):
    for regex in regexes:
      if not any(re.search(regex, path) for path in new):
        raise ValueError(
          f"init_from {name}={regex!r} matches no parameter; paths are such as {_some(new)}."
        )

  taken: list[str] = []
  resample: dict[str, tuple[str, Resample]] = {}
  fresh: dict[str, str] = {}
  for path, leaf in new.items():
    if include and not any(re.search(regex, path) for regex in include):
      fresh[path] = _CHOSEN[0]
    elif any(re.search(regex, path) for regex in exclude):
      fresh[path] = _CHOSEN[1]
    elif path not in old:
      fresh[path] = "not in the source"
    elif old[path].shape == leaf.shape:
      taken.append(path)
    else:
      fit = _fit(path, old[path].shape, leaf.shape, new.keys(), patch_resize)
      if isinstance(fit, str):
        fresh[path] = fit
      else:
        resample[path] = (f"{_shape(old[path])} -> {_shape(leaf)}, {fit[0]}", fit[1])
  if not taken and not resample:
    raise ValueError(
      f"nothing in {checkpoint} fits the model: it holds {_some(old)}; the model has {_some(new)}."
    )

  read = _read(checkpoint, part, {p: old[p] for p in (*taken, *resample)}, new)
  for path, (_, function) in resample.items():
    read[path] = jax.jit(function, out_shardings=new[path].sharding)(read[path])
  result = jax.tree_util.tree_map_with_path(
    lambda p, leaf: read[path_str(p)].astype(leaf.dtype) if path_str(p) in read else leaf, params
  )
  report = InitReport(
    source=str(checkpoint),
    taken=tuple(taken),
    resampled={path: how for path, (how, _) in resample.items()},
    fresh=fresh,
    unused=tuple(path for path in old if path not in new),
  )
  return result, report


def check_tokenizer(report: InitReport, fingerprint: str) -> None:
  """Whether the rows of tokens that were taken mean the same tokens here.

  Args:
    report: of `init_from`.
    fingerprint: of the tokenizer of this run.

  Raises:
    ValueError: they come from a run with another tokenizer; says what to do.
  """
  rows = [path for path in (*report.taken, *report.resampled) if _OF_TOKENS.search(path)]
  theirs = read_metadata(epath.Path(report.source)).get("tokenizer", fingerprint)
  if rows and theirs != fingerprint:
    raise ValueError(
      f"{', '.join(rows)} of {report.source} belong to another tokenizer ({theirs}) than this "
      f"run's ({fingerprint}), so token numbers would mean other words; start in a new workdir "
      "with config.tokenizer.path set to the tokenizer folder of that run, or leave them fresh "
      f"with config.init_from.exclude=({_OF_TOKENS.pattern!r},)"
    )


def resize_patches(
  kernel: jax.Array, size: int, method: Literal["pseudoinverse", "bilinear"]
) -> jax.Array:
  """A patch embedding [P, P, 3, D] for patches of `size` pixels a side: [size, size, 3, D].

  "pseudoinverse" gives the kernel whose tokens of resized images differ least from the old tokens
  of the original ones, and not at all when patches grow (FlexiViT, Beyer et al. 2022,
  https://arxiv.org/abs/2212.08013): for x' = b x the row operation of bilinear resizing,
  w' = pinv(b^T) w along both sides. "bilinear" resizes the kernel like a picture, as the
  predecessors do from p16 to p8; a token's size then changes by about (size / P)^2.
  """
  old = kernel.shape[0]
  if method == "bilinear":
    return jax.image.resize(kernel, (size, size, *kernel.shape[2:]), "bilinear")
  b = jax.image.resize(jnp.eye(old), (size, old), "bilinear")  # [size, P]
  pinv = jnp.linalg.pinv(b.T)  # [size, P]
  return jnp.einsum("iP,jQ,PQCD->ijCD", pinv, pinv, kernel, precision="highest")


def _fit(
  path: str,
  old: tuple[int, ...],
  new: tuple[int, ...],
  paths: Any,
  patch_resize: Literal["pseudoinverse", "bilinear"],
) -> tuple[str, Resample] | str:
  """How an array of another shape is made to fit, or why it is not."""
  tower, _, name = path.rpartition("/")
  if path.endswith("patch_embed/kernel") and old[2:] == new[2:]:
    return f"{patch_resize} resize", lambda x: resize_patches(x, new[0], patch_resize)
  if name == "position_embedding" and old[1:] == new[1:]:
    if f"{tower}/patch_embed/kernel".lstrip("/") not in paths:
      return "linear", lambda x: jax.image.resize(x, new, "linear", antialias=False)
    sides = [math.isqrt(rows - 1) for rows in (old[0], new[0])]
    if all(side**2 + 1 == rows for side, rows in zip(sides, (old[0], new[0]), strict=True)):
      before, after = ((side, side) for side in sides)
      return "bilinear", lambda x: ov_models.resample_positions(x, before, after)
    return f"position tables of {old[0]} and {new[0]} rows are not 1 + a square grid"
  return f"the source has {list(old)}, the model {list(new)}"


def _read(
  checkpoint: epath.Path, part: str, old: dict[str, Any], new: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Arrays by path; equal shapes where the new ones live, others whole on every device."""

  def target(path: str, saved: Any) -> jax.ShapeDtypeStruct:
    sharding = new[path].sharding
    if saved.shape != new[path].shape and isinstance(sharding, jax.sharding.NamedSharding):
      sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)

  tree: dict[str, Any] = {}
  for path, saved in old.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = target(path, saved)
  return flatten_paths(restore_arrays(checkpoint, {part: tree}, partial=True)[part])


def _shape(array: Any) -> str:
  return str(list(array.shape))


def _some(paths: Any) -> str:
  paths = list(paths)
  return ", ".join(paths[:: max(1, len(paths) // 5)][:6])
