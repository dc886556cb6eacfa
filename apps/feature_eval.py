"""Probes on the frozen vision tower: nearest neighbours, linear and few-shot classifiers."""

from typing import Any

import numpy as np

from apps import features
from apps.label_data import check_labels, label_text
from apps.trainer.held_out import Examples, HeldOut
from apps.trainer.task import Evaluation
import ov_eval


class FeatureEvaluator:
  """Trains probes on features of labeled images and tests them on others; the model is frozen."""

  def __init__(self, held_out: HeldOut):
    """Open both sets of images; `task.model.encoder` is the tower.

    Raises:
      ValueError: the data are invalid.
    """
    self._held_out = held_out
    self._config = wanted = held_out.config.eval.features
    options: dict[str, Any] = {
      "extra_keys": (wanted.label_key,),
      "image_key": wanted.image_key,
      "examples": wanted.examples,
      "caption_keys": (),
      "texts": {},
    }
    self._train = held_out.open_path(wanted.train_dir, wanted.train_split, **options)
    self._test = held_out.open_path(wanted.dir or wanted.train_dir, wanted.split, **options)
    for examples in (self._train, self._test):
      for dataset in examples.loader.datasets:
        check_labels(dataset, wanted.label_key)

  def __call__(self, params: Any) -> Evaluation:
    """Return the results of kNN, linear and few-shot probes, and of a majority-class baseline."""
    config = self._config
    embed = features.feature_extractor(self._held_out.task, params, self._held_out.mesh)
    train, train_names = self._features("training features", embed, self._train)
    test, test_names = self._features("test features", embed, self._test)
    # Classes that occur only in the test set are never predicted; the results contain their number.
    classes = sorted({*train_names, *test_names})
    number = {name: i for i, name in enumerate(classes)}
    train_labels = np.array([number[name] for name in train_names])
    test_labels = np.array([number[name] for name in test_names])
    data = (train, train_labels, test, test_labels)
    k = min(config.k, len(train))
    results = [
      *ov_eval.majority(train_labels, test_labels, num_classes=len(classes)).results(
        prefix="majority"
      )[:1],
      *ov_eval.knn(*data, k=k, num_classes=len(classes)).results(prefix="knn"),
      *ov_eval.linear_probe(*data, num_classes=len(classes)).results(),
    ]
    if config.shots:
      results += ov_eval.few_shot(*data, shots=tuple(config.shots)).results()
    results = self._held_out.annotate(
      results,
      "features",
      self._test,
      train_split=self._train.split,
      train_examples=len(train),
      classes=len(classes),
      unlearned_classes=len(set(test_names) - set(train_names)),
    )
    return Evaluation(tuple(results))

  def _features(
    self, description: str, embed: features.EmbedImages, examples: Examples
  ) -> tuple[np.ndarray, list[str]]:
    key = self._config.label_key
    batches = self._held_out.batches(description, examples)
    found = ov_eval.collect_embeddings(embed, batches, columns=(key,))
    folders = examples.folders(key)
    return found.vectors, [label_text(value, folders) for value in found.columns[key]]
