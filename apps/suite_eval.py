"""Evaluator of benchmark suites, with the metrics and the JSON files of CLIP_benchmark.

Prompts are tokenized like captions, without canonicalisation, because CLIP_benchmark passes them
unchanged to the tokenizer. Other evaluators canonicalise prompts, as the released OpenVision code.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
from typing import Any

import numpy as np

from apps import features, suite_data
from apps.clip_eval import Embedder, class_matrix
from apps.label_data import with_labels
from apps.suite_data import OpenSet
from apps.trainer.held_out import HeldOut
from apps.trainer.task import Evaluation, Params
import ov_eval
from ov_eval import Result, Share

FOLDER = "clip_benchmark"
_TASKS = {
  "classification": "zeroshot_classification",
  "retrieval": "zeroshot_retrieval",
  "sugar_crepe": "image_caption_selection",
  "winoground": "image_caption_selection",
  "winogavil": "image_caption_selection",
}
_ASSOCIATION_GROUPS: Mapping[str, tuple[int, int]] = {  # smallest and largest number of candidates
  "5": (5, 5),
  "6": (6, 6),
  "10": (10, 10),
  "12": (12, 12),
  "5-6": (0, 6),
  "10-12": (10, 10**9),
}


class SuiteEvaluator:
  """Zero-shot classification, retrieval and selection on all data sets of a suite."""

  def __init__(self, held_out: HeldOut):
    """Open the data sets, and log those that are missing.

    Raises:
      ValueError: the model has no text tower; see also `suite_data.open_suite`.
    """
    config = held_out.config.eval
    if not held_out.task.model.can_embed_text:
      raise ValueError(
        f"config.eval.suite={config.suite} requires a model with a text tower; set "
        "config.model.text, or leave config.eval.suite empty"
      )
    self._held_out = held_out
    self._embedder = Embedder(held_out)
    self._sets, self._missing = suite_data.open_suite(held_out)
    self._complete = not (self._missing or config.suite_datasets or config.suite_examples)
    found = f"{len(self._sets)} of {len(self._sets) + len(self._missing)} data sets found"
    if self._missing:
      found += f"; missing in {config.suite_dir}: {', '.join(self._missing)}"
    held_out.terminal.phase(f"suite {config.suite}: {found}")

  def __call__(self, params: Params) -> Evaluation:
    suite = self._held_out.config.eval.suite
    results: list[Result] = []
    files: dict[str, str] = {}
    main: list[float] = []
    for opened in self._sets:
      name = opened.data_set.name
      metrics = self._evaluate(opened, params)
      by_name = {result.name: result for result in metrics}
      main.append(by_name[opened.data_set.main].value)
      self._held_out.terminal.phase(f"{name}: {opened.data_set.main} {main[-1]:.4f}")
      results += self._held_out.annotate(
        [dataclasses.replace(result, name=f"{name}/{result.name}") for result in metrics],
        "suite",
        opened.examples,
        suite=suite,
        data_set=name,
      )
      files[f"{FOLDER}/{name.replace('/', '-')}.json"] = self._clip_benchmark_json(opened, metrics)
    context = {"evaluator": "suite", "suite": suite, "missing": self._missing}
    count = Result(f"{suite}/data_sets", len(main), len(main), context=context)
    mean = Result(f"{suite}/mean", float(np.mean(main)), len(main), unit="share", context=context)
    # The mean of an incomplete suite is not comparable with published ones.
    results += [mean, count] if self._complete else [count]
    return Evaluation(tuple(results), files=files)

  def _evaluate(self, opened: OpenSet, params: Params) -> list[Result]:
    kind = opened.data_set.kind
    if kind == "retrieval":
      return self._retrieval(opened, params)
    if kind == "winogavil":
      return self._associations(opened, params)
    if kind != "classification":
      return self._selection(opened, params)
    return (self._multilabel if opened.multilabel else self._classification)(opened, params)

  def _classification(self, opened: OpenSet, params: Params) -> list[Result]:
    count = len(opened.classes)
    matrix, prompts_hash = self._class_matrix(opened, params)
    batches = self._held_out.batches(opened.data_set.name, opened.examples)
    found, predictions = ov_eval.classify_by_embedding(
      self._embed(params),
      matrix,
      with_labels(batches, opened.label_key, {i: i for i in range(count)}),
    )
    name = opened.data_set.name.replace("/", "-")
    self._held_out.write_predictions(f"suite_{name}", predictions.records(list(opened.classes)))
    top5 = found.top5.result("acc5")
    if count < 5:  # undefined, as in CLIP_benchmark
      top5 = Result("acc5", math.nan, top5.count, unit="share")
    mean = found.confusion.mean_per_class()
    metrics = [
      found.top1.result("acc1"),
      top5,
      Result("mean_per_class_recall", mean, found.top1.count, unit="share"),
      *_group_metrics(opened, predictions),
    ]
    if opened.data_set.macro_f1:
      f1 = found.confusion.macro_f1()
      metrics += [
        Result("recall-macro_all", mean, found.top1.count, unit="share"),
        Result("F1-macro_all", f1, found.top1.count, unit="share"),
      ]
    return ov_eval.with_context(metrics, templates_hash=prompts_hash)

  def _multilabel(self, opened: OpenSet, params: Params) -> list[Result]:
    matrix, prompts_hash = self._class_matrix(opened, params)
    found = ov_eval.collect_embeddings(
      self._embed(params),
      self._held_out.batches(opened.data_set.name, opened.examples),
      columns=(opened.label_key,),
    )
    targets = np.asarray(found.columns[opened.label_key])
    if targets.shape != (len(found.vectors), len(opened.classes)):
      raise ValueError(
        f"{opened.data_set.name}: labels {targets.shape}, expected {len(opened.classes)} per image"
      )
    scores = found.vectors.astype(np.float64) @ matrix.T.astype(np.float64)
    value = float(ov_eval.average_precision(scores, targets).mean())
    result = Result("mean_average_precision", value, len(targets), unit="share")
    return ov_eval.with_context([result], templates_hash=prompts_hash)

  def _retrieval(self, opened: OpenSet, params: Params) -> list[Result]:
    found = ov_eval.collect_embeddings(
      self._embed(params),
      self._held_out.batches(opened.data_set.name, opened.examples),
      columns=("captions",),
    )
    captions, owner = ov_eval.flatten_captions(found.columns["captions"])
    texts = self._embedder.texts(params, captions, prompts=False)
    with self._held_out.progress("similarities") as progress:
      ranks = ov_eval.retrieval(found.vectors, texts, owner, progress=progress)
    directions = {"image": ranks.txt2img, "text": ranks.img2txt}
    results = [
      of.recall(k).result(f"{name}_retrieval_recall@{k}")
      for name, of in directions.items()
      for k in ranks.ks
    ]
    first = [of.recall(1).value for of in directions.values()]
    mean = Result("mean_recall@1", sum(first) / 2, len(owner), unit="share")
    return ov_eval.with_context([*results, mean], images=len(found.vectors), texts=len(owner))

  def _selection(self, opened: OpenSet, params: Params) -> list[Result]:
    images, captions, _ = self._instances(opened, params)
    most = max(map(len, images))
    whole = [i for i, part in enumerate(images) if len(part) == most]  # others lack a broken image
    texts, _ = ov_eval.flatten_captions([captions[i] for i in whole])
    vectors = self._embedder.texts(params, texts, prompts=False)
    found = ov_eval.select_pairs(
      np.stack([images[i] for i in whole]), vectors.reshape(len(whole), -1, vectors.shape[-1])
    )
    metrics = {"image_acc": found.image, "text_acc": found.text, "acc": found.both}
    return [share.result(name) for name, share in metrics.items()]

  def _associations(self, opened: OpenSet, params: Params) -> list[Result]:
    images, captions, right = self._instances(opened, params)
    cues = self._embedder.texts(params, [own[0] for own in captions], prompts=False)
    scores = np.array([
      ov_eval.jaccard(part @ cue, targets)
      for part, cue, targets in zip(images, cues, right, strict=True)
    ])  # fmt: skip
    sizes = np.array([len(part) for part in images])
    results = [ov_eval.Mean.of(scores).result("avg_jaccard_score", unit="share")]
    for name, (low, high) in _ASSOCIATION_GROUPS.items():
      some = scores[(sizes >= low) & (sizes <= high)]
      results.append(ov_eval.Mean.of(some).result(f"jaccard_score_{name}", unit="share"))
    return results

  def _instances(
    self, opened: OpenSet, params: Params
  ) -> tuple[list[np.ndarray], list[list[str]], list[np.ndarray]]:
    """Return image vectors [I, E], captions, and bool [I] of right images of each instance."""
    found = ov_eval.collect_embeddings(
      self._embed(params),
      self._held_out.batches(opened.data_set.name, opened.examples),
      columns=("captions", "instance", "right"),
    )
    numbers, first = np.unique(found.columns["instance"], return_index=True)
    right = np.asarray(found.columns["right"], bool)
    rows = [np.asarray(found.columns["instance"]) == number for number in numbers]
    captions = [found.columns["captions"][i] for i in first]
    return [found.vectors[row] for row in rows], captions, [right[row] for row in rows]

  def _embed(self, params: Params) -> features.EmbedImages:
    return features.image_embedder(self._held_out.task, params, self._held_out.mesh)

  def _class_matrix(self, opened: OpenSet, params: Params) -> tuple[np.ndarray, str]:
    """Return the vectors of the classes [C, E], and a hash of their prompts."""
    prompts = ov_eval.benchmark_prompts(opened.classes, opened.templates)
    vectors = self._embedder.texts(params, prompts, prompts=False)
    matrix = class_matrix(vectors, [len(opened.templates)] * len(opened.classes))
    return matrix, ov_eval.prompts_hash(prompts)

  def _clip_benchmark_json(self, opened: OpenSet, metrics: list[Result]) -> str:
    """Return the file that CLIP_benchmark writes; an undefined value is null instead of NaN."""
    name = opened.data_set.name
    values = {r.name: r.value if math.isfinite(r.value) else None for r in metrics}
    content = {
      "dataset": f"wds/{name}" if opened.layout == "wds" else name,
      "model": self._held_out.task.name,
      "pretrained": self._held_out.run,
      "task": _TASKS[opened.data_set.kind],
      "metrics": values,
      "language": "en",
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _group_metrics(opened: OpenSet, predictions: ov_eval.Predictions) -> list[Result]:
  """Return the accuracy of all examples, of each group and of the worst group."""
  data_set = opened.data_set
  if not data_set.groups:
    return []
  correct = predictions.rank < data_set.top
  metadata = _metadata(opened, predictions.index)
  average = "acc_avg" if data_set.top == 1 else f"acc_top{data_set.top}_avg"
  results = [Share.of(correct).result(average)]
  for groups in data_set.groups:
    by_group = ov_eval.group_accuracy(correct, metadata[:, groups.column])
    results += [share.result(f"{groups.prefix}:{i}") for i, share in by_group.items()]
    results.append(ov_eval.worst_group(by_group).result(groups.worst))
  return results


def _metadata(opened: OpenSet, index: np.ndarray) -> np.ndarray:
  """Return the metadata int64 [N, K] of the records with these numbers.

  Raises:
    ValueError: a record has no metadata, or too few columns.
  """
  needed = max(groups.column for groups in opened.data_set.groups) + 1
  rows: list[Any] = []
  for record in index.tolist():
    row = np.asarray(opened.dataset.features(record, ("npy",)).get("npy", ()))
    if len(row) < needed:
      file, offset = opened.dataset.locate(record)
      raise ValueError(
        f"the sample at byte {offset} of {file} has {len(row)} columns of metadata (.npy); "
        f"{opened.data_set.name} needs {needed}"
      )
    rows.append(row[:needed].astype(np.int64))
  return np.stack(rows)
