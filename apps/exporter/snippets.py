"""Example programs of model cards, for each format.

They are shown in the model card and run by a test, which provides the folder `FOLDER` and the image
`PICTURE`.
"""

import dataclasses
import functools
import re
from typing import Any

import jinja2

from apps.exporter import libraries
from apps.exporter.formats.format import Versions
from apps.exporter.formats.table import EXPORTS
from apps.exporter.macros import SHARED
from ov_convert.release import Release, option_problems
import ov_models

FOLDER = "path/to/this/folder"
PICTURE = "photo.jpg"
_FENCE = re.compile(r"^```(\w+)[ \t]+(\w+)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Snippet:
  """Example program.

  Attributes:
    title: heading of the program.
    library: environment that runs it: a format of //apps:export, or "torch".
    install: pip packages, names in `libraries`.
    code: Python code.
  """

  title: str
  library: str
  install: tuple[str, ...]
  code: str

  @property
  def pip_line(self) -> str:
    """Pip command that installs the requirements of this program."""
    return libraries.pip_line(self.install)

  @property
  def tested(self) -> dict[str, Versions]:
    """Tested versions by library."""
    return libraries.ranges(self.install)


def snippets(kind: str, release: Release) -> list[Snippet]:
  """Return the programs for a format, the most useful first."""
  values = _values(release)
  found = []
  for program in EXPORTS[kind].programs:
    if not program.needs or values[program.needs]:
      title, install = _fill(program.title, values), _fill(program.install, values)
      code = _fill(SHARED + program.code, values) + "\n"
      found.append(Snippet(title, program.library, tuple(install.split()), code))
  return found


def extract(text: str) -> list[tuple[str, str, str]]:
  """Return (language, library, code) of all fenced blocks of a card that state both."""
  return _FENCE.findall(text)


def can_caption(release: Release) -> bool:
  """Return whether the model has an autoregressive decoder."""
  return isinstance(getattr(release.config, "decoder", None), ov_models.DecoderConfig)


def reads_texts(release: Release) -> bool:
  """Return whether the model has a text tower and a tokenizer."""
  return release.text is not None and release.words is not None


def _values(release: Release) -> dict[str, Any]:
  """Return the template values of the programs."""
  words = release.words
  texts, captions = reads_texts(release), can_caption(release) and words is not None
  return {
    "folder": FOLDER,
    "photo": PICTURE,
    "purpose": "Zero-shot classification" if texts else "Image features",
    "pre": release.preprocess,
    "size": release.preprocess.image_size,
    "words": words,
    "room": words.length - words.append_cls - 1 - (words.bos_id is not None) if words else 0,
    "text": release.text,
    "family": bool(option_problems(release.config)),
    "plain": not option_problems(release.config),
    "texts": texts,
    "plain_texts": texts and not option_problems(release.config),
    "captions": captions,
    "max_len": getattr(getattr(release.config, "decoder", None), "max_len", 0),
    "kind": type(release.config).__name__.removesuffix("Config"),
    "sigmoid": getattr(release.config, "bias_init", None) is not None,
    "prompts": '["a photo of a dog", "a photo of a cat"]',
  }


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )  # no escaping: only numbers come from data
  environment.filters["numbers"] = lambda values: f"({', '.join(f'{v:.6g}' for v in values)})"
  return environment


def _fill(template: str, values: dict[str, Any]) -> str:
  return _environment().from_string(template).render(**values).strip()
