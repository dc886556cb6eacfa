"""Labelled held-out pictures and the texts of their classes, for every evaluator of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def read_class_prompts(zero_shot: ConfigDict, folders: Sequence[str] | None) -> ClassPrompts:
  """The classes of `config.eval.zero_shot`.

  Args:
    zero_shot: `classes` is "folders", a JSON file {class: [prompt, ...]}, which needs no templates,
      or what `ov_eval.class_set` takes; `templates` is what `ov_eval.template_set` takes.
    folders: names of the folders of classes that the pictures lie in, if they do.

  Raises:
    ValueError: fewer than two classes, a file of another form, or no folders to name them.
  """
  path = str(Path(zero_shot.classes).expanduser())
  if zero_shot.classes == "folders" and folders is None:
    raise ValueError(
      "config.eval.zero_shot.classes='folders', but the pictures do not lie in folders of classes; "
      "give a file with the names of the classes, one a line"
    )
  prompts = _prompts_of_json(path) if path.endswith(".json") else None
  if prompts is not None:
    description = {"classes": Path(path).name, "templates": "prompts of the class file"}
  else:
    if zero_shot.classes == "folders":
      classes = ov_eval.ClassSet("folders", tuple(name.replace("_", " ") for name in folders or ()))
    else:
      classes = ov_eval.class_set(zero_shot.classes)
    templates = ov_eval.template_set(zero_shot.templates)
    texts = ov_eval.class_texts(classes, templates)
    count = len(templates.templates)
    prompts = {
      name: tuple(texts[i * count : (i + 1) * count]) for i, name in enumerate(classes.classes)
    }
    description = {"classes": classes.name, "templates": templates.name}
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


def class_numbers(names: Sequence[str], folders: Sequence[str] | None) -> dict[str, int]:
  """From a label as text, a name or a number, to the number of its class.

  Where pictures lie in folders of classes, their numbers go by the sorted names of the folders.
  These are looked for among the classes, whose order may be another; if none is there (ImageNet's
  folders are called n01440764 and so on), the classes must be as many and in the same order.

  Args:
    names: of the classes.
    folders: of the pictures, if they lie in such.

  Raises:
    ValueError: some folders are classes and some are not.
  """
  numbers = {name: i for i, name in enumerate(names)}
  if folders is None:
    return {str(i): i for i in range(len(names))} | numbers
  plain = {ov_eval.canonicalise(name): i for name, i in numbers.items()}
  found = [plain.get(ov_eval.canonicalise(folder)) for folder in folders]
  missing = [folder for folder, i in zip(folders, found, strict=True) if i is None]
  if len(missing) == len(folders) == len(names):
    found = list(range(len(names)))
  elif missing:
    raise ValueError(
      f"{len(missing)} of {len(folders)} folders of pictures, such as {missing[0]!r}, are none of "
      f"the {len(names)} classes {', '.join(list(names)[:5])}, ...; name the classes like the "
      "folders, or give as many as there are folders, in the order of these"
    )
  return numbers | {str(k): i for k, i in enumerate(found) if i is not None}


def with_labels(
  batches: Iterable[Mapping[str, Any]], key: str, numbers: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
  """Batches with `label` int [B], the number of each row's class.

  Args:
    batches: their rows hold the name or number of a class under `key`.
    key: of the label.
    numbers: see `class_numbers`.

  Raises:
    UserError: a record with a label that is not among the classes.
  """
  for batch in batches:
    labels = np.zeros(len(batch["valid"]), np.int64)
    for row in np.flatnonzero(batch["valid"]).tolist():
      value = label_text(batch[key][row])
      if value not in numbers:
        raise UserError(
          f"a record is labelled {value!r} under {key!r}, which is no class; there are "
          f"{len(set(numbers.values()))}: {', '.join(list(numbers)[:5])}, ..."
        )
      labels[row] = numbers[value]
    yield {**batch, "label": labels}


def label_text(value: Any, folders: Sequence[str] | None = None) -> str:
  """A label as text: bytes, text, number (of one of `folders`), or the first of a list of them."""
  value = value[0] if isinstance(value, list | tuple) and value else value
  text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
  return folders[int(text)] if folders is not None and text.isdigit() else text
