"""Short programs that use an exported folder, one set for each format.

They stand in the model card and are run by a test, so they name a folder (`FOLDER`) and a picture
(`PICTURE`) that whoever runs them puts there.
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
from ov_convert.release import Release
import ov_models

FOLDER = "path/to/this/folder"
PICTURE = "photo.jpg"
_FENCE = re.compile(r"^```(\w+)[ \t]+(\w+)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Snippet:
  """One program.

  Attributes:
    title: what it shows.
    library: which environment runs it: a format of //apps:export, or "torch".
    install: what pip installs: names of `libraries`.
    code: Python.
  """

  title: str
  library: str
  install: tuple[str, ...]
  code: str

  @property
  def pip_line(self) -> str:
    """The command that makes an environment for this program."""
    return libraries.pip_line(self.install)

  @property
  def tested(self) -> dict[str, Versions]:
    """The versions that ran this program, by library."""
    return libraries.ranges(self.install)


def snippets(kind: str, release: Release) -> list[Snippet]:
  """What the card of a folder of format `kind` shows, the most wanted first."""
  values = _values(release)
  found = []
  for program in EXPORTS[kind].programs:
    if not program.needs or values[program.needs]:
      title, install = _fill(program.title, values), _fill(program.install, values)
      code = _fill(SHARED + program.code, values) + "\n"
      found.append(Snippet(title, program.library, tuple(install.split()), code))
  return found


def extract(text: str) -> list[tuple[str, str, str]]:
  """(language, library, code) of every fenced block of a card that names both."""
  return _FENCE.findall(text)


def writes_captions(release: Release) -> bool:
  """Whether the model has a decoder that generates."""
  return isinstance(getattr(release.config, "decoder", None), ov_models.DecoderConfig)


def reads_texts(release: Release) -> bool:
  """Whether there is a text tower, and what makes its ids."""
  return release.text is not None and release.words is not None


def _values(release: Release) -> dict[str, Any]:
  """What the programs below differ in."""
  words = release.words
  texts, captions = reads_texts(release), writes_captions(release) and words is not None
  return {
    "folder": FOLDER,
    "photo": PICTURE,
    "purpose": "Zero-shot classification" if texts else "Features of a picture",
    "pre": release.preprocess,
    "size": release.preprocess.image_size,
    "words": words,
    "room": words.length - words.append_cls - 2 if words else 0,
    "text": release.text,
    "texts": texts,
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
  )  # programs, not HTML: nothing in them comes from data but numbers
  environment.filters["numbers"] = lambda values: f"({', '.join(f'{v:.6g}' for v in values)})"
  return environment


def _fill(template: str, values: dict[str, Any]) -> str:
  return _environment().from_string(template).render(**values).strip()
