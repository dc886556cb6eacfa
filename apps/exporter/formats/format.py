"""How a format of //apps:export is described; the modules next to this one describe one each.

A format's module is imported to list the formats in `--help`, so nothing here or there imports JAX,
`ov_convert` or a library of the format, except inside functions.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
  from apps.exporter.source import Source
  from ov_convert.parity import Row
  from ov_convert.release import Imported, Release

# Arrays that a library can return, see `clients/client_io.py` of ov_convert.
IMAGE = ("image/tokens", "image/pooled", "image/embedding")
TEXT = ("text/embedding", "logits")
CAPTIONS = ("caption/ids",)
PIXELS, IDS = ("image/pixels",), ("text/ids",)  # of libraries that preprocess by themselves

# Parts of pip lines and titles, filled in as `Program` says.
TOKENIZERS_FOR_TEXTS = "{{ ' tokenizers' if texts else '' }}"
TOKENIZERS = "{{ ' tokenizers' if texts or captions else '' }}"
PURPOSES = "{{ purpose if texts or not captions else 'Captions' }}" + (
  "{{ ' and captions' if texts and captions else '' }}"
)


@dataclasses.dataclass(frozen=True)
class Versions:
  """The tested range of one library.

  Attributes:
    oldest: the oldest version that runs the programs; it is a lower bound of the pip line.
    newest: the newest version that was tried.
  """

  oldest: str
  newest: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a model card, before the values of `snippets` are filled in.

  `title`, `install` and `code` are Jinja templates; `code` can use the macros of `macros`. It runs
  where the libraries of `install`, their dependencies, and nothing else are installed.

  Attributes:
    title: what it shows.
    library: which environment runs it: a format of //apps:export, or "torch".
    install: names of what pip installs, separated by blanks.
    code: Python.
    needs: the value without which the card omits the program; "" for none.
  """

  title: str
  library: str
  install: str
  code: str
  needs: str = ""


@dataclasses.dataclass(frozen=True)
class Option:
  """An integer that a writer takes, as the flag --<format>_<name>.

  Attributes:
    name: keyword argument of `ExportFormat.write`.
    help: description of the flag.
    resolve: returns the value to write with, the default for None; raises ValueError for a value
      that cannot be used.
  """

  name: str
  help: str
  resolve: Callable[[int | None], int]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """What the user gave for an import.

  Attributes:
    python: interpreter with PyTorch, for files that only it reads; see `ov_convert.client_env`.
    image_size: pixels, for formats with "image_size" in `Format.reads`.
    num_heads: attention heads, for formats with "num_heads" in `Format.reads`.
  """

  python: str | os.PathLike[str] | None = None
  image_size: int | None = None
  num_heads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """A format that is imported, exported, or both.

  Attributes:
    name: in --format=NAME and --from=NAME:PATH.
    read: reads a folder; None for a format that is only exported.
    reads: options of an import that the files of this format do not state themselves.
  """

  name: str
  read: "Callable[[Path, ReadOptions], Imported] | None" = None
  reads: tuple[str, ...] = ()


def _no_notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFormat(Format):
  """A format that is exported.

  Attributes:
    title: name of the format in sentences of the model card.
    library: `library_name` of the model card; None if the hub has no name for it.
    check: raises ValueError if the format cannot hold a model.
    write: writes the folder; takes the `options` by name.
    client: script in `ov_convert/clients` that loads the folder as the library documents it.
    here: whether `client` runs in this environment: it needs JAX and no client library.
    offers: names of arrays that the library must return, if our model has them.
    complete: adds files that need more than the release, and returns further comparisons.
    programs: of the model card, the most useful first.
    tested: versions of libraries that no other format needs; see `libraries`.
    texts: whether the folder holds a text tower.
    joint: whether image and text tower are one model of the library.
    decoder: caption decoders that the folder holds: none, those that write word by word, or any.
    preprocesses: whether the library has its own preprocessing.
    sizes: returns the sentences of the card on images of another size; see `fixed_size`.
    notes: returns sentences of the card on surprising behavior, from the release and parity.json.
    options: of the writer.
  """

  title: str
  library: str | None
  check: "Callable[[Release], None]"
  write: Callable[..., None]
  client: str
  here: bool = False
  offers: tuple[str, ...]
  complete: "Callable[[Path, Source], list[Row]] | None" = None
  programs: tuple[Program, ...]
  tested: Mapping[str, Versions] = dataclasses.field(default_factory=dict)
  texts: bool = True
  joint: bool = True
  decoder: Literal["none", "writes", "any"] = "none"
  preprocesses: bool = False
  sizes: "Callable[[Release], str]"
  notes: "Callable[[Release, Mapping[str, Any]], Sequence[str]]" = _no_notes
  options: tuple[Option, ...] = ()


def fixed_size(release: "Release") -> str:
  """Return the sentences on image sizes of a format that stores the shape of its input."""
  side = release.encoder.image_size
  return f"It reads images of {side} x {side} pixels and no others. {_another_size(release)}"


def interpolating(library: str) -> "Callable[[Release], str]":
  """Return `ExportFormat.sizes` of a library that interpolates positions.

  Args:
    library: what the library does with images of another size, as a clause.
  """

  def sizes(release: "Release") -> str:
    side = release.encoder.image_size
    cosine = "0.96" if release.encoder.position == "sincos2d" else "0.99999"
    return (
      f"It is for images of {side} x {side} pixels. For others {library}: features are then not "
      f"those of the original (cosine {cosine} for a random ViT-Ti/16 of 48 pixels at 96). "
      f"{_another_size(release)}"
    )

  return sizes


def _another_size(release: "Release") -> str:
  computed = release.encoder.position == "sincos2d"
  positions = "positions are computed for it" if computed else "learned positions are resampled"
  return f"For another size export the run again with --image_size: {positions}."
