"""Format the table as text, split into blocks that fit the width of the terminal."""

from collections.abc import Sequence

from apps.trainer.report_text import figure, interval
from tools.compare.evaluations import Column, Evaluation, labels, warnings

_GAP = "  "


def render(rows: Sequence[Evaluation], columns: Sequence[Column], width: int) -> str:
  """Format evaluations as rows, and metrics with their intervals as columns.

  Args:
    rows: the evaluations that `columns` was made from.
    columns: the metrics to show.
    width: maximum line length. Columns that do not fit follow in further blocks with row names.
  """
  names = labels(rows)
  head = _aligned(
    ["", *names], ["step", *(f"{row.step:,}" for row in rows)],
    ["samples", *(f"{row.examples_seen:,}" for row in rows)],
  )  # fmt: skip
  blocks, line_width = [head], len(head[0])
  for column in columns:
    cells = _cells(column)
    if line_width + len(_GAP) + len(cells[0]) > width and blocks[-1] is not head:
      blocks, line_width = [*blocks, _aligned(["", *names])], len(_aligned(["", *names])[0])
    blocks[-1] = [line + _GAP + cell for line, cell in zip(blocks[-1], cells, strict=True)]
    line_width += len(_GAP) + len(cells[0])
  lines = ["\n".join(line.rstrip() for line in block) for block in blocks]
  notes = []
  if any(column.best for column in columns):
    notes.append("* best; none is marked if the rows are not comparable")
  levels = sorted({row.level for row in rows})
  notes.append(f"intervals: {', '.join(f'{level:.0%}' for level in levels)}, over examples")
  incomparable = [f"! not comparable: {text}" for text in warnings(columns, names)]
  return "\n\n".join([*lines, "\n".join([*incomparable, *notes])])


def _cells(column: Column) -> list[str]:
  """Return the heading and the cells, padded to equal width."""
  star = ["*" if row in column.best else " " for row in range(len(column.results))]
  values = _right(["–" if r is None else figure(r) for r in column.results])
  ranges = _right(["" if r is None else interval(r) for r in column.results])
  cells = [f"{v}{s} {r}".rstrip() for v, s, r in zip(values, star, ranges, strict=True)]
  heading = column.name + (f" [{column.detail}]" if column.detail else "")
  return _left([heading + (" !" if column.differences else ""), *cells])


def _aligned(first: Sequence[str], *others: Sequence[str]) -> list[str]:
  return [_GAP.join(cells) for cells in zip(_left(first), *map(_right, others), strict=True)]


def _left(cells: Sequence[str]) -> list[str]:
  return [cell.ljust(max(map(len, cells))) for cell in cells]


def _right(cells: Sequence[str]) -> list[str]:
  return [cell.rjust(max(map(len, cells))) for cell in cells]
