"""Published results of public protocols, and whether a run reproduces them.

A reference has a band of values that count as reproduced. No publication states a spread over
seeds, so the bands are chosen here: 5% of the value, at least half a percentage point, and wider
where independent runs of the same recipe disagree.
"""

import dataclasses
import difflib

from apps.trainer.report_text import figure, interval
from tools.compare.evaluations import Evaluation

_METRIC = "zero_shot_top1"
_IMAGES = 50_000  # validation images of ImageNet
_RELATIVE, _ABSOLUTE = 0.05, 0.005
_INCOMPLETE = 0.3  # pairs of a list of URLs that can no longer be downloaded


@dataclasses.dataclass(frozen=True)
class Reference:
  """A published top-1 accuracy of zero-shot classification on ImageNet.

  Attributes:
    name: argument of `--reference`.
    config: recipe with its arguments, in apps/configs.
    data: training data.
    samples: examples seen in training.
    templates: name of the prompt templates.
    value: published value, 0 to 1.
    source: origin of the value.
    missing: fraction of the samples that a run may lack.
    low: lowest value that counts as reproduced; None takes the chosen tolerance.
    note: reason for `low`.
  """

  name: str
  config: str
  data: str
  samples: int
  templates: str
  value: float
  source: str
  missing: float = 0.01
  low: float | None = None
  note: str = ""

  @property
  def band(self) -> tuple[float, float]:
    """Return the lowest and highest value that count as reproduced."""
    tolerance = max(_RELATIVE * self.value, _ABSOLUTE)
    low = self.value - tolerance if self.low is None else self.low
    return round(low, 6), round(self.value + tolerance, 6)


def find(name: str) -> Reference:
  """Return the reference with this name.

  Raises:
    ValueError: if there is none.
  """
  for reference in REFERENCES:
    if reference.name == name:
      return reference
  names = [reference.name for reference in REFERENCES]
  near = difflib.get_close_matches(name, names, n=1)
  hint = f"did you mean {near[0]}? " if near else ""
  raise ValueError(f"--reference={name}: {hint}expected one of {', '.join(names)}")


def judge(run: Evaluation, reference: Reference) -> tuple[bool, str]:
  """Compare a run with a reference.

  Args:
    run: evaluation of the run.
    reference: published result.

  Returns:
    Whether the run reproduces it, and the verdict without the name of the run: "inside", "below" or
    "above" the band with the numbers, or "not comparable" with all reasons.
  """
  found = [
    result
    for result in run.results
    if result.name == _METRIC and result.context.get("classes") == "imagenet"
  ]
  low, high = reference.band
  band = f"{low:.1%} – {high:.1%}, published {reference.value:.1%}"
  if not found:
    return False, f"not comparable with {band}: no {_METRIC} of the classes imagenet"
  value = found[0]
  templates = value.context.get("templates", "not given")
  least = int(reference.samples * (1 - reference.missing))
  problems = []
  if value.count != _IMAGES:
    problems.append(f"{value.count:,} images instead of {_IMAGES:,}")
  if templates != reference.templates:
    problems.append(f"templates {templates} instead of {reference.templates}")
  if not least <= run.examples_seen <= reference.samples:
    problems.append(
      f"{run.examples_seen:,} samples seen instead of {least:,} to {reference.samples:,}"
    )
  shown = f"{figure(value)} {interval(value)}".rstrip()
  if problems:
    return False, f"{shown}: not comparable with {band}: {'; '.join(problems)}"
  where = "inside" if low <= value.value <= high else "above" if value.value > high else "below"
  return where == "inside", f"{shown}: {where} {band}"


def table() -> str:
  """Return the references as a table in Markdown, for docs/references.md."""
  lines = [
    "| Name | Recipe | Data | Samples | Published | Band | Source |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in REFERENCES:
    low, high = r.band
    samples = f"{'at most ' if r.missing > 0.01 else ''}{r.samples:,}"
    note = f"; {r.note}" if r.note else ""
    lines.append(
      f"| `{r.name}` | `{r.config}` | {r.data} | {samples} | {r.value:.1%} | "
      f"{low:.1%} – {high:.1%}{note} | {r.source} |"
    )
  return "\n".join(lines)


def _datacomp(scale: str, samples: int, values: dict[str, float]) -> list[Reference]:
  pool = f"CommonPool {scale}"
  data = {
    "none": f"{pool}, no filter",
    "basic": f"{pool}, basic filter",
    "text": f"{pool}, text-based filter",
    "image": f"{pool}, image-based filter",
    "laion": f"{pool}, filter of LAION-2B",
    "clip": f"{pool}, filter by CLIP score",
    "best": f"{pool}, subset of DataComp-1B",
  }
  return [
    Reference(
      f"datacomp_{scale}_{name}", f"datacomp.py:scale={scale}", data[name], samples, "openai_80",
      value, "mlfoundations/open_clip, docs/datacomp_models.md",
    )
    for name, value in values.items()
  ]  # fmt: skip


def _slip(
  arguments: str, data: str, samples: int, value: float, low: float | None = None, note: str = ""
) -> Reference:
  values = dict(word.split("=") for word in arguments.split(","))
  return Reference(
    f"{values['data']}_{values['img'].replace('/', '').lower()}", f"slip.py:{arguments}", data,
    samples, "openai_best", value, "facebookresearch/SLIP, README.md", _INCOMPLETE, low, note,
  )  # fmt: skip


REFERENCES = (
  *_datacomp(
    "small",
    12_800_000,
    {
      "none": 0.025, "basic": 0.030, "text": 0.046, "image": 0.043, "laion": 0.031, "clip": 0.051,
      "best": 0.039,
    },
  ),
  *_datacomp(
    "medium",
    128_000_000,
    {
      "none": 0.176, "basic": 0.226, "text": 0.255, "image": 0.268, "laion": 0.230, "clip": 0.273,
      "best": 0.297,
    },
  ),
  _slip(
    "data=cc3m,img=B/16", "CC3M, 40 epochs", 132_710_400, 0.171,
    0.141, "a run by others ends at 14.1%, facebookresearch/SLIP#9",
  ),
  _slip("data=cc12m,img=B/16", "CC12M, 35 epochs", 434_810_880, 0.365),
  _slip("data=yfcc15m,img=B/16", "YFCC15M, 25 epochs", 370_688_000, 0.376),
  _slip("data=yfcc15m,img=S/16", "YFCC15M, 25 epochs", 370_688_000, 0.327),
)  # fmt: skip
