"""Count the lines of Python source and tests in git revisions, by folder.

python tools/ci/lines.py [REVISION ...]

Files named `*_test.py` are tests. Comment lines and blank lines count. Each revision is a column.
"""

import collections
import pathlib
import subprocess
import sys


def count(revision: str) -> dict[tuple[str, bool], int]:
  """Return the number of lines by (folder, whether they are tests).

  Args:
    revision: name of a git revision.

  Raises:
    subprocess.CalledProcessError: if git does not know the revision.
  """
  names = _git("ls-tree", "-r", "--name-only", "-z", revision).decode().split("\0")
  lines: dict[tuple[str, bool], int] = collections.Counter()
  for name in names:
    if name.endswith(".py"):
      content = _git("show", f"{revision}:{name}")
      lines[folder_of(name), name.endswith("_test.py")] += content.count(b"\n")
  return lines


def folder_of(name: str) -> str:
  """Return the folder of a file in the table: two levels in packages and tools, otherwise one."""
  parts = pathlib.PurePosixPath(name).parts[:-1]
  return "/".join(parts[:2] if parts and parts[0] in ("packages", "tools", "apps") else parts[:1])


def table(counts: dict[str, dict[tuple[str, bool], int]]) -> list[str]:
  """Format one line per folder, and the sums."""
  folders = sorted({folder for lines in counts.values() for folder, _ in lines})
  rows = [("folder", *(f"{name} {kind}" for name in counts for kind in ("source", "tests")))]
  for folder in folders:
    cells = [lines.get((folder, test), 0) for lines in counts.values() for test in (False, True)]
    rows.append((folder or ".", *map(str, cells)))
  sums = [
    sum(n for (_, is_test), n in lines.items() if is_test == test)
    for lines in counts.values()
    for test in (False, True)
  ]
  rows.append(("all", *map(str, sums)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
    )
    for row in rows
  ]


def _git(*arguments: str) -> bytes:
  return subprocess.run(["git", *arguments], check=True, capture_output=True).stdout


def main() -> None:
  revisions = sys.argv[1:] or ["HEAD"]
  try:
    print("\n".join(table({name: count(name) for name in revisions})))
  except subprocess.CalledProcessError as error:
    sys.exit(error.stderr.decode(errors="replace").strip())


if __name__ == "__main__":
  main()
