"""report.html: what a run did, on one self-contained page.

A workdir holds `report.json` (everything on the page except the curves) beside `metrics.jsonl`
(the curves). `python -m apps.trainer.report WORKDIR` makes the page again from the two.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import re
import statistics
import sys
from typing import Any

import jinja2
import numpy as np

from apps.trainer import charts, gallery, report_text
from apps.trainer.gallery import Gallery
from apps.trainer.report_paths import relative
from apps.trainer.report_text import Mark, data_url
from apps.trainer.sinks import read_metrics
from ov_data import fs
from ov_eval import Result

# What matters most, whatever the task; a run has some of them.
HEADLINE = (
  "attribute_accuracy", "zero_shot_top1", "img2txt_r1", "txt2img_r1", "knn_top1", "probe_top1",
  "caption_nll", "caption_perplexity",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample:
  """A picture with its generated and true captions.

  Attributes:
    image: uint8 [H, W, 3] (or [H, W]), or a data URL made by `data_url`.
    generated: the model's caption.
    references: true captions.
    right, total: attributes right and checked; None where there is no ground truth.
  """

  image: np.ndarray | str
  generated: str
  references: tuple[str, ...]
  right: int | None = None
  total: int | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of the run and its first step."""

  name: str
  first_step: int


@dataclasses.dataclass(frozen=True)
class ClassTable:
  """Zero-shot classification: confusion counts [C, C], row = true class."""

  class_names: tuple[str, ...]
  counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReportData:
  """What the page shows besides the curves; plain values only.

  Attributes:
    title: such as the name of the configuration.
    results: final figures; those named in `headline` stand large on top.
    summary: facts of the run, in order: parameters, steps, examples, wall time, hardware.
    stages: for the marks in the curves; one stage needs no mark.
    samples: pictures in the order of the held-out data, not chosen.
    samples_note: how they were selected and which step they are from.
    attribute_words: words that say an attribute; only these are marked. Empty marks every word.
    classes: zero-shot classification, if there was one.
    galleries: of retrieval or of mistakes; at most `gallery.MOST_ROWS` rows of each are shown.
    data: {heading: {fact: value}}, such as {"Training": {"records": 50000}}.
    skipped: records left out, by reason.
    config: resolved configuration, nested.
    versions: of Python and libraries (see `versions`).
  """

  title: str
  results: tuple[Result, ...] = ()
  headline: tuple[str, ...] = HEADLINE
  summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stages: tuple[Stage, ...] = ()
  samples: tuple[Sample, ...] = ()
  samples_note: str = ""
  attribute_words: tuple[str, ...] = ()
  classes: ClassTable | None = None
  galleries: tuple[Gallery, ...] = ()
  data: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Errors of JSON of another form.
_MALFORMED = (
  ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
  jinja2.UndefinedError,
)  # fmt: skip


def key_figures(results: Sequence[Result], names: Sequence[str] = HEADLINE) -> list[Result]:
  """The results of these names, in their order."""
  by_name = {result.name: result for result in results}
  return [by_name[name] for name in names if name in by_name]


def write_report(workdir: str | os.PathLike[str], data: ReportData) -> Path:
  """Writes report.json and report.html into the workdir; curves come from its metrics.jsonl.

  Call it on one process only; cheap enough for every evaluation. Paths in it are relative to the
  workdir.

  Returns:
    The path of report.html.
  """
  workdir = Path(workdir)
  names = ("summary", "samples_note", "data", "config")
  data = dataclasses.replace(
    data,
    results=tuple(
      dataclasses.replace(r, context=relative(r.context, workdir)) for r in data.results
    ),
    **{name: relative(getattr(data, name), workdir) for name in names},
  )
  text = json.dumps(_to_json(data), indent=1, default=_plain_value, allow_nan=False)
  _replace(workdir / "report.json", text + "\n")
  return _write_page(workdir, data)


def remake_report(workdir: str | os.PathLike[str]) -> Path:
  """Makes report.html again from report.json and metrics.jsonl of a workdir.

  Raises:
    FileNotFoundError: if the workdir has no report.json.
    ValueError: if that is not as a run wrote it.
  """
  path = Path(workdir) / "report.json"
  try:
    return _write_page(Path(workdir), _from_json(json.loads(path.read_text(encoding="utf-8"))))
  except _MALFORMED as error:
    raise ValueError(
      f"{path} is not a report that a run wrote ({type(error).__name__}: {str(error)[:200]}); "
      "give the command of the run again to write it"
    ) from error


