"""Oldest and newest tested library versions for the programs of model cards.

`pip_line` returns the `pip install` line of a card, with the oldest versions as lower bounds. The
script `//tests/clients:clean_environments` builds an environment from that line, once with the
oldest and once with the newest versions, and runs the programs there.
"""

from collections.abc import Iterable, Mapping
import shlex
from types import MappingProxyType

from apps.exporter.formats.format import Versions
from apps.exporter.formats.table import EXPORTS

# Libraries used by several formats; those of a single format are in its module in `formats`.
_SHARED = {
  "torch": Versions("2.6.0", "2.15.0"),  # newest transformers requires 2.6
  "safetensors": Versions("0.5.0", "0.8.0"),
  "tokenizers": Versions("0.20.0", "0.23.3"),
  "numpy": Versions("2.0.0", "2.4.6"),
  "pillow": Versions("11.0.0", "13.0.0"),
}
TESTED: Mapping[str, Versions] = MappingProxyType(
  {name: found for f in EXPORTS.values() for name, found in f.tested.items()} | _SHARED
)
# Dependencies of our own packages, which are installed from a checkout. The oldest versions are the
# first releases within the lower bounds of pyproject.toml.
OWN: Mapping[str, Mapping[str, Versions]] = MappingProxyType(
  {
    "packages/ov-models": {
      "einops": Versions("0.8.0", "0.8.2"),
      "flax": Versions("0.12.4", "0.12.8"),
      "jax": Versions("0.9.1", "0.10.2"),
      "jaxtyping": Versions("0.3.0", "0.3.11"),
      "numpy": Versions("2.0.0", "2.4.6"),
      "safetensors": Versions("0.5.0", "0.8.0"),
    },
    "packages/ov-data": {
      "cykooz-resizer": Versions("4.0.1", "4.0.1"),
      "google-crc32c": Versions("1.5.0", "1.9.0"),
      "numpy": Versions("2.0.0", "2.4.6"),
      "pillow": Versions("11.0.0", "13.0.0"),
      "protobuf": Versions("5.26.0", "7.36.2"),
      "simplejpeg": Versions("1.8.0", "1.9.0"),
      "tokenizers": Versions("0.20.0", "0.23.3"),
    },
  }
)


def pip_line(installed: Iterable[str]) -> str:
  """Return the pip command for `installed`, with the oldest tested versions as lower bounds."""
  return "pip install " + " ".join(
    name if name in OWN else f'"{name}>={TESTED[name].oldest}"' for name in installed
  )


def requirements(line: str, versions: str) -> list[str]:
  """Return the pip requirements for a test of the pip line of a card.

  Args:
    line: line returned by `pip_line`.
    versions: "newest" for the line unchanged; "oldest" to pin its lower bounds and those of our own
      packages.

  Raises:
    ValueError: if `versions` is neither.
  """
  stated = shlex.split(line)[2:]
  if versions == "newest":
    return stated
  if versions != "oldest":
    raise ValueError(f"versions={versions!r}; expected 'newest' or 'oldest'")
  own = {name: found.oldest for part in stated if part in OWN for name, found in OWN[part].items()}
  pinned = [part.replace(">=", "==") for part in stated]
  return pinned + [f"{name}=={oldest}" for name, oldest in own.items()]


def names(line: str) -> list[str]:
  """Return the names in a pip line."""
  return [part.partition(">=")[0] for part in shlex.split(line)[2:]]


def ranges(installed: Iterable[str]) -> dict[str, Versions]:
  """Return the tested versions of `installed`, including dependencies of our own packages."""
  found: dict[str, Versions] = {}
  for name in installed:
    found |= OWN[name] if name in OWN else {name: TESTED[name]}
  return found
