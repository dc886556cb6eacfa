import io

import pytest
from rich.console import Console

from apps.trainer import progress
from apps.trainer.progress import StageProgress, Terminal, duration

FACTS = {"loss": 2.34567, "images_per_second": 1234.5, "mfu": 0.312, "input_wait": 0.004}


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_phase_is_one_line_with_the_time(clock):
  out = io.StringIO()
  terminal = Terminal(file=out)
  clock[0] += 12.34
  terminal.phase("compiling [step] of a long description " + "x" * 100)
  assert out.getvalue() == f"[   12.3 s] compiling [step] of a long description {'x' * 100}\n"


def test_plain_lines_in_files(clock):
  out = io.StringIO()
  with Terminal(file=out, every=30).stage("84px", step=0, first_step=0, last_step=100) as stage:
    for step in range(1, 101):
      stage.update(step, **FACTS)
      clock[0] += 1
  lines = out.getvalue().splitlines()
  assert len(lines) == 5  # at 0, 30, 60, 90 s, and the last step
  assert lines[1] == (
    "84px  step 31/100  loss 2.3457  1,234 img/s  mfu 31.2%  input wait 0.4%  eta 0:01:09"
  )
  assert "step 100/100" in lines[-1] and "eta 0:00:00" in lines[-1]
  assert "\x1b" not in out.getvalue()


def test_unknown_mfu_and_first_eta_are_dashes(clock):
  out = io.StringIO()
  with Terminal(file=out).stage("main", step=40, first_step=0, last_step=100) as stage:
    stage.update(41, **{**FACTS, "mfu": None})
  assert "mfu -" in out.getvalue() and "eta -" in out.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_bar_fits_one_line(width):
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=width, color_system=None)
  with StageProgress(console, "224px", 5000, 5000, 15000, 30.0) as stage:
    stage.update(12345, **FACTS)
    stage._bar.refresh()
    shown = console.render_lines(stage._bar.get_renderable(), console.options)
  assert len(shown) == 1
  text = "".join(segment.text for segment in shown[0])
  for fact in ("12,345/15,000", "loss 2.346", "1,234 img/s", "mfu 31%", "wait 0%", "eta -"):
    assert fact in text


def test_other_processes_print_nothing():
  out = io.StringIO()
  terminal = Terminal(active=False, file=out)
  terminal.phase("restoring")
  with terminal.stage("main", step=0, first_step=0, last_step=1) as stage:
    stage.update(1, **FACTS)
  assert out.getvalue() == ""


def test_duration():
  assert [duration(s) for s in (8.6, 723, 3 * 86400 + 61)] == ["0:00:09", "0:12:03", "3 d 00:01:01"]


@pytest.mark.parametrize("name", ("a{b}", "{0}", "100% {task.x}", "[red]x", "\x1b[31mred\x07"))
def test_names_are_not_markup(name):
  out = io.StringIO()
  terminal = Terminal(file=out)
  terminal._console = Console(file=out, force_terminal=True, color_system=None, width=200)
  with terminal.stage(name, step=0, first_step=0, last_step=2) as stage:
    stage.update(1, **FACTS)
  with terminal.count(name, 2) as advance:
    advance(1)
  terminal.phase(name)
  shown = name.replace("\x1b", r"\x1b").replace("\x07", r"\x07")
  assert out.getvalue().count(shown) >= 3
  assert "\x1b[31m" not in out.getvalue() and "\x07" not in out.getvalue()