def versions(
  packages: Sequence[str] = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "tokenizers",
    "tensorflow-cpu", "tensorflow",
  ),
) -> dict[str, str]:  # fmt: skip
  """Versions of the interpreter, the system and those of the packages that are installed."""
  found = {"python": platform.python_version(), "system": platform.platform()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


# Title and curves of the main charts; metrics not named here follow in a folded section.
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
  ("Training loss", {"train/loss": ""}),
  ("NLL per token", {"train/caption_nll": "train", "eval/caption_nll": "held out"}),
  ("Attribute accuracy, held out", {"eval/attribute_accuracy": ""}),
  ("Zero-shot", {"eval/zero_shot_top5": "top-5", "eval/zero_shot_top1": "top-1"}),
  (
    "Retrieval, right one first",
    {"eval/txt2img_r1": "picture for a text", "eval/img2txt_r1": "text for a picture"},
  ),
  ("Frozen features, top-1", {"eval/probe_top1": "linear probe", "eval/knn_top1": "kNN"}),
  ("Contrastive loss", {"train/clip_loss": "softmax", "train/siglip_loss": "sigmoid"}),
  (
    "Retrieval within the batch",
    {"train/text_top1": "picture for a text", "train/image_top1": "text for a picture"},
  ),
  ("Similarity", {"train/mean_positive": "pairs", "train/mean_negative": "others"}),
  ("Inverse temperature", {"train/scale": ""}),
  ("Token accuracy", {"train/token_accuracy": "train", "eval/token_accuracy": "held out"}),
  ("Learning rate", {"train/learning_rate": ""}),
  ("Gradient norm", {"train/grad_norm": ""}),
  ("Images per second", {"train/images_per_second": ""}),
  ("Time spent waiting for input", {"train/input_wait": ""}),
  ("Model FLOPs utilisation", {"train/mfu": ""}),
)
_SHARE = re.compile(  # metrics from 0 to 1
  r"accuracy|top\d|_r\d|mfu|input_wait|share|correct|exact_match|distinct|mean_per_class"
)
_EXACT = ("train/learning_rate", "train/scale")  # not noisy: drawn as it is


def curves(
  metrics: Sequence[Mapping[str, float]], stages: Sequence[Stage]
) -> tuple[list[charts.Chart], list[charts.Chart]]:
  """The main charts and all others, from the lines of metrics.jsonl."""
  points: dict[str, list[tuple[float, float]]] = {}
  for line in metrics:
    for name, value in line.items():
      if name != "step":
        points.setdefault(name, []).append((line["step"], value))
  marks = [(stage.first_step, stage.name) for stage in stages] if len(stages) > 1 else []

  def chart(title: str, labels: Mapping[str, str]) -> charts.Chart | None:
    series = [
      charts.Series(label, points.pop(name)) for name, label in labels.items() if name in points
    ]
    names = list(labels)
    percent, smooth = bool(_SHARE.search(names[0])), names[0] not in _EXACT
    return charts.draw(title, series, percent=percent, smooth=smooth, marks=marks)

  main = [chart(title, labels) for title, labels in _PANELS]
  rest = [chart(name, {name: ""}) for name in sorted(points)]
  return [c for c in main if c], [c for c in rest if c]


def _write_page(workdir: Path, data: ReportData) -> Path:
  metrics_file = workdir / "metrics.jsonl"
  page = workdir / "report.html"
  _replace(page, render(data, read_metrics(metrics_file) if metrics_file.exists() else []))
  return page


def render(data: ReportData, metrics: Sequence[Mapping[str, float]]) -> str:
  """The page as text. Everything shown is escaped; nothing is loaded from elsewhere."""
  main, rest = curves(metrics, data.stages)
  kinds = [r for r in data.results if r.name.startswith("attribute_accuracy/")]
  samples = [_sample_view(sample, data.attribute_words) for sample in data.samples]
  wrong = [s for s in samples if s["total"] and s["right"] < s["total"]]
  return _template().render(
    data=data,
    headline=key_figures(data.results, data.headline),
    kinds=kinds,
    charts=main,
    more_charts=rest,
    samples=samples,
    marked=any(s["total"] for s in samples),
    wide=bool(samples) and statistics.median(s["length"] for s in samples) > 240,
    mistakes=sorted(wrong, key=lambda s: s["right"] / s["total"])[:8],
    classes=_class_view(data.classes) if data.classes else None,
    galleries=[gallery.view(one) for one in data.galleries if one.rows],
    config=report_text.flat(data.config),
  )


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters.update(
    figure=report_text.figure,
    interval=report_text.interval,
    label=report_text.label,
    plain=report_text.plain,
  )
  source = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
  return environment.from_string(source)


