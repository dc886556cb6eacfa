"""Probes on the frozen vision tower: nearest neighbours, linear and few-shot classifiers."""

from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from apps import features
from apps.label_data import label_text
from apps.trainer import inputs
from apps.trainer.errors import UserError
from apps.trainer.task import Evaluation
import ov_data
import ov_eval
import ov_models


class FeatureEvaluator:
  """Learns from labelled pictures' features, tests on others; nothing of the model changes."""

  def __init__(
    self, config: ConfigDict, task: Any, tokenizer: ov_data.Tokenizer, mesh: jax.sharding.Mesh
  ):
    """Opens both sets of pictures; `task.model.encoder` is the tower.

    Raises:
      ValueError: data that cannot be used.
    """
    self._config = wanted = config.eval.features
    self._encoder: ov_models.ViTConfig = task.model.encoder
    self._mesh = mesh

    def open_loader(path: str, split: str) -> ov_data.Loader:
      return inputs.eval_loader(
        config,
        task,
        tokenizer,
        mesh,
        path,
        split,
        batch_size=config.eval.batch_size or config.batch_size,
        examples=wanted.examples,
        extra_keys=(wanted.label_key,),
        image_key=wanted.image_key,
        caption_keys=(),
        texts={},
      )

    self._train = open_loader(wanted.train_dir, wanted.train_split)
    self._test = open_loader(wanted.dir or wanted.train_dir, wanted.split)

  def __call__(self, params: Any) -> Evaluation:
    """kNN, linear probe, few-shot probes, and what guessing the commonest class would give."""
    config = self._config
    embed = features.feature_extractor(self._encoder, params["encoder"], self._mesh)
    train, train_names = self._features(embed, self._train)
    test, test_names = self._features(embed, self._test)
    classes = sorted(set(train_names))
    unseen = sorted(set(test_names) - set(classes))
    if unseen:
      raise UserError(
        f"config.eval.features: {len(unseen)} classes of the test pictures, such as {unseen[0]!r},"
        " are not among those learned from"
      )
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
    results = ov_eval.with_context(
      results,
      evaluator="features",
      split=config.split or config.dir or config.train_dir,
      train_examples=len(train),
      classes=len(classes),
    )
    return Evaluation(tuple(results))

  def _features(
    self, embed: features.EmbedImages, loader: ov_data.Loader
  ) -> tuple[np.ndarray, list[str]]:
    key = self._config.label_key
    found = ov_eval.collect_embeddings(embed, loader, columns=(key,))
    return found.vectors, [label_text(value) for value in found.columns[key]]
