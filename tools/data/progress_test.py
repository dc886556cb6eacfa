"""Progress bar on terminals and in log files."""

import io

from rich.console import Console

from tools.data import progress


def test_bar_on_a_terminal():
  file = io.StringIO()
  with progress.Counter(
    "converting", 10, Console(file=file, force_terminal=True, width=100)
  ) as count:
    count(4)
    count(6)
  assert "converting" in file.getvalue() and "10/10" in file.getvalue()


def test_lines_into_a_file(monkeypatch):
  file = io.StringIO()
  monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
  with progress.Counter("converting", 10, Console(file=file, width=100)) as count:
    count(4)
  assert "converting  4/10" in file.getvalue() and "s left" in file.getvalue()


def test_quiet_when_short():
  file = io.StringIO()
  with progress.Counter("converting", 10, Console(file=file)) as count:
    count(10)
  assert not file.getvalue()