def _sample_view(sample: Sample, attribute_words: Sequence[str]) -> dict[str, Any]:
  generated: list[tuple[str, Mark]] = [(sample.generated, "")]
  reference: list[tuple[str, Mark]] = [(text, "") for text in sample.references[:1]]
  if sample.total and sample.references:
    generated, reference = report_text.mark_words(
      sample.generated, sample.references[0], attribute_words
    )
    if sample.right == sample.total:  # right in other words is right
      generated = [(word, "right" if mark else "") for word, mark in generated]
      reference = [(word, "") for word, _ in reference]
  return {
    "image": sample.image if isinstance(sample.image, str) else data_url(sample.image),
    "generated": report_text.runs(generated),
    "reference": report_text.runs(reference),
    "others": sample.references[1:],
    "right": sample.right,
    "total": sample.total,
    "length": len(sample.generated) + sum(map(len, sample.references)),
  }


def _class_view(table: ClassTable) -> dict[str, Any]:
  counts = np.asarray(table.counts)
  totals = counts.sum(1)
  recall = counts.diagonal() / np.maximum(totals, 1)
  rows: list[dict[str, Any]] = [
    {
      "name": name,
      "count": int(totals[i]),
      "recall": float(recall[i]),
      "cells": [(int(n), float(n / max(totals[i], 1))) for n in counts[i]],
    }
    for i, name in enumerate(table.class_names)
  ]
  wrong = counts - np.diag(counts.diagonal())
  order = np.argsort(-wrong, axis=None, kind="stable")[:12]
  confused = [
    (table.class_names[i], table.class_names[j], int(wrong[i, j]))
    for i, j in zip(*np.unravel_index(order, wrong.shape))
    if wrong[i, j]
  ]
  return {
    "rows": rows,
    "matrix": len(rows) <= 24,
    "worst": sorted((r for r in rows if r["count"]), key=lambda r: r["recall"])[:12],
    "confused": confused,
  }


def _replace(path: Path, text: str) -> None:
  fs.write_atomic(str(path), text.encode("utf-8"))


def _to_json(data: ReportData) -> dict[str, Any]:
  samples = [
    dataclasses.replace(s, image=s.image if isinstance(s.image, str) else data_url(s.image))
    for s in data.samples
  ]
  galleries = tuple(gallery.shrunk(one) for one in data.galleries)
  plain = dataclasses.asdict(dataclasses.replace(data, samples=tuple(samples), galleries=galleries))
  for result in plain["results"]:
    for name in ("value", "low", "high"):
      if result[name] is not None and not math.isfinite(result[name]):
        result[name] = None
  if data.classes:
    plain["classes"]["counts"] = np.asarray(data.classes.counts).tolist()
  return plain


def _from_json(plain: dict[str, Any]) -> ReportData:
  classes = plain.pop("classes")
  if classes:
    classes = ClassTable(tuple(classes["class_names"]), np.array(classes["counts"]))
  for name, kind in {"results": Result, "stages": Stage, "samples": Sample}.items():
    plain[name] = tuple(kind(**entry) for entry in plain[name])
  plain["galleries"] = tuple(map(gallery.from_json, plain["galleries"]))
  results = [
    r if r.value is not None else dataclasses.replace(r, value=math.nan)
    for r in plain.pop("results")
  ]
  return ReportData(**plain, results=tuple(results), classes=classes)


def _plain_value(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic) else str(value)


def _main(arguments: list[str]) -> int:
  if len(arguments) != 1:
    print("usage: python -m apps.trainer.report WORKDIR", file=sys.stderr)
    return 2
  try:
    print(remake_report(arguments[0]))
  except (ValueError, OSError) as error:
    print(f"report: error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(_main(sys.argv[1:]))
