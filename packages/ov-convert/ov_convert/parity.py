"""Comparison of the outputs of another library with ours on the same inputs.

Both sides provide arrays under the names of `clients/client_io.py`. Arrays are compared in the
order of computation, so the first failing row is the first failing block. A wrong epsilon or
activation can be below any tolerance, so settings of the layers are compared as well, exactly.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import os
from typing import Any

import numpy as np

EMBEDDING_TOLERANCE = 1e-4  # absolute, for unit vectors in float32
_LEVELS = 255 * 0.226  # 8-bit levels per unit of normalised pixels, for the mean of `std`

# Preprocessing is compared by the mean difference in 8-bit levels. Ours truncates, libraries round:
# 0.4 to 0.5 on photos and drawings at 48 to 224 px. Another filter gives 0.85 (bicubic, drawings at
# 224 px) or much more. For center crops, libraries round sizes and margins differently, which moves
# the image by a pixel: up to 24 levels on a detailed photo at 48 px. So the strict tolerance only
# applies to images without such rounding; for others, the loose one detects a missing or unexpected
# crop (35 or more).
PIXEL_TOLERANCE = 0.7
ROUNDED_CROP_TOLERANCE = 30.0

PIXELS = "image/pixels"
ROUNDED_PIXELS = "image/pixels, rounded crop"


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison.

  Attributes:
    name: name of the array or setting.
    max_abs: largest absolute difference; for pixels in 8-bit levels; for ids the fraction of
      differing texts.
    cosine: smallest cosine of two rows; None if it is not meaningful.
    tolerance: upper bound of `measured`.
    measured: quantity that is tested: `max_abs`, or for pixels the mean difference.
    problem: failure other than a difference of values; "" if none.
  """

  name: str
  max_abs: float
  cosine: float | None
  tolerance: float
  measured: float
  problem: str = ""

  @property
  def ok(self) -> bool:
    return not self.problem and self.measured <= self.tolerance

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"ok": self.ok}


@dataclasses.dataclass(frozen=True)
class Output:
  """Output of a client script: arrays, settings of the loaded model, library versions."""

  arrays: dict[str, np.ndarray]
  facts: dict[str, Any]
  versions: dict[str, str]

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Output":
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files if name != "about"}
      about = json.loads(str(file["about"]))
    return cls(arrays, about["facts"], about["versions"])


def compare(
  ours: Mapping[str, np.ndarray],
  theirs: Output,
  required: Iterable[str] = (),
  exact_crops: int | None = None,
  settings: Mapping[tuple[str, str], Any] | None = None,
) -> list[Row]:
  """Compare all arrays that both sides have, and check the settings of the library.

  Args:
    ours: arrays by name, in the order of computation.
    theirs: output of the library.
    required: names of arrays that the library must provide.
    exact_crops: number of leading images whose center crop needs no rounding; None for all.
    settings: expected values, see `settings_of`; None for OpenVision.

  Returns:
    A row for each array of ours that the library provides or must provide, and for each wrong
    setting.
  """
  required = set(required)
  rows = []
  for name, array in ours.items():
    if name not in theirs.arrays:
      if name in required:
        problem = "the library did not return this output"
        rows.append(Row(name, np.inf, None, 0.0, np.inf, problem))
    elif name == PIXELS and exact_crops is not None and array.shape == theirs.arrays[name].shape:
      pixels = theirs.arrays[name]
      rows.append(_row(name, array[:exact_crops], pixels[:exact_crops]))
      rows.append(_row(ROUNDED_PIXELS, array[exact_crops:], pixels[exact_crops:]))
    else:
      rows.append(_row(name, array, theirs.arrays[name]))
  return rows + _wrong_settings(theirs.facts, _OPENVISION if settings is None else settings)


def first_failure(rows: Iterable[Row]) -> Row | None:
  """Return the first failing row, or None; settings first, because they explain other failures."""
  failed = [row for row in rows if not row.ok]
  settings = [row for row in failed if row.name.startswith("setting ")]
  return next(iter(settings or failed), None)


def explain(row: Row) -> str:
  """Return a one-line description of a failing row."""
  if row.problem:
    return f"{row.name}: {row.problem}"
  if row.name.endswith("/ids"):
    return f"{row.name}: {row.max_abs:.0%} of the rows differ"
  if row.name in (PIXELS, ROUNDED_PIXELS):
    return (
      f"{row.name}: preprocessed images differ by {row.measured:.2f} of 255 levels in the mean "
      f"(at most {row.max_abs:.0f}); check the filter, the crop and the normalization"
    )
  return f"{row.name} differs by {row.max_abs:.1e}, tolerance {row.tolerance:.1e}"


