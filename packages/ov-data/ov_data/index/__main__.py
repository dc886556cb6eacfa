"""Build the indexes of shards ahead of a run and verify all checksums.

    python -m ov_data.index DIR_OR_GLOB...

Exit codes: 0 all records are valid; 1 some are damaged or missing; 2 the shards cannot be opened.
"""

from collections.abc import Sequence
import io
import logging
import os
import sys

from ov_data import formats, fs, manifest, shard_names
from ov_data.index.build import load_indexes
from ov_data.index.kind import TFRECORD, ShardKind

SOUND, DAMAGED, MISTAKE = 0, 1, 2


def main(arguments: Sequence[str]) -> int:
  """Index every folder, shard or glob in `arguments`; return the exit code."""
  if not arguments or set(arguments) & {"-h", "--help"}:
    print("usage: python -m ov_data.index DIR_OR_GLOB...", file=sys.stderr)
    return SOUND if arguments else MISTAKE
  code = SOUND
  for argument in arguments:
    try:
      code = max(code, _index(argument))
    except (ValueError, OSError, ImportError) as error:
      print(f"ov_data.index: error: {fs.printable(' '.join(str(error).split()))}", file=sys.stderr)
      code = MISTAKE
  return code


def _index(argument: str) -> int:
  def show(done: int, total: int) -> None:
    if sys.stderr.isatty():
      print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr)

  kind = _kind(argument)
  indexes = load_indexes(shard_names.find_all(argument, kind), show, kind)
  damage = sum(len(index.damage) for index in indexes)
  if sys.stderr.isatty():
    print(file=sys.stderr)
  size = sum(len(index) * kind.bytes_per_record for index in indexes)
  print(
    f"{fs.printable(argument)}: {sum(map(len, indexes))} records in {len(indexes)} shards, "
    f"{damage} damaged; indexes use {size / 1e6:.1f} MB"
  )
  try:
    manifest.check_counts(indexes)
  except ValueError as error:
    print(f"ov_data.index: {fs.printable(str(error))}", file=sys.stderr)
    return DAMAGED
  return DAMAGED if damage else SOUND


def _kind(argument: str) -> ShardKind:
  """Return the format of the shards at a path, or in the subfolders of a folder without shards."""
  names = shard_names.names_at(argument)
  folders = [fs.join(argument, name) for name in names] if fs.is_dir(argument) else []
  below = (name for folder in folders if fs.is_dir(folder) for name in fs.listdir(folder))
  for there in (names, below):
    there = [*there]
    for kind in formats.SHARD_KINDS:
      if any(shard_names.is_shard(name, kind) for name in there):
        return kind
  return TFRECORD


if __name__ == "__main__":
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # closed by the caller
      setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  logging.basicConfig(format="%(message)s")
  try:
    sys.exit(main(sys.argv[1:]))
  except KeyboardInterrupt:
    print("ov_data.index: interrupted; repeat the command to resume", file=sys.stderr)
    sys.exit(130)
