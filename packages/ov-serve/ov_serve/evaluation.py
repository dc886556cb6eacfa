"""Metrics from the files of an index."""

import numpy as np

import ov_eval
from ov_serve.index import Index
from ov_serve.model import Model


def evaluate(index: Index, model: Model) -> list[ov_eval.Result]:
  """Return the retrieval metrics of an index whose images have captions.

  Args:
    index: index with captions.
    model: model of the index, which embeds the captions.

  Raises:
    ValueError: if the index belongs to another model, has no captions, or the model has no text
      tower.
  """
  if index.info.model.fingerprint != model.fingerprint:
    raise ValueError(
      f"the index {index.folder} belongs to model {index.info.model.fingerprint}, not "
      f"{model.fingerprint}; embed the images again, or use the model of the index"
    )
  texts, text_image = ov_eval.flatten_captions([entry.captions for entry in index.records()])
  if not texts:
    raise ValueError(f"{index.folder} has no captions; retrieval metrics require them")
  images = index.vectors.astype(np.float32)
  return ov_eval.retrieval(images, model.embed_texts(texts), text_image).results()
