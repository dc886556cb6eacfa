"""Class names and prompt templates for zero-shot classification.

The 1000 ImageNet class names and the 80 CLIP templates are read from an installed open_clip, or
from a file. Only open_clip's metadata module is loaded: PyTorch is not imported, and nothing is
downloaded. `ov_eval.lists` describes the file format.
"""

from collections.abc import Sequence
import dataclasses
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

from ov_eval.generative import canonicalise, prompts_hash
from ov_eval.lists import normalise_name, read_list


@dataclasses.dataclass(frozen=True)
class ClassSet:
  """Class names in order of class number, normalised by `normalise_name`.

  Names may repeat (ImageNet has two equal names); a label given as text refers to the lower number.

  Raises:
    ValueError: if there are fewer than two classes, or a name is empty.
  """

  name: str
  classes: tuple[str, ...]

  def __post_init__(self) -> None:
    object.__setattr__(self, "classes", tuple(map(normalise_name, self.classes)))
    if len(self.classes) < 2:
      raise ValueError(f"{self.name!r} has {len(self.classes)} classes; expected at least two.")
    if empty := [number for number, text in enumerate(self.classes) if not text]:
      raise ValueError(f"{self.name!r} has no name for class {empty[0]}; give every class one.")

  @property
  def hash(self) -> str:
    """Hash of the names for result files, 12 hex digits."""
    return prompts_hash(self.classes)


@dataclasses.dataclass(frozen=True)
class TemplateSet:
  """Prompt templates with `{}` as the placeholder of the class name.

  Raises:
    ValueError: if there is no template, or one has no `{}`.
  """

  name: str
  templates: tuple[str, ...]

  def __post_init__(self) -> None:
    if not self.templates:
      raise ValueError(f"{self.name!r} has no templates; expected at least one.")
    for template in self.templates:
      if "{}" not in template:
        raise ValueError(
          f"template {template[:80]!r} of {self.name!r} has no {{}} for the class name."
        )

  @property
  def hash(self) -> str:
    """Hash of the templates for result files, 12 hex digits."""
    return prompts_hash(self.templates)


_TEMPLATES: dict[str, tuple[str, ...]] = {
  "plain": ("{}",),
  "photo": ("a photo of a {}",),
  # The seven templates selected from all 80 by openai/CLIP (prompt engineering for ImageNet), and
  # the bare name. big_vision and OpenVision call this set "clip_best".
  "openai_best": (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "{}",
  ),
}
# Template sets read from open_clip, with the expected number of templates.
_CLIP_TEMPLATES = {"openai_80": 80, "openvision_81": 81}


def template_set(name_or_path: str) -> TemplateSet:
  """Return a template set by name or from a file.

  Args:
    name_or_path: `plain`, `photo`, `openai_best`, `openai_80` (the 80 CLIP templates),
      `openvision_81` (those and the bare name), or a file: a JSON list (*.json), or one template
      per line; see `ov_eval.lists`.

  Raises:
    ValueError: if the name is unknown, the file is malformed, or the set needs open_clip, which is
      not installed.
  """
  if name_or_path in _TEMPLATES:
    return TemplateSet(name_or_path, _TEMPLATES[name_or_path])
  if name_or_path in _CLIP_TEMPLATES:
    # open_clip stores functions of the class name; applied to "{}" they return the template.
    functions = _open_clip("OPENAI_IMAGENET_TEMPLATES", name_or_path)
    templates = tuple(function("{}") for function in functions)
    if name_or_path == "openvision_81":
      templates += ("{}",)
    _check_count(name_or_path, "templates", len(templates), _CLIP_TEMPLATES[name_or_path])
    return TemplateSet(name_or_path, templates)
  known = ", ".join([*_TEMPLATES, *_CLIP_TEMPLATES])
  return TemplateSet(name_or_path, read_list(name_or_path, f"a set of templates ({known})"))


