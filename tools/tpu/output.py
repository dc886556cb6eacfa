"""Terminal output of the tool: progress, tables and confirmation prompts."""

import sys
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

Result = tuple[list[dict[str, Any]], str]  # rows for workers or TPUs, and a line of text
FLAGS = flags.FLAGS


def log(text: str) -> None:
  """Print progress to stderr; stdout is reserved for results."""
  print(f"tpu: {text}", file=sys.stderr, flush=True)


def show(rows: list[dict[str, Any]], text: str, file: Any) -> None:
  """Print a table, then a line of text."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  table = Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)
  for row in rows:
    table.add_row(*(Text(_cell(row.get(column))) for column in columns))
  console = Console(file=file, width=None if file.isatty() else 10_000)
  if rows:
    console.print(table)
  if text:
    print(text, file=file, flush=True)


def _cell(value: Any) -> str:
  """Format a value on one line; control characters are escaped."""
  if isinstance(value, bool):
    return "yes" if value else "no"
  text = (
    ", ".join(map(str, value)) if isinstance(value, list) else str("" if value is None else value)
  )
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or "-"


def confirm(question: str) -> None:
  """Raise ValueError unless the user confirms, by --yes or on the terminal."""
  if FLAGS.yes or FLAGS.dry_run:
    return
  if not sys.stdin.isatty():
    raise ValueError(f"{question} There is no terminal to ask on; add --yes")
  print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
  if sys.stdin.readline().strip().lower() not in ("y", "yes"):
    raise ValueError("nothing was done")
