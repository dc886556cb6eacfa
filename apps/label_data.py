"""Labelled held-out pictures and the texts of their classes, for every evaluator of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from apps.trainer.errors import UserError
from apps.trainer.held_out import HeldOut
import ov_data
import ov_eval

_CHECKED_RECORDS = 256  # evenly spread records whose labels are checked before a run starts


@dataclasses.dataclass(frozen=True)
class ClassPrompts:
  """Classes with their texts, in order of class number.

  Attributes:
    names: of the classes; may repeat, as two of ImageNet's do.
    prompts: the texts of each class.
    description: what the results say about them: names of the sets and a hash of all texts.
  """

  names: tuple[str, ...]
  prompts: tuple[tuple[str, ...], ...]
  description: Mapping[str, str]


class LabelledPictures:
  """The pictures of `config.eval.zero_shot` with their classes.

  Attributes:
    examples: the pictures.
    classes: their classes.
  """

  def __init__(self, held_out: HeldOut):
    """Open the pictures, read the classes, and check that labels are among them.

    Raises:
      ValueError: pictures or classes cannot be used, or do not fit each other.
    """
    config = held_out.config.eval.zero_shot
    self._held_out, self._label_key = held_out, config.label_key
    self.examples = held_out.open(config, extra_keys=(config.label_key,), caption_keys=(), texts={})
    folders = self.examples.folders(config.label_key)
    self.classes = read_class_prompts(config, folders)
    self._numbers = class_numbers(self.classes.names, folders)
    for dataset in self.examples.loader.datasets:
      check_labels(dataset, config.label_key, self._numbers, config.classes)

  def batches(self, what: str) -> Iterator[dict[str, Any]]:
    """Return the batches of one pass with `label` int [B], with a bar called `what`."""
    batches = self._held_out.batches(what, self.examples)
    return with_labels(batches, self._label_key, self._numbers)


def read_class_prompts(zero_shot: ConfigDict, folders: Sequence[str] | None) -> ClassPrompts:
  """Read the classes of `config.eval.zero_shot`.

  Args:
    zero_shot: `classes` is "folders", a JSON file {class: [prompt, ...]}, which needs no templates,
      or what `ov_eval.class_set` takes; `templates` is what `ov_eval.template_set` takes.
    folders: names of the folders of classes that the pictures lie in, if they do.

  Raises:
    ValueError: fewer than two classes, a file of another form, no folders to name them, or names
      that differ give the same texts.
  """
  path = str(Path(zero_shot.classes).expanduser())
  if zero_shot.classes == "folders" and folders is None:
    raise ValueError(
      "config.eval.zero_shot.classes='folders', but the pictures do not lie in folders of classes; "
      "give a file with the names of the classes, one a line"
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
  """Name classes by folders, `_` as a space; ValueError where two folders get one name."""
  classes = ov_eval.ClassSet("folders", tuple(name.replace("_", " ") for name in folders))
  first: dict[str, str] = {}
  for folder, name in zip(folders, classes.classes, strict=True):
    if name in first:
      raise ValueError(
        f"folders {first[name]!r} and {folder!r} give the class name {name!r} both; rename one"
      )
    first[name] = folder
  return classes


def check_distinct(classes: ClassPrompts, tokenizer: ov_data.Tokenizer, ids: np.ndarray) -> None:
  """Check that the model gets a text for each class, and another one for each.

  A tokenizer may remove what tells names apart: case, accents, letters that it does not know, and
  all that is longer than its texts.

  Args:
    classes: with P prompts in all. Classes of one name may have the same prompts.
    tokenizer: that made the ids.
    ids: int [P, T], of the prompts in order.

  Raises:
    ValueError: a class has no known word in its prompts, or two have the same ids.
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
        f"classes {owners[own]!r} and {name!r} are one text to the model ({prompts[0][:80]!r}); "
        "write them in words that differ within the length of its texts, or give a JSON file "
        "{class: [prompt, ...]}"
      )


