"""Detection of the process that delays the others, from their heartbeats."""

from collections import deque
import statistics
from typing import NamedTuple

from apps.trainer.hooks import EVALUATING, STEP

# In these phases a process waits for the devices, and therefore for the other processes.
_ON_DEVICES = (STEP, EVALUATING)
_DELAY_FRACTION = 0.5  # fraction of the time on the host, in excess of the other processes


class Beat(NamedTuple):
  """Heartbeat of a process, sent every few seconds as a JSON list.

  Attributes:
    host: host name.
    number: number of the heartbeat.
    step: number of steps dispatched to the devices.
    phase: current phase.
    spent: seconds spent in each phase since the start.
    failed: one-line error, if the process has failed.
    code: exit code of the failure.
    done: whether the process has finished successfully.
  """

  host: str
  number: int
  step: int
  phase: str
  spent: dict[str, float]
  failed: str | None = None
  code: int = 0
  done: bool = False


class SlowHosts:
  """Reports, once per spell, a process that
  - has not reached the step that another reached `after` seconds ago, or
  - spent at least half of the last `after` seconds on the host (mostly input) while the others
    waited in a step or an evaluation.

  In a step all processes wait for the slowest one, so step times are not informative, but the time
  outside of steps is. Clocks of hosts are not compared: heartbeats contain durations, and the
  receiver records their arrival. A slow chip or link is not detected, because then all processes
  wait in the step.
  """

  def __init__(self, after: float):
    self._after = after
    self._reached: deque[tuple[float, int]] = deque()  # time of receipt, maximum step
    self._beats: dict[int, deque[tuple[float, Beat]]] = {}
    self._moved: dict[int, tuple[int, float]] = {}  # step, time of its first receipt
    self._spells: dict[int, float] = {}  # start time of each spell

  def observe(self, now: float, beats: dict[int, Beat]) -> list[str]:
    """Return lines to print; `now` is in seconds of any monotonic clock.

    A process is reported only after it has been observed for `after` seconds.
    """
    if len(beats) < 2:
      return []  # the other processes have not started yet
    for i, beat in beats.items():
      if i not in self._moved or self._moved[i][0] != beat.step:
        self._moved[i] = beat.step, now
      kept = self._beats.setdefault(i, deque())
      kept.append((now, beat))
      while len(kept) > 1 and kept[1][0] <= now - self._after:
        kept.popleft()
    self._reached.append((now, max(beat.step for beat in beats.values())))
    while len(self._reached) > 1 and self._reached[1][0] <= now - self._after:
      self._reached.popleft()

    begun, over = [], []
    for i, beat in sorted(beats.items()):
      problem = self._problem(i, now, beat)
      name = f"process {i} (host {beat.host})"
      if problem and i not in self._spells:
        self._spells[i] = now
        begun.append(f"{name}: {problem}")
      elif not problem and i in self._spells:
        over.append(f"{name}: caught up after {now - self._spells.pop(i):.0f} s")
    return _some(begun) + _some(over)

  def _problem(self, i: int, now: float, beat: Beat) -> str | None:
    """Return what is wrong with a process, if anything."""
    kept = self._beats[i]
    if beat.done or kept[0][0] > now - self._after:
      return None
    held = self._delays_others(i)
    unmoved = now - self._moved[i][1]
    if beat.step < self._reached[0][1] or (held and unmoved >= self._after / 2):
      return f"at step {beat.step:,} for {unmoved:.0f} s, {beat.phase}; the others wait for it"
    return held

  def _delays_others(self, i: int) -> str | None:
    fractions = {j: _phase_fractions(kept) for j, kept in self._beats.items()}
    others = [s for j, s in fractions.items() if j != i]
    usual = statistics.median(_on_host(s) for s in others)
    if _on_host(fractions[i]) - usual < _DELAY_FRACTION:
      return None
    phases = {p: s for p, s in fractions[i].items() if p not in _ON_DEVICES}
    phase = max(phases, key=phases.__getitem__)
    theirs = statistics.median(s.get(phase, 0.0) for s in others)
    return (
      f"{phases[phase]:.0%} of the last {self._after:.0f} s were spent in: {phase}; "
      f"{theirs:.0%} on other processes; the others wait for it"
    )


def _on_host(fractions: dict[str, float]) -> float:
  return 1.0 - sum(fractions.get(phase, 0.0) for phase in _ON_DEVICES)


def _some(lines: list[str]) -> list[str]:
  """Return at most four lines: hundreds of processes may wait for one, or one for them."""
  if len(lines) <= 4:
    return lines
  return [*lines[:3], f"and {len(lines) - 3} more processes"]


def _phase_fractions(kept: deque[tuple[float, Beat]]) -> dict[str, float]:
  """Return the fraction of the time between first and last heartbeat spent in each phase."""
  first, last = kept[0][1].spent, kept[-1][1].spent
  whole = sum(last.values()) - sum(first.values())
  if whole <= 0:
    return {STEP: 1.0}
  return {phase: (s - first.get(phase, 0.0)) / whole for phase, s in last.items()}
