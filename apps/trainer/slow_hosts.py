"""Which process holds the others back, from what each says of itself."""

from collections import deque
import statistics
from typing import NamedTuple

from apps.trainer.hooks import EVALUATING, STEP

# In these phases a process waits for the devices, and so for the other processes.
_ON_DEVICES = (STEP, EVALUATING)
_HOLDS_BACK = 0.5  # of the time spent on the host, more than the others


class Beat(NamedTuple):
  """What a process says of itself every few seconds; a JSON list.

  Attributes:
    host: name of its machine.
    number: of the beat.
    step: number of steps that it gave to its devices.
    phase: what it does.
    spent: seconds it has spent in each phase since it began.
    failed: one line, if it has failed.
    code: the exit code that belongs to the failure.
    done: whether it is at its end, and well.
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
  """Names, once for each spell, a process that
  - has not reached the step that another reached `after` seconds ago, or
  - spent half of the last `after` seconds or more on the host (input, above all) while the others
    waited in a step or an evaluation.

  In a step all wait for the slowest, so that the clock of a step says nothing. What a process does
  beside it does. Clocks of hosts are not compared: a beat holds durations, and beats are timed by
  whoever reads them. A slow chip or link is not seen here: then all wait in the step.
  """

  def __init__(self, after: float):
    self._after = after
    self._reached: deque[tuple[float, int]] = deque()  # when read, largest step
    self._beats: dict[int, deque[tuple[float, Beat]]] = {}
    self._moved: dict[int, tuple[int, float]] = {}  # step, when it was first seen
    self._spells: dict[int, float] = {}  # when each began

  def observe(self, now: float, beats: dict[int, Beat]) -> list[str]:
    """Lines to print; `now` in seconds of any clock that does not go back.

    Nobody is named before it has been seen for `after` seconds.
    """
    if len(beats) < 2:
      return []  # the others have not begun yet
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
      said = self._said(i, now, beat)
      name = f"process {i} (host {beat.host})"
      if said and i not in self._spells:
        self._spells[i] = now
        begun.append(f"{name}: {said}")
      elif not said and i in self._spells:
        over.append(f"{name}: no longer behind, {now - self._spells.pop(i):.0f} s later")
    return _some(begun) + _some(over)

  def _said(self, i: int, now: float, beat: Beat) -> str | None:
    """What is wrong with a process, if anything is."""
    kept = self._beats[i]
    if beat.done or kept[0][0] > now - self._after:
      return None
    held = self._holds_back(i)
    unmoved = now - self._moved[i][1]
    if beat.step < self._reached[0][1] or (held and unmoved >= self._after / 2):
      return f"at step {beat.step:,} for {unmoved:.0f} s, {beat.phase}; the others wait for it"
    return held

  def _holds_back(self, i: int) -> str | None:
    shares = {j: _shares(kept) for j, kept in self._beats.items()}
    others = [s for j, s in shares.items() if j != i]
    usual = statistics.median(_on_host(s) for s in others)
    if _on_host(shares[i]) - usual < _HOLDS_BACK:
      return None
    phases = {p: s for p, s in shares[i].items() if p not in _ON_DEVICES}
    phase = max(phases, key=phases.__getitem__)
    theirs = statistics.median(s.get(phase, 0.0) for s in others)
    return (
      f"{phases[phase]:.0%} of the last {self._after:.0f} s went into: {phase}; "
      f"{theirs:.0%} elsewhere; the others wait for it"
    )


def _on_host(share: dict[str, float]) -> float:
  return 1.0 - sum(share.get(phase, 0.0) for phase in _ON_DEVICES)


def _some(lines: list[str]) -> list[str]:
  """At most four: hundreds of processes may wait for one to compile, or the other way round."""
  if len(lines) <= 4:
    return lines
  return [*lines[:3], f"and {len(lines) - 3} more processes"]


def _shares(kept: deque[tuple[float, Beat]]) -> dict[str, float]:
  """Share of the time between the first and the last beat that went into each phase, 0 to 1."""
  first, last = kept[0][1].spent, kept[-1][1].spent
  whole = sum(last.values()) - sum(first.values())
  if whole <= 0:
    return {STEP: 1.0}
  return {phase: (s - first.get(phase, 0.0)) / whole for phase, s in last.items()}
