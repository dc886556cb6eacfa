"""Docstrings of this repository as reStructuredText.

Docstrings are plain text in the style of Google, with `code` in single backticks. Napoleon converts
the sections; this module converts what reStructuredText would read differently.
"""

import re

_FIELD = re.compile(r"\*{0,2}\w+(, \*{0,2}\w+)*: \S")
_ITEM = re.compile(r"(-|\d+\.) ")  # of a list; its other lines are indented
_SECTION = re.compile(
  r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note|References|Warning|Warns):"
)


def to_rst(lines: list[str]) -> list[str]:
  """Return a docstring whose sections Napoleon can convert.

  Fields that follow the text without a header become the section "Attributes". Indented blocks
  become literal blocks. Characters of markup are escaped outside of code.

  Args:
    lines: the docstring without its indentation.
  """
  result: list[str] = []
  section = literal = fields = item = False
  for number, line in enumerate(lines):
    indented, blank = line.startswith(" "), not line.strip()
    if not indented and not blank:
      after_blank = number > 0 and not lines[number - 1].strip()
      section = bool(_SECTION.fullmatch(line.strip()))
      literal = False
      item = bool(_ITEM.match(line))
      if _FIELD.match(line) and (after_blank or fields) and not section:
        if not fields:
          result.append("Attributes:")
        fields = True
      else:
        fields = False
    elif indented and not (section or fields or literal or item):
      if not (result and not result[-1].strip()):
        result.append("")
      result += ["::", ""]
      literal = True
    if literal or _is_example(lines, number):
      result.append(line)
    else:
      result.append(("  " if fields and not blank else "") + _escape(line))
  return result


def _is_example(lines: list[str], number: int) -> bool:
  """Return whether a line belongs to a doctest: from ">>>" to the next blank line."""
  while number >= 0 and lines[number].strip():
    if lines[number].lstrip().startswith(">>>"):
      return True
    number -= 1
  return False


def _escape(line: str) -> str:
  """Return a line with literal code, and with markup escaped elsewhere."""
  parts = re.split(r"(``.+?``|`[^`]+`)", line)
  for index, part in enumerate(parts):
    if index % 2:
      parts[index] = f"``{part.strip('`')}``" + ("\\ " if parts[index + 1][:1].isalnum() else "")
    else:
      text = re.sub(r"([*|`\\])", r"\\\1", part)
      parts[index] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", text)
  return "".join(parts)