def class_numbers(names: Sequence[str], folders: Sequence[str] | None) -> dict[str | int, int]:
  """Map labels to class numbers: a number is an int, a name a string.

  A string that is no name but a number means that number. Of equal names the lower number is meant.
  Where pictures lie in folders of classes, their numbers go by the sorted names of the folders.
  These are looked for among the classes, whose order may be another; if none is there (ImageNet's
  folders are called n01440764 and so on), the classes must be as many and in the same order.

  Args:
    names: of the classes.
    folders: of the pictures, if they lie in such.

  Raises:
    ValueError: some folders are classes and some are not, or one may be several classes.
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
      f"{len(missing)} of {len(folders)} folders of pictures, such as {missing[0]!r}, are none of "
      f"the {count} classes {', '.join(list(names)[:5])}, ...; name the classes like the "
      "folders, or give as many as there are folders, in the order of these"
    )
  return {**numbers, **{k: i for k, i in enumerate(found) if i is not None}}


def _number_of_folder(
  folder: str, numbers: Mapping[str | int, int], names: Sequence[str]
) -> int | None:
  """Return the class of a folder: by its name, or without regard to case and punctuation.

  Raises:
    ValueError: no name is that of the folder, and several would do.
  """
  for spelling in (folder, folder.replace("_", " ")):
    if (number := numbers.get(ov_eval.normalise_name(spelling))) is not None:
      return number
  plain = ov_eval.canonicalise(folder)
  same = dict.fromkeys(name for name in names if ov_eval.canonicalise(name) == plain)
  if len(same) > 1:
    raise ValueError(
      f"the folder of pictures {folder!r} may be the class {' or '.join(map(repr, same))}; name it "
      "exactly like its class"
    )
  return numbers[next(iter(same))] if same else None


def check_labels(
  dataset: ov_data.Dataset,
  key: str,
  numbers: Mapping[str | int, int] | None = None,
  classes: str = "",
) -> None:
  """Check the labels of records that are spread over a data set, before anything is trained.

  Args:
    dataset: whose records hold a label.
    key: of the label.
    numbers: see `class_numbers`; None takes any label.
    classes: what the class list is called, for the message.

  Raises:
    ValueError: a record has no label, or one that is none of the classes; names the record, the
      label and the classes.
  """
  spread = np.linspace(0, len(dataset) - 1, min(len(dataset), _CHECKED_RECORDS)).astype(int)

  def problem(record: int) -> str | None:
    try:
      features = dataset.features(record, (key,))
    except ValueError:  # a broken record; the loader counts it when its turn comes
      return None
    file, offset = dataset.locate(record)
    if not len(features.get(key, ())):
      return f"{file} at byte {offset}: the record has no label under {key!r}"
    if numbers is None or class_number(features[key], numbers) is not None:
      return None
    return f"{file} at byte {offset}: {_no_class(features[key], key, numbers)} of {classes}"

  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a read is a request each on gs://
    problems = list(filter(None, pool.map(problem, spread.tolist())))
  if problems:
    raise ValueError(
      f"{problems[0]} ({len(problems)} of {len(spread)} records looked at); every record needs a "
      "label, and the class list a name for each class of the data, in the order of their numbers"
    )


def with_labels(
  batches: Iterable[Mapping[str, Any]], key: str, numbers: Mapping[str | int, int]
) -> Iterator[dict[str, Any]]:
  """Yield batches with `label` int [B], the number of each row's class.

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
      number = class_number(batch[key][row], numbers)
      if number is None:
        raise UserError(f"a record: {_no_class(batch[key][row], key, numbers)}")
      labels[row] = number
    yield {**batch, "label": labels}


def class_number(value: Any, numbers: Mapping[str | int, int]) -> int | None:
  """Return the number of the class that a label means; None for none of `class_numbers`."""
  value = _first(value)
  if value is None:
    return None
  if isinstance(value, int | np.integer):
    return numbers.get(int(value))
  return numbers.get(label_text(value))


def label_text(value: Any, folders: Sequence[str] | None = None) -> str:
  """Return a label as text, through `ov_eval.normalise_name`.

  Args:
    value: bytes, text, a number, or a list or array of which the first counts.
    folders: the names that numbers stand for, where pictures lie in folders of classes.

  Raises:
    UserError: the list is empty: the record has no label.
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
    f"the label {label_text(value)!r} under {key!r} is none of the {len(set(numbers.values()))} "
    f"classes ({shown}, ...)"
  )
