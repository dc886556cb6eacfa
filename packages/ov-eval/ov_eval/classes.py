"""Class names and prompt templates of zero-shot classification, as data with names.

Two sets that people compare against, the 1000 names of ImageNet and the 80 templates of CLIP, are
read from an installed open_clip (its file of names only: PyTorch is not imported) or from a file;
nothing is downloaded. How files are read: see `ov_eval.lists`.
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
  """Names of classes in order of class number, each through `normalise_name`.

  Names may repeat (two of ImageNet's do); a label given as text then means the lower number.

  Raises:
    ValueError: for fewer than two classes, or an empty name.
  """

  name: str
  classes: tuple[str, ...]

  def __post_init__(self) -> None:
    object.__setattr__(self, "classes", tuple(map(normalise_name, self.classes)))
    if len(self.classes) < 2:
      raise ValueError(f"{self.name!r} names {len(self.classes)} classes; expected at least two.")
    if empty := [number for number, text in enumerate(self.classes) if not text]:
      raise ValueError(f"{self.name!r} has no name for class {empty[0]}; give every class one.")

  @property
  def hash(self) -> str:
    """Twelve hex digits that identify the names, for result files."""
    return prompts_hash(self.classes)


@dataclasses.dataclass(frozen=True)
class TemplateSet:
  """Prompts with `{}` in the place of the class name.

  Raises:
    ValueError: without a template, or for one without `{}`.
  """

  name: str
  templates: tuple[str, ...]

  def __post_init__(self) -> None:
    if not self.templates:
      raise ValueError(f"{self.name!r} holds no template; expected one at least.")
    for template in self.templates:
      if "{}" not in template:
        raise ValueError(
          f"template {template[:80]!r} of {self.name!r} has no {{}} for the class name."
        )

  @property
  def hash(self) -> str:
    """Twelve hex digits that identify the templates, for result files."""
    return prompts_hash(self.templates)


_TEMPLATES: dict[str, tuple[str, ...]] = {
  "plain": ("{}",),
  "photo": ("a photo of a {}",),
  # The seven that a search over all 80 kept (openai/CLIP, prompt engineering for ImageNet), and the
  # bare name. big_vision and OpenVision call them "clip_best".
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
# Known sets that are not kept here: name -> how many the library must give.
_CLIP_TEMPLATES = {"openai_80": 80, "openvision_81": 81}


def template_set(name_or_path: str) -> TemplateSet:
  """Templates by name or from a file.

  Args:
    name_or_path: `plain`, `photo`, `openai_best`, `openai_80` (the 80 of CLIP), `openvision_81`
      (those and the bare name), or a file: .json with a list, else one template a line, as `lists`
      reads it.

  Raises:
    ValueError: for an unknown name, a file of another form, or a set that needs open_clip where
      that is not installed.
  """
  if name_or_path in _TEMPLATES:
    return TemplateSet(name_or_path, _TEMPLATES[name_or_path])
  if name_or_path in _CLIP_TEMPLATES:
    # Each is a function of the name there; its value at "{}" is the template.
    functions = _open_clip("OPENAI_IMAGENET_TEMPLATES", name_or_path)
    templates = tuple(function("{}") for function in functions)
    if name_or_path == "openvision_81":
      templates += ("{}",)
    _check_count(name_or_path, "templates", len(templates), _CLIP_TEMPLATES[name_or_path])
    return TemplateSet(name_or_path, templates)
  known = ", ".join([*_TEMPLATES, *_CLIP_TEMPLATES])
  return TemplateSet(name_or_path, read_list(name_or_path, f"a set of templates ({known})"))


def class_set(name_or_path: str) -> ClassSet:
  """Class names by name or from a file.

  Args:
    name_or_path: `imagenet` (the 1000 names that go with CLIP's templates), or a file: .json with
      a list, else one name a line; see `lists`.

  Raises:
    ValueError: as `template_set`.
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
  """Every class in every template: C * P texts, all P of class 0 first.

  Args:
    classes: C names.
    templates: P templates.
    canonical: lower case and without punctuation, as the released code; see `canonicalise`.

  Raises:
    ValueError: names that differ give one text, such as "C++" and "C#", or a name gives none.
  """
  names = classes.classes if isinstance(classes, ClassSet) else tuple(classes)
  patterns = templates.templates if isinstance(templates, TemplateSet) else tuple(templates)
  # The sets hold the checks of names and templates.
  names = ClassSet("classes", names).classes
  patterns = TemplateSet("templates", patterns).templates
  if canonical:
    names = canonical_names(names)
    patterns = tuple(canonicalise(pattern, keep="{}") for pattern in patterns)
  return [pattern.replace("{}", name) for name in names for pattern in patterns]


def canonical_names(names: Sequence[str]) -> tuple[str, ...]:
  """Canonicalise the names of classes.

  Names that are equal stay so (two of ImageNet's are): their classes cannot be told apart by name.

  Raises:
    ValueError: names that differ become equal, or nothing is left of a name.
  """
  found = tuple(canonicalise(name, keep=",") for name in names)
  by_text: dict[str, list[str]] = {}
  for name, text in zip(names, found, strict=True):
    if not text.replace(",", "").strip():
      raise ValueError(
        f"class {name!r} has no letter or digit, so nothing is left of it without punctuation; "
        "write it in words"
      )
    if name not in by_text.setdefault(text, []):
      by_text[text].append(name)
  for text, same in by_text.items():
    if len(same) > 1:
      raise ValueError(
        f"classes {', '.join(map(repr, same[:5]))} are all {text!r} in lower case and without "
        "punctuation; write them in words that differ, as 'C plus plus' for 'C++'"
      )
  return found


def _open_clip(attribute: str, wanted: str) -> Any:
  """Return a list of open_clip, an optional library that this package does not import."""
  try:
    return getattr(_open_clip_names(), attribute)
  except (ImportError, AttributeError, OSError, ValueError) as error:
    raise ValueError(
      f"{wanted!r} is read from a file of open_clip, which could not be used ({error}). Install it "
      "(pip install --no-deps open_clip_torch; PyTorch is not needed), or give a file instead: one "
      "a line, or a JSON list."
    ) from error


def _check_count(wanted: str, what: str, found: int, expected: int) -> None:
  if found != expected:
    raise ValueError(
      f"open_clip gave {found} {what} for {wanted!r}, expected {expected}; its list has changed, "
      f"give the {what} as a file."
    )


def _open_clip_names() -> Any:
  """Load open_clip's file of names alone: the package itself would import PyTorch."""
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