def table(rows: Iterable[Row]) -> str:
  """Return rows as an aligned table, with passing blocks merged into one line."""
  lines = [f"  {'':27} {'difference':>10} {'cosine':>11} {'tolerance':>10}"]
  for row in merge_blocks(rows):
    cosine = "-" if row.cosine is None else f"{row.cosine:.8f}"
    verdict = "ok" if row.ok else f"FAILS  {row.problem}".rstrip()
    amount, limit = f"{row.max_abs:.1e}", f"{row.tolerance:.1e}"
    if row.name in (PIXELS, ROUNDED_PIXELS):
      amount, limit = f"~{row.measured:.2f}/255", f"~{row.tolerance:.1f}/255"
    lines.append(f"  {row.name:27} {amount:>10} {cosine:>11} {limit:>10}  {verdict}")
  return "\n".join(lines)


def merge_blocks(rows: Iterable[Row]) -> list[Row]:
  """Merge passing blocks of a tower into one row, the worst of them."""
  merged: list[Row] = []
  for row in rows:
    tower, _, name = row.name.partition("/")
    if row.ok and name.startswith("block_"):
      label = f"{tower}/blocks"
      if merged and merged[-1].name == label:
        last = merged.pop()
        worst = max(last, row, key=lambda r: r.measured / max(r.tolerance, 1e-30))
        cosine = min(last.cosine or 1.0, row.cosine or 1.0)
        merged.append(dataclasses.replace(worst, name=label, cosine=cosine))
        continue
      row = dataclasses.replace(row, name=label)
    merged.append(row)
  return merged


def _row(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
  kind = name.rpartition("/")[2]
  if ours.shape != theirs.shape:
    problem = f"has shape {theirs.shape}, expected {ours.shape}"
    return Row(name, np.inf, None, 0.0, np.inf, problem)
  if kind == "ids":
    share = float((ours != theirs).any(axis=-1).mean())
    return Row(name, share, None, 0.0, share)
  if not np.isfinite(theirs).all():
    return Row(name, np.inf, None, 0.0, np.inf, "contains NaN or Inf")
  difference = np.abs(ours.astype(np.float64) - theirs)
  largest = float(difference.max(initial=0))
  if name in (PIXELS, ROUNDED_PIXELS):
    mean = float(difference.mean() * _LEVELS)
    limit = PIXEL_TOLERANCE if name == PIXELS else ROUNDED_CROP_TOLERANCE
    return Row(name, largest * _LEVELS, _cosine(ours, theirs), limit, mean)
  # Relative to the largest entry, except for unit vectors.
  scale = 1.0 if kind == "embedding" else max(1.0, float(np.abs(ours).max(initial=0)))
  return Row(name, largest, _cosine(ours, theirs), EMBEDDING_TOLERANCE * scale, largest)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """Return the smallest cosine of two rows along the last axis, or of two images."""
  rows = a.shape[0] if a.ndim == 4 else -1
  x, y = (v.reshape(rows, -1 if a.ndim == 4 else v.shape[-1]).astype(np.float64) for v in (a, b))
  lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
  return float(np.min((x * y).sum(axis=1) / np.maximum(lengths, 1e-30), initial=1.0))


_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu tanh", "quick_gelu": "quick gelu"}


def settings_of(config: Any) -> dict[tuple[str, str], Any]:
  """Return the settings of the layers of a model that a library must have.

  Keys are the prefix of a tower and the end of the name of a setting, such as ("image/",
  "activation").

  Args:
    config: configuration of the model.
  """
  found: dict[tuple[str, str], Any] = {}
  alone = not hasattr(config, "encoder")
  towers = {"image/": config if alone else config.encoder}
  towers |= {"text/": getattr(config, "text", None), "decoder/": getattr(config, "decoder", None)}
  for prefix, tower in towers.items():
    if tower is not None:
      found[prefix, "layer norm eps"] = tower.norm_eps
      if tower.activation in _ACTIVATIONS:
        found[prefix, "activation"] = _ACTIVATIONS[tower.activation]
  return found


_OPENVISION: dict[tuple[str, str], Any] = {
  (prefix, name): value
  for prefix, activation in (("image/", "gelu"), ("text/", "gelu tanh"), ("decoder/", "gelu tanh"))
  for name, value in (("layer norm eps", 1e-6), ("activation", activation))
}


def _wrong_settings(facts: Mapping[str, Any], settings: Mapping[tuple[str, str], Any]) -> list[Row]:
  rows = []
  for name, value in facts.items():
    wanted = (
      v for (start, end), v in settings.items() if name.startswith(start) and name.endswith(end)
    )
    expected = next(wanted, None)
    if expected is not None and value != expected:
      rows.append(
        Row(f"setting {name}", np.inf, None, 0.0, np.inf, f"is {value}, expected {expected}")
      )
  return rows