def class_set(name_or_path: str) -> ClassSet:
  """Return a class set by name or from a file.

  Args:
    name_or_path: `imagenet` (the 1000 names used with the CLIP templates), or a file: a JSON list
      (*.json), or one name per line; see `ov_eval.lists`.

  Raises:
    ValueError: see `template_set`.
  """
  if name_or_path == "imagenet":
    names = tuple(_open_clip("IMAGENET_CLASSNAMES", "imagenet"))
    _check_count("imagenet", "class names", len(names), 1000)
    return ClassSet("imagenet", names)
  return ClassSet(name_or_path, read_list(name_or_path, "a set of classes (imagenet)"))


def class_texts(
  classes: ClassSet | Sequence[str],
  templates: TemplateSet | Sequence[str],
  *,
  canonical: bool = True,
) -> list[str]:
  """Return C * P prompts: every template filled with every class name, grouped by class.

  Args:
    classes: C class names.
    templates: P templates.
    canonical: whether to lowercase and remove punctuation, as the released OpenVision code does;
      see `canonicalise`.

  Raises:
    ValueError: if different names canonicalise to the same text, such as "C++" and "C#", or a name
      canonicalises to nothing.
  """
  names = classes.classes if isinstance(classes, ClassSet) else tuple(classes)
  patterns = templates.templates if isinstance(templates, TemplateSet) else tuple(templates)
  # The constructors validate names and templates.
  names = ClassSet("classes", names).classes
  patterns = TemplateSet("templates", patterns).templates
  if canonical:
    names = canonical_names(names)
    patterns = tuple(canonicalise(pattern, keep="{}") for pattern in patterns)
  return [pattern.replace("{}", name) for name in names for pattern in patterns]


def canonical_names(names: Sequence[str]) -> tuple[str, ...]:
  """Canonicalise class names.

  Equal names are allowed (ImageNet has two): these classes cannot be distinguished by name.

  Raises:
    ValueError: if different names become equal, or a name becomes empty.
  """
  found = tuple(canonicalise(name, keep=",") for name in names)
  by_text: dict[str, list[str]] = {}
  for name, text in zip(names, found, strict=True):
    if not text.replace(",", "").strip():
      raise ValueError(
        f"class {name!r} has no letter or digit, so it is empty without punctuation; write it in "
        "words"
      )
    if name not in by_text.setdefault(text, []):
      by_text[text].append(name)
  for text, same in by_text.items():
    if len(same) > 1:
      raise ValueError(
        f"classes {', '.join(map(repr, same[:5]))} are all {text!r} in lower case and without "
        "punctuation; use distinct words, such as 'C plus plus' for 'C++'"
      )
  return found


def _open_clip(attribute: str, wanted: str) -> Any:
  """Return an attribute of open_clip's metadata module, without importing open_clip."""
  try:
    return getattr(_open_clip_names(), attribute)
  except (ImportError, AttributeError, OSError, ValueError) as error:
    raise ValueError(
      f"{wanted!r} requires open_clip, which could not be loaded ({error}). Install it "
      "(pip install --no-deps open_clip_torch; PyTorch is not needed), or pass a file with one "
      "entry per line, or a JSON list."
    ) from error


def _check_count(wanted: str, what: str, found: int, expected: int) -> None:
  if found != expected:
    raise ValueError(
      f"open_clip has {found} {what} for {wanted!r}, expected {expected}; its list has changed, "
      f"pass the {what} as a file."
    )


def _open_clip_names() -> Any:
  """Load open_clip's metadata module only; the package itself would import PyTorch."""
  spec = importlib.util.find_spec("open_clip")
  if spec is None or not spec.submodule_search_locations:
    raise ImportError("No module named 'open_clip'")
  file = Path(next(iter(spec.submodule_search_locations))) / "zero_shot_metadata.py"
  loader = importlib.machinery.SourceFileLoader("ov_eval_open_clip_names", str(file))
  found = importlib.util.spec_from_loader(loader.name, loader)
  assert found is not None
  module = importlib.util.module_from_spec(found)
  loader.exec_module(module)
  return module
