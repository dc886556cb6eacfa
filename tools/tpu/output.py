"""What a verb found, as a table for people or as one JSON object for programs."""

from collections.abc import Sequence
import dataclasses
import json
import shlex
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
  """What a verb found.

  Attributes:
    rows: one for each worker or TPU; all with the same keys.
    text: a line for people below the table.
    failed: how many of the rows are failures; they have the key `error`.
  """

  rows: list[dict[str, Any]]
  text: str = ""
  failed: int = 0


def as_text(result: Result) -> str:
  """The table, and the line below it."""
  columns = list(dict.fromkeys(key for row in result.rows for key in row))
  cells = [columns, *([cell(row.get(column)) for column in columns] for row in result.rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells] if result.rows else []
  return "\n".join([*lines, *([result.text] if result.text else [])])


def as_json(verb: str, result: Result) -> str:
  found = {"verb": verb, "ok": not result.failed, "rows": result.rows, "text": result.text}
  return json.dumps(found)


def plan_as_text(commands: Sequence[Sequence[str]]) -> str:
  return "\n".join(shlex.join(command) for command in commands)


def plan_as_json(verb: str, commands: Sequence[Sequence[str]]) -> str:
  return json.dumps({"verb": verb, "dry_run": True, "commands": commands})


def cell(value: Any) -> str:
  """A value in one line; what a terminal would act on is written as its escape."""
  if value is None:
    return "-"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, list):
    value = ", ".join(map(str, value)) or "-"
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
