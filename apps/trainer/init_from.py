"""Start a run from the parameters of another one, whatever its resolution, patch or text length.

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
all of it. The other run may be one of the published code, see `init_source`. Towers can come from
several runs: one call for each, with `include`. Optimizer state, step and data position are not
touched.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import re
from typing import Any, Literal, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from apps.trainer.init_source import InitSource, Part, open_source
from apps.trainer.paths import flatten_paths, path_str
from ov_data import fs
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
    tokenizer: fingerprint of the tokenizer of the source; None where that is not known.
    notes: what else there is to know about the source.
    taken: paths copied as they were.
    resampled: path -> what was done.
    fresh: path -> why it keeps the value it had.
    unused: paths of the old model that the new one does not have.
  """

  source: str
  tokenizer: str | None
  notes: tuple[str, ...]
  taken: tuple[str, ...]
  resampled: dict[str, str]
  fresh: dict[str, str]
  unused: tuple[str, ...]

  def text(self) -> str:
    """Return a few lines for the terminal; what is as expected is only counted."""
    lines = [f"initialised from {self.source}: {len(self.taken)} arrays taken"]
    lines += [f"  note: {note}" for note in self.notes]
    if self.tokenizer is None and (rows := self.rows_of_tokens):
      lines.append(
        f"  note: {', '.join(rows)} fit the vocabulary of that run only, and the checkpoint does "
        "not name it: config.tokenizer.path must be that vocabulary"
      )
    lines += [f"  resampled {path}: {how}" for path, how in self.resampled.items()]
    for why in _CHOSEN:
      if count := list(self.fresh.values()).count(why):
        lines.append(f"  left as they are: {count} arrays {why}")
    lines += [f"  fresh {path}: {why}" for path, why in self.fresh.items() if why not in _CHOSEN]
    lines += [f"  unused {path}" for path in self.unused]
    return "\n".join(lines)

  @property
  def rows_of_tokens(self) -> list[str]:
    """The paths that were taken and have a row or column for each token."""
    return [path for path in (*self.taken, *self.resampled) if _OF_TOKENS.search(path)]

  def save(self, path: epath.PathLike) -> None:
    """Write everything as JSON."""
    text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
    fs.write_atomic(str(path), text.encode())


class InitPlan(NamedTuple):
  """What `init_from` will do; nothing is read yet.

  Attributes:
    source: where parameters come from.
    resample: path -> function from the array of the source to that of the model.
    report: what becomes of every parameter.
  """

  source: InitSource
  resample: dict[str, Resample]
  report: InitReport

  def apply(self, params: PyTree) -> PyTree:
    """Return `params`, the arrays that the plan was made for, with those of the source in place."""
    new = flatten_paths(params)
    wanted = {path: self.source.arrays[path] for path in (*self.report.taken, *self.resample)}
    read = self.source.read({path: _target(old, new[path]) for path, old in wanted.items()})
    for path, function in self.resample.items():
      read[path] = jax.jit(function, out_shardings=new[path].sharding)(read[path])
    return jax.tree_util.tree_map_with_path(
      lambda p, leaf: read[path_str(p)].astype(leaf.dtype) if path_str(p) in read else leaf, params
    )


def init_from(
  source: epath.PathLike,
  params: PyTree,
  *,
  step: int | None = None,
  part: Part = "params",
  **options: Any,
) -> tuple[PyTree, InitReport]:
  """Copy what fits from a checkpoint into fresh parameters.

  Args:
    source: workdir, folder of checkpoints or one checkpoint, see `init_source.open_source`.
    params: arrays of the new model, fresh or from another source, with their final shardings.
    step: which checkpoint, by default the newest.
    part: the trained parameters or their average.
    **options: of `plan_init`.

  Returns:
    Arrays in the tree and the shardings of `params`, and the report.

  Raises:
    ValueError: if a regex matches no parameter, or nothing at all fits.
    CheckpointError: if there is no intact checkpoint.
  """
  plan = plan_init(open_source(source, step, part), params, **options)
  return plan.apply(params), plan.report


def plan_init(
  source: InitSource,
  params: PyTree,
  *,
  include: Sequence[str] = (),
  exclude: Sequence[str] = (),
  patch_resize: Literal["pseudoinverse", "bilinear"] = "pseudoinverse",
) -> InitPlan:
  """Compare a source with a model, without reading arrays.

  Args:
    source: opened by `open_source`.
    params: arrays of the new model, or their shapes and dtypes.
    include: regexes of paths to take; none means all.
    exclude: regexes of paths to leave fresh.
    patch_resize: see `resize_patches`.

  Returns:
    What is taken, resampled and left fresh.

  Raises:
    ValueError: if a regex is broken or matches no parameter, or nothing at all fits.
  """
  if patch_resize not in ("pseudoinverse", "bilinear"):
    raise ValueError(f"init_from patch_resize={patch_resize!r}; expected pseudoinverse or bilinear")
  new, old = flatten_paths(params), source.arrays
  for name, regexes in (("include", include), ("exclude", exclude)):
    for regex in regexes:
      if not any(_matches(name, regex, path) for path in new):
        raise ValueError(
          f"init_from {name}={regex!r} matches no parameter; paths are such as {_some(new)}."
        )

  taken: list[str] = []
  resampled: dict[str, str] = {}
  functions: dict[str, Resample] = {}
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
        resampled[path] = f"{_shape(old[path])} -> {_shape(leaf)}, {fit[0]}"
        functions[path] = fit[1]
  if not taken and not resampled:
    raise ValueError(
      f"nothing in {source.name} fits the model: it holds {_some(old)}; the model has {_some(new)}."
    )
  report = InitReport(
    source=source.name,
    tokenizer=source.tokenizer,
    notes=source.notes,
    taken=tuple(taken),
    resampled=resampled,
    fresh=fresh,
    unused=tuple(path for path in old if path not in new),
  )
  return InitPlan(source, functions, report)


def check_tokenizer(report: InitReport, fingerprint: str) -> None:
  """Check that the rows of tokens that were taken mean the same tokens here.

  Args:
    report: of `init_from`.
    fingerprint: of the tokenizer of this run.

  Raises:
    ValueError: they come from a run with another tokenizer; says what to do.
  """
  rows = report.rows_of_tokens
  if rows and report.tokenizer not in (None, fingerprint):
    raise ValueError(
      f"{', '.join(rows)} of {report.source} belong to another tokenizer ({report.tokenizer}) than "
      f"this run's ({fingerprint}), so token numbers would mean other words; start in a new "
      "workdir with config.tokenizer.path set to the tokenizer folder of that run, or leave them "
      f"fresh with config.init_from.exclude=({_OF_TOKENS.pattern!r},)"
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


def _matches(name: str, regex: str, path: str) -> bool:
  try:
    return re.search(regex, path) is not None
  except re.error as error:
    raise ValueError(f"init_from {name}={regex!r} is no regular expression: {error}") from error


def _target(old: jax.ShapeDtypeStruct, new: jax.Array) -> jax.ShapeDtypeStruct:
  """Where an array is read to: equal shapes as the new one, others replicated."""
  sharding = new.sharding
  if old.shape != new.shape and isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=sharding)


def _shape(array: Any) -> str:
  return str(list(array.shape))


def _some(paths: Any) -> str:
  paths = list(paths)
  return ", ".join(paths[:: max(1, len(paths) // 5)][:6])
