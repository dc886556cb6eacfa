"""Whether a library computes what we compute: the same inputs, array by array, judged and named.

Both sides give arrays under the names of `clients/client_io.py`. What the library offers is
compared in the order of computation, so that the first failing row names the first failing block.
A wrong epsilon or activation can hide below any tolerance of values; so the library also tells its
settings, and those are compared exactly.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import os
from typing import Any

import numpy as np

EMBEDDING_TOLERANCE = 1e-4  # absolute, of vectors of length 1, in float32
_LEVELS = 255 * 0.226  # 8-bit levels in a unit of normalised pixels, by the mean of `std`

# Preprocessing is compared in 8-bit levels, by the mean. Ours cuts fractions off, libraries round:
# 0.4 to 0.5 on photos and drawings at 48 to 224 px. Another filter changes it to 0.85 (bicubic,
# drawings at 224 px) and much more. Where the middle is cut out, libraries round sizes and margins
# each in its way, which moves the picture by a pixel: up to 24 levels on a photo full of detail at
# 48 px. So pictures of a shape that leaves nothing to round are judged, and the others only told
# from a crop that is missing or should not be there (35 and more).
PIXEL_TOLERANCE = 0.7
ROUNDED_CROP_TOLERANCE = 30.0

PIXELS = "image/pixels"
ROUNDED_PIXELS = "image/pixels, rounded crop"


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison.

  Attributes:
    name: of the array, or of the setting.
    max_abs: largest absolute difference; of pixels in 8-bit levels; of ids the share of texts that
      differ.
    cosine: smallest cosine of two rows; None where it says nothing.
    tolerance: what `measured` may reach.
    measured: what is judged: `max_abs`, for pixels their mean difference.
    problem: what is wrong beside a number; "" if nothing is.
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
  """What a client script wrote: arrays, settings of the loaded model, versions of its libraries."""

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
) -> list[Row]:
  """Judges every array that both sides have, and the settings of the library.

  Args:
    ours: arrays by name, in the order of computation.
    theirs: what the library gave.
    required: names that it must have given.
    exact_crops: of so many pictures, the first, nothing has to be rounded to cut out the middle;
      None for all.

  Returns:
    A row for each array of ours that the library has or should have, and for each wrong setting.
  """
  required = set(required)
  rows = []
  for name, array in ours.items():
    if name not in theirs.arrays:
      if name in required:
        problem = "the library gave no such output"
        rows.append(Row(name, np.inf, None, 0.0, np.inf, problem))
    elif name == PIXELS and exact_crops is not None and array.shape == theirs.arrays[name].shape:
      whole = theirs.arrays[name]
      rows.append(_row(name, array[:exact_crops], whole[:exact_crops]))
      rows.append(_row(ROUNDED_PIXELS, array[exact_crops:], whole[exact_crops:]))
    else:
      rows.append(_row(name, array, theirs.arrays[name]))
  return rows + _wrong_settings(theirs.facts)


def first_failure(rows: Iterable[Row]) -> Row | None:
  """The first row that is not ok: settings first, for they explain what follows."""
  failed = [row for row in rows if not row.ok]
  settings = [row for row in failed if row.name.startswith("setting ")]
  return next(iter(settings or failed), None)


def explain(row: Row) -> str:
  """One line on a row that failed."""
  if row.problem:
    return f"{row.name}: {row.problem}"
  if row.name.endswith("/ids"):
    return f"{row.name}: {row.max_abs:.0%} of the rows differ"
  if row.name in (PIXELS, ROUNDED_PIXELS):
    return (
      f"{row.name}: preprocessed pictures differ by {row.measured:.2f} of 255 levels in the mean "
      f"(at most {row.max_abs:.0f}); the filter, the crop or the normalisation is another"
    )
  return f"{row.name} differs by {row.max_abs:.1e}, tolerance {row.tolerance:.1e}"


def table(rows: Iterable[Row]) -> str:
  """Rows as aligned text; blocks in one line, by their worst."""
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
  """The blocks of a tower as one row where all are ok."""
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
    return Row(name, np.inf, None, 0.0, np.inf, "holds values that are not finite")
  difference = np.abs(ours.astype(np.float64) - theirs)
  largest = float(difference.max(initial=0))
  if name in (PIXELS, ROUNDED_PIXELS):
    mean = float(difference.mean() * _LEVELS)
    limit = PIXEL_TOLERANCE if name == PIXELS else ROUNDED_CROP_TOLERANCE
    return Row(name, largest * _LEVELS, _cosine(ours, theirs), limit, mean)
  # Relative to what the array reaches, but for vectors of length 1.
  scale = 1.0 if kind == "embedding" else max(1.0, float(np.abs(ours).max(initial=0)))
  return Row(name, largest, _cosine(ours, theirs), EMBEDDING_TOLERANCE * scale, largest)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """The smallest cosine of two rows along the last axis; of whole pictures."""
  rows = a.shape[0] if a.ndim == 4 else -1
  x, y = (v.reshape(rows, -1 if a.ndim == 4 else v.shape[-1]).astype(np.float64) for v in (a, b))
  lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
  return float(np.min((x * y).sum(axis=1) / np.maximum(lengths, 1e-30), initial=1.0))


def _wrong_settings(facts: Mapping[str, Any]) -> list[Row]:
  rows = []
  for name, value in facts.items():
    expected = _expected_setting(name)
    if expected is not None and value != expected:
      rows.append(
        Row(f"setting {name}", np.inf, None, 0.0, np.inf, f"is {value}, expected {expected}")
      )
  return rows


def _expected_setting(name: str) -> Any:
  """What a setting of the towers must be; None for one that has no say."""
  if name.endswith("layer norm eps"):
    return 1e-6
  if name.endswith("activation"):
    return "gelu tanh" if name.startswith(("text/", "decoder/")) else "gelu"
  return None
