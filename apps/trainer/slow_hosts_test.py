"""Tests of the straggler detection with a fake clock."""

from apps.trainer.hooks import EVALUATING, STEP
from apps.trainer.slow_hosts import Beat, SlowHosts

INPUT = "waiting for input"


def beat(i: int, step: int, phase: str = STEP, **spent: float) -> Beat:
  """Return a heartbeat; `spent` as device=, input=, saving= in seconds."""
  phases = {"device": STEP, "input": INPUT}
  return Beat(f"h{i}", 0, step, phase, {phases.get(k, k): s for k, s in spent.items()})


def run(slow: SlowHosts, seconds: range, beats) -> list[str]:
  """Return the lines of all observations, each with its time in seconds."""
  return [f"{t}: {line}" for t in seconds for line in slow.observe(t, beats(t))]


def test_stalled_process_is_reported_once_and_on_recovery():
  def beats(t: int) -> dict[int, Beat]:
    """One step per second; from 10 to 100 process 1 waits for input, and all others wait for it."""
    waited = min(max(t - 10, 0), 90)
    one = beat(
      1, t - waited, INPUT if 0 < waited < 90 else STEP, device=float(t - waited), input=waited
    )
    others = {i: beat(i, max(t - waited, min(t, 12)), device=float(t)) for i in (0, 2)}
    return {**others, 1: one}

  lines = run(SlowHosts(60), range(0, 260, 2), beats)
  assert len(lines) == 2, lines
  # 80% of the last 60 s went into input, where the others have none.
  assert lines[0] == (
    "60: process 1 (host h1): at step 10 for 50 s, waiting for input; the others wait for it"
  )
  assert "process 1 (host h1): caught up" in lines[1]


def test_process_stuck_in_step_is_reported():
  def beats(t: int) -> dict[int, Beat]:
    return {0: beat(0, min(t, 12), device=float(t)), 1: beat(1, min(t, 10), device=float(t))}

  (line,) = run(SlowHosts(60), range(0, 120, 2), beats)
  when, message = line.split(": ", 1)
  assert 72 <= int(when) <= 74  # the other reached step 12 sixty seconds ago
  assert message.startswith("process 1 (host h1): at step 10 for 6")
  assert message.endswith("s, in a step; the others wait for it")


def test_process_with_slow_input_is_reported():
  def beats(t: int) -> dict[int, Beat]:
    slow = beat(2, t, INPUT, input=0.9 * t, device=0.1 * t)
    fast = {i: beat(i, t + 2, STEP, input=0.05 * t, device=0.95 * t) for i in (0, 1)}
    return {**fast, 2: slow}

  (line,) = run(SlowHosts(60), range(0, 200, 2), beats)
  assert line == (
    "60: process 2 (host h2): 90% of the last 60 s were spent in: waiting for input; "
    "5% on other processes; the others wait for it"
  )


def test_process_with_stalled_eval_input_is_reported():
  def beats(t: int) -> dict[int, Beat]:
    stuck = beat(1, 40, INPUT, input=float(t))
    return {0: beat(0, 40, EVALUATING, **{EVALUATING: float(t)}), 1: stuck}

  (line,) = run(SlowHosts(60), range(0, 100, 2), beats)
  assert line == (
    "60: process 1 (host h1): at step 40 for 60 s, waiting for input; the others wait for it"
  )


def test_no_report_if_all_wait():
  def beats(t: int) -> dict[int, Beat]:
    """All wait for input; beats are up to two seconds (20 steps) old; one saves for 20 s."""
    found = {i: beat(i, 10 * (t - i % 3), INPUT, input=0.9 * t, device=0.1 * t) for i in range(4)}
    pause = min(max(t - 100, 0), 20)
    found[3] = beat(
      3, 10 * t, "saving", input=0.9 * (t - pause), device=0.1 * t, saving=float(pause)
    )
    return found

  assert run(SlowHosts(60), range(0, 200, 2), beats) == []


def test_number_of_reports_is_limited():
  def beats(t: int) -> dict[int, Beat]:
    slow = {i: beat(i, 0, "compiling", compiling=float(t)) for i in range(1, 100)}
    return {0: beat(0, 2, device=float(t)), **slow}

  lines = run(SlowHosts(60), range(0, 100, 2), beats)
  assert len(lines) == 4
  assert lines[2].endswith(
    "process 3 (host h3): at step 0 for 60 s, compiling; the others wait for it"
  )
  assert lines[3] == "60: and 96 more processes"


def test_finished_process_is_not_reported():
  def beats(t: int) -> dict[int, Beat]:
    done = beat(1, 10, "evaluating", evaluating=float(t))._replace(done=True)
    return {0: beat(0, 12, device=float(t)), 1: done}

  assert run(SlowHosts(10), range(0, 60, 2), beats) == []
