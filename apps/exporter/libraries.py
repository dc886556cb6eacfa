"""Library versions that run the programs of model cards: the oldest and the newest that were tried.

`pip_line` puts the oldest ones into a card's `pip install` line. The script
`//tests/clients:clean_environments` builds an environment from that line, once with the oldest and
once with the newest versions, and runs the programs there.
"""

from collections.abc import Iterable, Mapping
import shlex
from types import MappingProxyType

from apps.exporter.formats.format import Versions
from apps.exporter.formats.table import EXPORTS

# Libraries of several formats; those of one stand with their reasons in its module of `formats`.
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
# What our own packages depend on. They are installed from a checkout; their pyproject.toml has the
# lower bounds, and these are the first releases within them.
OWN: Mapping[str, Mapping[str, Versions]] = MappingProxyType(
  {
    "packages/ov-models": {
      "flax": Versions("0.12.4", "0.12.8"),
      "jax": Versions("0.9.1", "0.10.2"),
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
  """Return the command that installs `installed`, each from its oldest tested version on."""
  return "pip install " + " ".join(
    name if name in OWN else f'"{name}>={TESTED[name].oldest}"' for name in installed
  )


def requirements(line: str, versions: str) -> list[str]:
  """Return what pip installs for a test of the pip line of a card.

  Args:
    line: as `pip_line` makes it.
    versions: "newest" for the line as it stands; "oldest" for exactly its lower bounds, and those
      of our own packages.

  Raises:
    ValueError: `versions` is neither.
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
  """Return the tested versions of `installed`, with those of what our own packages depend on."""
  found: dict[str, Versions] = {}
  for name in installed:
    found |= OWN[name] if name in OWN else {name: TESTED[name]}
  return found
