"""Conditions on columns, such as `similarity > 0.25 and width >= 200`, without evaluating code.

The text is parsed as a Python expression, of which only these parts are accepted: names of columns,
numbers, `+ - * /`, comparisons, `and`, `or`, `not`, and `is None`. Logic has three values as in
SQL: a comparison with a null is unknown, and a record is kept only if its condition is true.
"""

import ast
from collections.abc import Callable, Mapping
import dataclasses
import math
import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAX_CHARACTERS = 1000
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
}
_EXAMPLE = "expected a condition such as 'similarity > 0.25 and width >= 200'"

Columns = Mapping[str, NDArray[Any]]


class Truth(NamedTuple):
  """Records for which a condition is true, and for which it is false; bool [n]."""

  true: NDArray[np.bool_]
  false: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Condition:
  """A condition on columns.

  Attributes:
    text: source text.
    columns: names of the columns that it reads.
  """

  text: str
  columns: frozenset[str]
  _node: ast.expr

  def __call__(self, columns: Columns) -> Truth:
    """Evaluate the condition.

    Args:
      columns: masked arrays of numbers [n] by name.
    """
    with np.errstate(all="ignore"):
      return _truth(self._node, columns)


def parse(text: str, names: frozenset[str]) -> list[Condition]:
  """Return the conditions that a text joins by `and`; a record is kept if all are true.

  Args:
    text: the condition.
    names: names of the columns of numbers.

  Raises:
    ValueError: if the text has another form, or names other columns.
  """
  if len(text) > _MAX_CHARACTERS:
    raise ValueError(f"the condition has {len(text)} characters; expected at most 1,000")
  try:
    body = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ValueError(f"condition {text!r}: {error}; {_EXAMPLE}") from None
  match body:
    case ast.BoolOp(ast.And(), nodes):
      pass
    case _:
      nodes = [body]
  conditions = []
  for node in nodes:
    found = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    if unknown := sorted(found - names):
      raise ValueError(
        f"condition {text!r}: there is no column {unknown[0]!r} of numbers; there are "
        f"{', '.join(sorted(names))}"
      )
    condition = Condition(ast.unparse(node), frozenset(found), node)
    condition(dict.fromkeys(found, np.ma.masked_array([1.0], [False])))  # reject other forms now
    conditions.append(condition)
  return conditions


def _truth(node: ast.expr, columns: Columns) -> Truth:
  """Evaluate an expression with a truth value."""
  match node:
    case ast.BoolOp(op, values):
      parts = [_truth(value, columns) for value in values]
      every, some = (np.logical_and.reduce, np.logical_or.reduce)
      if isinstance(op, ast.Or):
        every, some = some, every
      return Truth(every([part.true for part in parts]), some([part.false for part in parts]))
    case ast.UnaryOp(ast.Not(), value):
      return Truth(*reversed(_truth(value, columns)))
    case ast.Compare(left, [ast.Is() | ast.IsNot() as op], [ast.Constant(None)]):
      is_null = np.ma.getmaskarray(_number(left, columns))
      return Truth(is_null, ~is_null) if isinstance(op, ast.Is) else Truth(~is_null, is_null)
    case ast.Compare(left, ops, rights):
      operands = [_number(value, columns) for value in (left, *rights)]
      pairs = [
        _compare(op, first, second) for op, first, second in zip(ops, operands, operands[1:])
      ]
      true = np.logical_and.reduce([pair.true for pair in pairs])
      return Truth(true, np.logical_or.reduce([pair.false for pair in pairs]))
  raise ValueError(f"{ast.unparse(node)!r} is not a comparison; {_EXAMPLE}")


def _compare(op: ast.cmpop, first: Any, second: Any) -> Truth:
  if type(op) not in _COMPARISONS:
    raise ValueError(f"comparison {type(op).__name__!r}; expected one of < <= > >= == !=")
  is_known = ~(np.ma.getmaskarray(first) | np.ma.getmaskarray(second))
  result = np.ma.getdata(_COMPARISONS[type(op)](np.ma.getdata(first), np.ma.getdata(second)))
  return Truth(result & is_known, ~result & is_known)


def _number(node: ast.expr, columns: Columns) -> Any:
  """Evaluate an expression with a number; float64 [n], masked for nulls and undefined results."""
  match node:
    case ast.Name(name):
      return np.ma.masked_invalid(columns[name].astype(np.float64))
    case ast.Constant(value) if math.isfinite(number := _finite(value)):
      return np.ma.masked_array([number], [False])
    case ast.UnaryOp(ast.USub() | ast.UAdd() as op, value):
      return _number(value, columns) * (-1 if isinstance(op, ast.USub) else 1)
    case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
      result = _OPERATORS[type(op)](_number(left, columns), _number(right, columns))
      return np.ma.masked_invalid(result)
  raise ValueError(f"{ast.unparse(node)!r} is not a number or column; {_EXAMPLE}")


def _finite(value: object) -> float:
  """Return a constant as float; NaN or Inf if it is not a number, or too large."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.inf
