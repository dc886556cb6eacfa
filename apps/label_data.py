"""Labeled held-out images and the prompts of their classes, for evaluators."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from apps.trainer.errors import UserError
from apps.trainer.held_out import HeldOut
from apps.trainer.run_config import ZeroShotSettings
import ov_data
import ov_eval

_CHECKED_RECORDS = 256  # number of evenly spaced records whose labels are checked at the start


@dataclasses.dataclass(frozen=True)
class ClassPrompts:
  """Classes with their prompts, in order of class number.

  Attributes:
    names: names of the classes; may repeat, as two of ImageNet's do.
    prompts: prompts of each class.
    description: description for results: names of the sets and a hash of all prompts.
  """

  names: tuple[str, ...]
  prompts: tuple[tuple[str, ...], ...]
  description: Mapping[str, str]


class LabeledImages:
  """Images of `config.eval.zero_shot` with their classes.

  Attributes:
    examples: the images.
    classes: classes of the images.
  """

  def __init__(self, held_out: HeldOut):
    """Open the images, read the classes, and check that the labels are among them.

    Raises:
      ValueError: images or classes are invalid, or do not match.
    """
    config = held_out.config.eval.zero_shot
    self._held_out, self._label_key = held_out, config.label_key
    self.examples = held_out.open(config, extra_keys=(config.label_key,), caption_keys=(), texts={})
    folders = self.examples.folders(config.label_key)
    self.classes = read_class_prompts(config, folders)
    self._numbers = class_numbers(self.classes.names, folders)
    for dataset in self.examples.loader.datasets:
      check_labels(dataset, config.label_key, self._numbers, config.classes)

  def batches(self, description: str) -> Iterator[dict[str, Any]]:
    """Return the batches of one pass with `label` int [B]; the progress bar shows `description`."""
    batches = self._held_out.batches(description, self.examples)
    return with_labels(batches, self._label_key, self._numbers)


def read_class_prompts(zero_shot: ZeroShotSettings, folders: Sequence[str] | None) -> ClassPrompts:
  """Read the classes of `config.eval.zero_shot`.

  Args:
    zero_shot: settings. `classes` is "folders", a JSON file {class: [prompt, ...]} (without
      templates), or an argument of `ov_eval.class_set`; `templates` is one of
      `ov_eval.template_set`.
    folders: names of the class folders of the images, if any.

  Raises:
    ValueError: there are fewer than two classes, the file has another format, there are no folders,
      or different names give the same prompts.
  """
  path = str(Path(zero_shot.classes).expanduser())
  if zero_shot.classes == "folders" and folders is None:
    raise ValueError(
      "config.eval.zero_shot.classes='folders', but the images are not stored in class folders; "
      "give a file with one class name per line"
    )
  is_json = path.endswith(".json") and Path(path).is_file()
  ready = ov_eval.read_prompts(path) if is_json else None
  if ready is not None:
    names, prompts = tuple(ready), tuple(ready.values())
    description = {"classes": Path(path).name, "templates": "prompts of the class file"}
  else:
    if zero_shot.classes == "folders":
      classes = _folder_classes(folders or ())
    else:
      classes = ov_eval.class_set(zero_shot.classes)
    templates = ov_eval.template_set(zero_shot.templates)
    texts = ov_eval.class_texts(classes, templates)
    count = len(templates.templates)
    names = classes.classes
    prompts = tuple(tuple(texts[i * count : (i + 1) * count]) for i in range(len(names)))
    description = {"classes": classes.name, "templates": templates.name}
  if len(names) < 2:
    raise ValueError(f"{path} names {len(names)} classes; expected at least two")
  texts = [text for name, own in zip(names, prompts, strict=True) for text in (name, *own)]
  return ClassPrompts(names, prompts, description | {"templates_hash": ov_eval.prompts_hash(texts)})


def _folder_classes(folders: Sequence[str]) -> ov_eval.ClassSet:
  """Name classes by folders, `_` as a space; raise ValueError if two folders get the same name."""
  classes = ov_eval.ClassSet("folders", tuple(name.replace("_", " ") for name in folders))
  first: dict[str, str] = {}
  for folder, name in zip(folders, classes.classes, strict=True):
    if name in first:
      raise ValueError(
        f"folders {first[name]!r} and {folder!r} both give the class name {name!r}; rename one"
      )
    first[name] = folder
  return classes


def check_distinct(classes: ClassPrompts, tokenizer: ov_data.Tokenizer, ids: np.ndarray) -> None:
  """Check that every class has known tokens, and that all classes have different tokens.

  A tokenizer may remove differences of names: case, accents, unknown characters, and everything
  beyond the maximum length.

  Args:
    classes: classes with P prompts in total. Classes with the same name may share prompts.
    tokenizer: tokenizer that produced the ids.
    ids: int [P, T], ids of the prompts in order.

  Raises:
    ValueError: the prompts of a class contain no known word, or two classes have the same ids.
  """
  no_text = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id}
  no_text.add(tokenizer.unk_id)
  rows = iter(ids.tolist())
  owners: dict[frozenset[tuple[int, ...]], str] = {}
  for name, prompts in zip(classes.names, classes.prompts, strict=True):
    own = frozenset(tuple(next(rows)) for _ in prompts)
    plain = ov_eval.canonicalise(name)
    known = set(tokenizer.encode(plain)) - no_text
    if not set().union(*own) - no_text or (
      not known and all(plain in ov_eval.canonicalise(text) for text in prompts)
    ):
      raise ValueError(
        f"class {name!r} ({prompts[0][:80]!r}) has no word that the tokenizer knows; write it in "
        "words of the language that the model was trained on"
      )
    if owners.setdefault(own, name) != name:
      raise ValueError(
        f"classes {owners[own]!r} and {name!r} are identical for the model ({prompts[0][:80]!r}); "
        "write them in words that differ within the length of its texts, or give a JSON file "
        "{class: [prompt, ...]}"
      )


def class_numbers(names: Sequence[str], folders: Sequence[str] | None) -> dict[str | int, int]:
  """Map labels to class numbers; labels are ints (numbers) or strings (names).

  A string that is not a name but a number means that number. Of equal names the lower number is
  used. If images are stored in class folders, their numbers index the sorted folder names. These
  are matched with the classes, whose order may differ; if none matches (the folders of ImageNet are
  called n01440764 and so on), the classes must have the same number and order.

  Args:
    names: names of the classes.
    folders: class folders of the images, if any.

  Raises:
    ValueError: only some of the folders are classes, or a folder matches several classes.
  """
  count = len(names)
  numbers: dict[str | int, int] = {name: count - 1 - i for i, name in enumerate(reversed(names))}
  if folders is None:
    return {**{str(i): i for i in range(count)}, **{i: i for i in range(count)}, **numbers}
  found = [_number_of_folder(folder, numbers, names) for folder in folders]
  missing = [folder for folder, i in zip(folders, found, strict=True) if i is None]
  if len(missing) == len(folders) == count:
    found = list(range(count))
  elif missing:
    raise ValueError(
      f"{len(missing)} of {len(folders)} image folders, such as {missing[0]!r}, are not among "
      f"the {count} classes {', '.join(list(names)[:5])}, ...; name the classes like the "
      "folders, or give as many as there are folders, in the order of these"
    )
  return {**numbers, **{k: i for k, i in enumerate(found) if i is not None}}


def _number_of_folder(
  folder: str, numbers: Mapping[str | int, int], names: Sequence[str]
) -> int | None:
  """Return the class of a folder, by its exact name or ignoring case and punctuation.

  Raises:
    ValueError: no name matches exactly, and several match otherwise.
  """
  for spelling in (folder, folder.replace("_", " ")):
    if (number := numbers.get(ov_eval.normalise_name(spelling))) is not None:
      return number
  plain = ov_eval.canonicalise(folder)
  same = dict.fromkeys(name for name in names if ov_eval.canonicalise(name) == plain)
  if len(same) > 1:
    raise ValueError(
      f"the image folder {folder!r} may be the class {' or '.join(map(repr, same))}; name it "
      "exactly like its class"
    )
  return numbers[next(iter(same))] if same else None


def check_labels(
  dataset: ov_data.Dataset,
  key: str,
  numbers: Mapping[str | int, int] | None = None,
  classes: str = "",
) -> None:
  """Check the labels of evenly spaced records of a data set before training.

  Args:
    dataset: data set whose records have a label.
    key: feature of the label.
    numbers: see `class_numbers`; None accepts any label.
    classes: name of the class list, for the message.

  Raises:
    ValueError: a record has no label or an unknown one; the message names record, label and
      classes.
  """
  spread = np.linspace(0, len(dataset) - 1, min(len(dataset), _CHECKED_RECORDS)).astype(int)

  def problem(record: int) -> str | None:
    try:
      features = dataset.features(record, (key,))
    except ValueError:  # an invalid record; the loader counts it during evaluation
      return None
    location = dataset.location(record)
    if not len(features.get(key, ())):
      return f"{location}: the record has no label under {key!r}"
    if numbers is None or class_number(features[key], numbers) is not None:
      return None
    return f"{location}: {_no_class(features[key], key, numbers)} of {classes}"

  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # on gs:// each read is a request
    problems = list(filter(None, pool.map(problem, spread.tolist())))
  if problems:
    raise ValueError(
      f"{problems[0]} ({len(problems)} of {len(spread)} records checked); every record needs a "
      "label, and the class list a name for each class of the data, in the order of their numbers"
    )


def with_labels(
  batches: Iterable[Mapping[str, Any]], key: str, numbers: Mapping[str | int, int]
) -> Iterator[dict[str, Any]]:
  """Yield batches with `label` int [B], the class number of each row.

  Args:
    batches: batches with the name or number of a class under `key`.
    key: feature of the label.
    numbers: see `class_numbers`.

  Raises:
    UserError: a label is not among the classes.
  """
  for batch in batches:
    labels = np.zeros(len(batch["valid"]), np.int64)
    for row in np.flatnonzero(batch["valid"]).tolist():
      number = class_number(batch[key][row], numbers)
      if number is None:
        raise UserError(f"a record: {_no_class(batch[key][row], key, numbers)}")
      labels[row] = number
    yield {**batch, "label": labels}


def class_number(value: Any, numbers: Mapping[str | int, int]) -> int | None:
  """Return the class number of a label; None if `class_numbers` has none."""
  value = _first(value)
  if value is None:
    return None
  if isinstance(value, int | np.integer):
    return numbers.get(int(value))
  return numbers.get(label_text(value))


def label_text(value: Any, folders: Sequence[str] | None = None) -> str:
  """Return a label as text, normalised by `ov_eval.normalise_name`.

  Args:
    value: bytes, text, a number, or a list or array whose first item is used.
    folders: names of the numbers, if images are stored in class folders.

  Raises:
    UserError: the list is empty, so the record has no label.
  """
  value = _first(value)
  if value is None:
    raise UserError("a record has no label; label every record, or leave out those without")
  text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
  if folders is not None and text.isdigit():
    return folders[int(text)]
  return ov_eval.normalise_name(text)


def _first(value: Any) -> Any:
  if isinstance(value, list | tuple | np.ndarray):
    return value[0] if len(value) else None
  return value


def _no_class(value: Any, key: str, numbers: Mapping[str | int, int]) -> str:
  if _first(value) is None:
    return f"there is no label under {key!r}"
  names = sorted((name for name in numbers if isinstance(name, str)), key=lambda n: numbers[n])
  shown = ", ".join([name for name in names if not name.isdigit()][:5] or names[:5])
  return (
    f"the label {label_text(value)!r} under {key!r} is not one of the {len(set(numbers.values()))} "
    f"classes ({shown}, ...)"
  )
