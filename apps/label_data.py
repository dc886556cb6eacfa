"""Labelled held-out pictures and the texts of their classes, for every evaluator of them."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from apps.trainer.errors import UserError
import ov_eval


@dataclasses.dataclass(frozen=True)
class ClassPrompts:
  """Classes with their texts.

  Attributes:
    prompts: {class: texts}.
    description: what the results say about them: names of the sets and a hash of all texts.
  """

  prompts: Mapping[str, tuple[str, ...]]
  description: Mapping[str, str]

  @property
  def names(self) -> list[str]:
    return list(self.prompts)


def read_class_prompts(zero_shot: ConfigDict) -> ClassPrompts:
  """The classes of `config.eval.zero_shot`.

  `classes` is a JSON file {class: [prompt, ...]}, which needs no templates, or what
  `ov_eval.class_set` takes; `templates` is what `ov_eval.template_set` takes.

  Raises:
    ValueError: fewer than two classes, or a file of another form.
  """
  path = str(Path(zero_shot.classes).expanduser())
  prompts = _prompts_of_json(path) if path.endswith(".json") else None
  if prompts is None:
    classes = ov_eval.class_set(zero_shot.classes)
    templates = ov_eval.template_set(zero_shot.templates)
    texts = ov_eval.class_texts(classes, templates)
    count = len(templates.templates)
    prompts = {
      name: tuple(texts[i * count : (i + 1) * count]) for i, name in enumerate(classes.classes)
    }
    description = {"classes": classes.name, "templates": templates.name}
  else:
    description = {"classes": Path(path).name, "templates": "prompts of the class file"}
  if len(prompts) < 2:
    raise ValueError(f"{path} names {len(prompts)} classes; expected at least two")
  texts = [text for name in prompts for text in (name, *prompts[name])]
  return ClassPrompts(prompts, description | {"templates_hash": ov_eval.prompts_hash(texts)})


def _prompts_of_json(path: str) -> dict[str, tuple[str, ...]] | None:
  """{class: texts} of a file; None where it is a list of names."""
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error
  if isinstance(content, list):
    return None
  if not isinstance(content, dict) or not all(
    isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    for texts in content.values()
  ):
    raise ValueError(f"{path}: expected an object of class names with lists of prompts")
  return {name: tuple(texts) for name, texts in content.items()}


def with_labels(
  batches: Iterable[Mapping[str, Any]], key: str, names: list[str]
) -> Iterator[dict[str, Any]]:
  """Batches with `label` int [B], the number of each row's class among `names`.

  Args:
    batches: their rows hold a class name or number under `key`.
    key: of the label.
    names: of the classes.

  Raises:
    UserError: a record with a label that is not among the classes.
  """
  number = {name: i for i, name in enumerate(names)}
  for batch in batches:
    labels = np.zeros(len(batch["valid"]), np.int64)
    for row in np.flatnonzero(batch["valid"]).tolist():
      value = label_text(batch[key][row])
      if value in number:
        labels[row] = number[value]
      elif value.isdigit() and int(value) < len(names):
        labels[row] = int(value)
      else:
        raise UserError(
          f"a record is labelled {value!r} under {key!r}, which is no class; there are "
          f"{len(names)}: {', '.join(names[:5])}, ..."
        )
    yield {**batch, "label": labels}


def label_text(value: Any) -> str:
  """A label as text: bytes, text, number, or the first of a list of them."""
  value = value[0] if isinstance(value, list | tuple) and value else value
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
