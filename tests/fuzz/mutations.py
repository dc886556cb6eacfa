"""Seeded random damage to bytes: bit flips, cuts, insertions, repeats, and unusual values."""

import json
from typing import Any

import numpy as np

_NUMBERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\1\0\0\0")
_TEXTS = (
  *(b"\\ud83d", b"\xed\xa0\xbd", b"\xff", b"\0", b"\xef\xbb\xbf", b"\xc3\xa9", b"\n", b"\r"),
  *(b'"', b"\\", b"[", b"{", b"}", b",", b":", b"null", b"-1", b"1e999", b"NaN", b"../", b"/"),
  *(b"[" * 2000, b"9" * 5000),
)
_VALUES: tuple[Any, ...] = (
  *(
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    float("nan"),
    "",
    " ",
    "\n",
    "\0",
    "\ud83d",
    "\udcff",
    "../x.jpg",
  ),
  *("/etc/passwd", "gone.jpg", "a" * 300, "x" * 2_000_000, [], [[]], ["a", 1], {}, {"raw": None}),
)
_MOST = 3  # maximum number of changes per input


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
  """Return `data` with 1 to 3 random changes, of a JSON value if it is JSON, or of bytes."""
  if rng.random() < 0.5 and (documents := _json_lines(data)):
    return _mutate_json(rng, *documents)
  changed = bytearray(data)
  for _ in range(rng.integers(1, _MOST + 1)):
    _change(rng, changed)
  return bytes(changed)


def _json_lines(data: bytes) -> tuple[list[bytes], list[int]] | None:
  """Split data into one JSON document or JSON lines, and return which parts are valid JSON."""
  if data[:1] not in (b"{", b"["):
    return None
  for lines in ([data], data.split(b"\n")):
    parsed = [i for i, line in enumerate(lines) if _is_json(line)]
    if parsed:
      return lines, parsed
  return None


def _is_json(data: bytes) -> bool:
  try:
    return isinstance(json.loads(data), dict | list)
  except ValueError:
    return False


def _mutate_json(rng: np.random.Generator, lines: list[bytes], parsed: list[int]) -> bytes:
  """Replace one value in one of the documents."""
  at = parsed[rng.integers(len(parsed))]
  root = {"": json.loads(lines[at])}
  parents: list[Any] = [root]
  for parent in parents:
    children = parent.values() if isinstance(parent, dict) else parent
    parents += [child for child in children if isinstance(child, dict | list) and child]
  parent = parents[rng.integers(len(parents))]
  keys = [*parent] if isinstance(parent, dict) else range(len(parent))
  key = keys[rng.integers(len(keys))]
  if rng.random() < 0.2 and parent is not root:
    del parent[key]
  else:
    parent[key] = _VALUES[rng.integers(len(_VALUES))]
  lines[at] = json.dumps(root[""]).encode()
  return b"\n".join(lines)


def _change(rng: np.random.Generator, data: bytearray) -> None:
  if not data:
    data += rng.bytes(int(rng.integers(0, 20)))
    return
  # Headers are at the beginning and short.
  near = min(len(data), 64) if rng.random() < 0.4 else len(data)
  at = int(rng.integers(near))
  few = int(rng.integers(1, 24))
  match rng.integers(8):
    case 0:
      data[at] ^= 1 << int(rng.integers(8))
    case 1:
      data[at] = int(rng.integers(256))
    case 2:
      del data[at : at + few]
    case 3:
      data[at:at] = rng.bytes(few)
    case 4:
      data[at : at + 4] = _NUMBERS[rng.integers(len(_NUMBERS))]
    case 5:
      data[at:at] = _TEXTS[rng.integers(len(_TEXTS))]
    case 6:
      data[at:at] = data[at : at + int(rng.integers(1, 2000))]  # repeat it
    case 7:
      del data[at:]
