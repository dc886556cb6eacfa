"""Description of a format of //apps:export; each other module of this package defines one.

The modules are imported to list the formats in `--help`, so JAX, `ov_convert` and libraries of the
format are imported only inside functions.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
  from apps.exporter.source import Source
  from ov_convert.accuracy import Accuracy
  from ov_convert.parity import Row
  from ov_convert.release import Imported, Release

# Arrays that a library can return, see `clients/client_io.py` of ov_convert.
IMAGE = ("image/tokens", "image/pooled", "image/embedding")
TEXT = ("text/embedding", "logits")
CAPTIONS = ("caption/ids",)
PIXELS, IDS = ("image/pixels",), ("text/ids",)  # for libraries with their own preprocessing

# Templates of pip lines and titles, see `Program`.
TOKENIZERS_FOR_TEXTS = "{{ ' tokenizers' if texts else '' }}"
TOKENIZERS = "{{ ' tokenizers' if texts or captions else '' }}"
PURPOSES = "{{ purpose if texts or not captions else 'Captions' }}" + (
  "{{ ' and captions' if texts and captions else '' }}"
)


@dataclasses.dataclass(frozen=True)
class Versions:
  """The tested range of one library.

  Attributes:
    oldest: oldest version that runs the programs; lower bound of the pip line.
    newest: newest tested version.
  """

  oldest: str
  newest: str


@dataclasses.dataclass(frozen=True)
class Program:
  """Program of a model card, as templates for the values of `snippets`.

  `title`, `install` and `code` are Jinja templates; `code` can use the macros of `macros`. It must
  run in an environment with the libraries of `install` and their dependencies only.

  Attributes:
    title: heading of the program.
    library: environment that runs it: a format of //apps:export, or "torch".
    install: pip packages, separated by spaces.
    code: Python code.
    needs: value without which the card omits the program; "" for none.
  """

  title: str
  library: str
  install: str
  code: str
  needs: str = ""


@dataclasses.dataclass(frozen=True)
class Option:
  """Option of a format, set by the flag --<format>_<name>.

  Attributes:
    name: keyword argument of `ExportFormat.write` and `ExportFormat.finish`.
    help: description of the flag.
    resolve: validates a value, or returns the default for None; raises ValueError.
    kind: type of the value.
    is_path: whether the value is a path of this machine, which the exported files do not record.
    requires: name of the option without which this one has no effect; None for no such option.
  """

  name: str
  help: str
  resolve: Callable[[Any], int | float | str]
  kind: type[int] | type[float] | type[str] = int
  is_path: bool = False
  requires: str | None = None


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """Options of an import.

  Attributes:
    python: interpreter with PyTorch, for PyTorch files; see `ov_convert.client_env`.
    image_size: image size, for formats with "image_size" in `Format.reads`.
    num_heads: attention heads, for formats with "num_heads" in `Format.reads`.
  """

  python: str | os.PathLike[str] | None = None
  image_size: int | None = None
  num_heads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """Format for import, export, or both.

  Attributes:
    name: name in --format=NAME and --from=NAME:PATH.
    read: reads a folder; None for a format that is only exported.
    reads: import options that apply to this format, because its files do not state them.
  """

  name: str
  read: "Callable[[Path, ReadOptions], Imported] | None" = None
  reads: tuple[str, ...] = ()


def _no_notes(release: "Release", facts: Mapping[str, Any]) -> Sequence[str]:
  return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFormat(Format):
  """Format for export.

  Attributes:
    title: name of the format in the text of the model card.
    library: `library_name` of the model card; None if the hub has no name for it.
    check: raises ValueError if the format does not support a model.
    write: writes the folder; takes `options` as keyword arguments.
    client: script in `ov_convert/clients` that loads the folder as documented by the library.
    here: whether `client` runs in this environment, with JAX and no client library.
    offers: names of arrays that the library must return, if our model has them.
    complete: adds files that need more than the release, and returns further comparisons.
    finish: changes the folder after its outputs agreed with ours, such as to smaller weights, and
      returns the accuracy of the result, or None if it changed no outputs. Takes the folder, the
      source, a function that writes a large probe and returns its folder, and `options` as keyword
      arguments.
    programs: programs of the model card, the most useful first.
    tested: versions of libraries that no other format needs; see `libraries`.
    texts: whether the folder contains the text tower.
    joint: whether image and text tower are one model in the library.
    decoder: caption decoders that the folder contains: none, autoregressive ones, or any.
    preprocesses: whether the library has its own preprocessing.
    sizes: returns the text of the card on images of another size; see `fixed_size`.
    notes: returns sentences of the card on unexpected behavior, from the release and parity.json.
    options: options of `write` and `finish`.
  """

  title: str
  library: str | None
  check: "Callable[[Release], None]"
  write: Callable[..., None]
  client: str
  here: bool = False
  offers: tuple[str, ...]
  complete: "Callable[[Path, Source], list[Row]] | None" = None
  finish: "Callable[..., Accuracy | None] | None" = None
  programs: tuple[Program, ...]
  tested: Mapping[str, Versions] = dataclasses.field(default_factory=dict)
  texts: bool = True
  joint: bool = True
  decoder: Literal["none", "autoregressive", "any"] = "none"
  preprocesses: bool = False
  sizes: "Callable[[Release], str]"
  notes: "Callable[[Release, Mapping[str, Any]], Sequence[str]]" = _no_notes
  options: tuple[Option, ...] = ()


def fixed_size(release: "Release") -> str:
  """Return the text on image sizes for a format with a fixed input shape."""
  side = release.encoder.image_size
  return f"It reads images of {side} x {side} pixels and no others. {_another_size(release)}"


def interpolating(library: str) -> "Callable[[Release], str]":
  """Return `ExportFormat.sizes` for a library that interpolates positions.

  Args:
    library: clause that describes what the library does with images of another size.
  """

  def sizes(release: "Release") -> str:
    side = release.encoder.image_size
    cosine = "0.96" if release.encoder.position == "sincos2d" else "0.99999"
    return (
      f"It is for images of {side} x {side} pixels. For others {library}; features then differ "
      f"from the original (cosine {cosine} for a random ViT-Ti/16 of 48 pixels at 96). "
      f"{_another_size(release)}"
    )

  return sizes


def _another_size(release: "Release") -> str:
  computed = release.encoder.position == "sincos2d"
  positions = "positions are computed for it" if computed else "learned positions are resampled"
  return f"For another size, export the run again with --image_size: {positions}."
