"""Initialisation of a run from the parameters of another one, with any resolution or patch size.

  plan = plan_init(open_source(workdir_of_the_other_run), state["params"])
  print(plan.report.text())
  state = state_lib.replace_params(state, plan.apply(state["params"]))

Parameters are matched by path. For a path of both models:

  same shape                      copied
  position table of a tower with  grid resampled (`ov_models.resample_positions`); square grids
    patches  [1 + h * w, D]
  other position table [T, D]     rows resampled linearly
  patch embedding [P, P, 3, D]    resized to the new patch size, see `resize_patches`
  anything else (depth, width,    kept fresh, with the reason
    vocabulary)

Parameters of the new model only stay fresh, those of the old model only are unused; the report
lists both. The other run may be one of the released OpenVision code, see `init_source`. Towers can
be initialised from several runs: plan each of them, with `include`. Optimizer state, step and
data position are not changed.
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

from apps.trainer.config import InitSettings
from apps.trainer.init_source import InitSource, open_source
from apps.trainer.paths import flatten_paths, path_str
from ov_data import fs
import ov_models

PyTree = Any
Resample = Callable[[jax.Array], jax.Array]

_TOKEN_ROWS = re.compile("embed/embedding$|decoder/head/kernel$")  # one row or column per token
# Expected reasons to keep a parameter.
_EXPECTED = ("not included", "excluded", "of adapters")


@dataclasses.dataclass(frozen=True)
class InitReport:
  """Report on every parameter of the new and of the old model.

  Attributes:
    source: directory of the checkpoint.
    tokenizer: fingerprint of the tokenizer of the source; None if unknown.
    notes: further remarks on the source.
    taken: paths that were copied unchanged.
    resampled: path -> description of the resampling.
    fresh: path -> reason why it keeps its value.
    unused: paths that only the old model has.
  """

  source: str
  tokenizer: str | None
  notes: tuple[str, ...]
  taken: tuple[str, ...]
  resampled: dict[str, str]
  fresh: dict[str, str]
  unused: tuple[str, ...]

  def text(self) -> str:
    """Return a summary for the terminal; expected cases are only counted."""
    lines = [f"initialised from {self.source}: {len(self.taken)} arrays copied"]
    lines += [f"  note: {note}" for note in self.notes]
    if self.tokenizer is None and (rows := self.rows_of_tokens):
      lines.append(
        f"  note: {', '.join(rows)} fit the vocabulary of that run only, and the checkpoint does "
        "not name it: config.tokenizer.path must be that vocabulary"
      )
    lines += [f"  resampled {path}: {how}" for path, how in self.resampled.items()]
    for why in _EXPECTED:
      if count := list(self.fresh.values()).count(why):
        lines.append(f"  unchanged: {count} arrays {why}")
    lines += [f"  fresh {path}: {why}" for path, why in self.fresh.items() if why not in _EXPECTED]
    lines += [f"  unused {path}" for path in self.unused]
    return "\n".join(lines)

  @property
  def rows_of_tokens(self) -> list[str]:
    """Return the copied paths that have one row or column per token."""
    return [path for path in (*self.taken, *self.resampled) if _TOKEN_ROWS.search(path)]

  def save(self, path: epath.PathLike) -> None:
    """Write the report as JSON."""
    text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
    fs.write_atomic(str(path), text.encode())


class InitPlan(NamedTuple):
  """Plan of `plan_init`; no array is read yet.

  Attributes:
    source: source of the parameters.
    resample: path -> function from the array of the source to that of the model.
    report: report on every parameter.
  """

  source: InitSource
  resample: dict[str, Resample]
  report: InitReport

  def apply(self, params: PyTree) -> PyTree:
    """Return `params`, the arrays that the plan was made for, with those of the source inserted."""
    new = flatten_paths(params)
    wanted = {path: self.source.arrays[path] for path in (*self.report.taken, *self.resample)}
    read = self.source.read({path: _target(old, new[path]) for path, old in wanted.items()})
    for path, function in self.resample.items():
      read[path] = jax.jit(function, out_shardings=new[path].sharding)(read[path])
    return jax.tree_util.tree_map_with_path(
      lambda p, leaf: read[path_str(p)].astype(leaf.dtype) if path_str(p) in read else leaf, params
    )


def plan_init(
  source: InitSource,
  params: PyTree,
  *,
  include: Sequence[str] = (),
  exclude: Sequence[str] = (),
  patch_resize: Literal["pseudoinverse", "bilinear"] = "pseudoinverse",
  position_resize: Literal["bilinear", "bicubic"] = "bilinear",
) -> InitPlan:
  """Match the parameters of a source and of a model, without reading arrays.

  Args:
    source: source returned by `open_source`.
    params: arrays of the new model, or their shapes and dtypes.
    include: regexes of paths to copy; empty means all.
    exclude: regexes of paths to keep fresh.
    patch_resize: method of `resize_patches`.
    position_resize: method of `ov_models.resample_positions` for positions of patches.

  Returns:
    The plan.

  Raises:
    ValueError: a regex matches no parameter, or no parameter fits.
  """
  new, old = flatten_paths(params), source.arrays
  for name, regexes in (("include", include), ("exclude", exclude)):
    for regex in regexes:
      if not any(re.search(regex, path) for path in new):
        raise ValueError(
          f"init_from {name}={regex!r} matches no parameter; examples of paths: {_some(new)}."
        )

  taken: list[str] = []
  resampled: dict[str, str] = {}
  functions: dict[str, Resample] = {}
  fresh: dict[str, str] = {}
  for path, leaf in new.items():
    if include and not any(re.search(regex, path) for regex in include):
      fresh[path] = _EXPECTED[0]
    elif any(re.search(regex, path) for regex in exclude):
      fresh[path] = _EXPECTED[1]
    elif path.startswith(f"{ov_models.ADAPTERS}/"):
      fresh[path] = _EXPECTED[2]
    elif path not in old:
      fresh[path] = "not in the source"
    elif old[path].shape == leaf.shape:
      taken.append(path)
    else:
      fit = _fit(path, old[path].shape, leaf.shape, new.keys(), patch_resize, position_resize)
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


def interpolate(sources: Sequence[InitSettings], params: PyTree, alpha: float) -> PyTree:
  """Return alpha * params + (1 - alpha) * initial, weight-space ensembling as in WiSE-FT.

  Parameters that no source initialized stay unchanged. Paper: Wortsman et al. 2021,
  https://arxiv.org/abs/2109.01903.

  Args:
    sources: sources of the initial parameters, in order.
    params: trained parameters of the model.
    alpha: weight of the trained parameters, in [0, 1].

  Raises:
    ValueError, OSError: a source cannot be read any more, or there is none.
  """
  if not sources:
    raise ValueError(
      f"wise_ft={alpha:g} needs the initial parameters, and the run has none from another run; "
      "set config.init_from.path, or omit it"
    )
  initial = params
  for wanted in sources:
    source = open_source(wanted.path, wanted.step, wanted.part)
    initial = plan_init(source, initial, **wanted.options).apply(initial)
  mean = lambda new, old: alpha * new + (1.0 - alpha) * old
  shardings = jax.tree.map(lambda x: x.sharding, params)
  return jax.jit(lambda new, old: jax.tree.map(mean, new, old), out_shardings=shardings)(
    params, initial
  )


def check_tokenizer(report: InitReport, fingerprint: str) -> None:
  """Check that copied token embeddings belong to the tokenizer of this run.

  Args:
    report: report of a plan.
    fingerprint: fingerprint of the tokenizer of this run.

  Raises:
    ValueError: they belong to another tokenizer; the message includes the remedy.
  """
  rows = report.rows_of_tokens
  if rows and report.tokenizer not in (None, fingerprint):
    raise ValueError(
      f"{', '.join(rows)} of {report.source} belong to another tokenizer ({report.tokenizer}) than "
      f"this run's ({fingerprint}), so token numbers would mean other words; start in a new "
      "workdir with config.tokenizer.path set to the tokenizer folder of that run, or leave them "
      f"fresh with config.init_from.exclude=({_TOKEN_ROWS.pattern!r},)"
    )


def resize_patches(
  kernel: jax.Array, size: int, method: Literal["pseudoinverse", "bilinear"]
) -> jax.Array:
  """Resize a patch embedding [P, P, 3, D] to patches of `size` pixels: [size, size, 3, D].

  "pseudoinverse" minimises the change of the tokens when images are resized with the patches; there
  is no change when patches grow (FlexiViT, Beyer et al. 2022, https://arxiv.org/abs/2212.08013).
  With the row operation x' = b x of bilinear resizing, w' = pinv(b^T) w along both sides.
  "bilinear" resizes the kernel like an image, as the released OpenVision code does from p16 to p8;
  the norm of tokens then changes by about (size / P)^2.
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
  position_resize: Literal["bilinear", "bicubic"],
) -> tuple[str, Resample] | str:
  """Return how an array of another shape is resampled, or why it cannot be."""
  tower, _, name = path.rpartition("/")
  if path.endswith("patch_embed/kernel") and old[2:] == new[2:]:
    return f"{patch_resize} resize", lambda x: resize_patches(x, new[0], patch_resize)
  if name == "position_embedding" and old[1:] == new[1:]:
    if f"{tower}/patch_embed/kernel".lstrip("/") not in paths:
      return "linear", lambda x: jax.image.resize(x, new, "linear", antialias=False)
    prefix = int(f"{tower}/cls".lstrip("/") in paths)
    sides = [math.isqrt(rows - prefix) for rows in (old[0], new[0])]
    if all(side**2 + prefix == rows for side, rows in zip(sides, (old[0], new[0]), strict=True)):
      before, after = ((side, side) for side in sides)
      return position_resize, lambda x: ov_models.resample_positions(
        x, before, after, prefix, position_resize
      )
    return f"position tables of {old[0]} and {new[0]} rows are not {prefix} + a square grid"
  return f"the source has {list(old)}, the model {list(new)}"


def _target(old: jax.ShapeDtypeStruct, new: jax.Array) -> jax.ShapeDtypeStruct:
  """Return the target of a read: sharded like the new array for equal shapes, else replicated."""
  sharding = new.sharding
  if old.shape != new.shape and isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=sharding)


def _shape(array: Any) -> str:
  return str(list(array.shape))


def _some(paths: Any) -> str:
  paths = list(paths)
  return ", ".join(paths[:: max(1, len(paths) // 5)][:6])
