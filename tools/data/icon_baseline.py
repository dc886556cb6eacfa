"""Nearest-pixel baseline for the held-out icons: what a model without learning reaches.

Icons are compared by the correlation of small gray images, see `icon_copies`. Names are
those of the training icons. A name that no training icon has scores every image equally.
"""

from collections.abc import Sequence

import numpy as np

import ov_eval
from tools.data import icon_copies
from tools.data.icon_copies import SmallIcons

_KS = (1, 5, 10)


def text_to_image(heldout: SmallIcons, train: SmallIcons) -> list[ov_eval.Result]:
  """Rank the held-out icons for each of their names by the nearest training icon of that name.

  Every icon with a name is correct for it.
  """
  templates: dict[str, list[int]] = {}
  for row, texts in enumerate(train.texts):
    for text in texts:
      templates.setdefault(text, []).append(row)
  answers: dict[str, list[int]] = {}
  for row, texts in enumerate(heldout.texts):
    for text in texts:
      answers.setdefault(text, []).append(row)
  counts = np.zeros((3, len(answers)), np.int64)
  for query, (text, right) in enumerate(answers.items()):
    rows = templates.get(text)
    scores = np.zeros(len(heldout.texts))
    if rows:
      scores = (heldout.vectors @ train.vectors[rows].T).max(1)
    best = scores[right].max()
    wrong = np.delete(scores, right)
    counts[:, query] = (wrong > best).sum(), (wrong == best).sum(), (scores[right] == best).sum()
  ranks = ov_eval.QueryRanks(np.arange(len(answers)), *counts)
  return [ranks.recall(k).result(f"txt2img_r{k}") for k in _KS]


def naming(heldout: SmallIcons, train: SmallIcons, names: Sequence[str]) -> ov_eval.Result:
  """Name each held-out icon by the nearest training icon with one of `names`."""
  wanted = set(names)
  rows = [row for row, texts in enumerate(train.texts) if wanted & set(texts)]
  asked = [row for row, texts in enumerate(heldout.texts) if texts[0] in wanted]
  found, _ = icon_copies.nearest(heldout.vectors[asked], train.vectors[rows])
  hits = [
    heldout.texts[row][0] in train.texts[rows[near]] for row, near in zip(asked, found, strict=True)
  ]
  return ov_eval.Share.of(np.asarray(hits, float)).result("naming_top1")
