"""Tests of the exit decision of process 0; //tests/multiprocess kills real processes."""

import json

import pytest

from apps.trainer import hosts
from apps.trainer.errors import UserError
from apps.trainer.hooks import EVALUATING, Hooks
from apps.trainer.hosts import GONE, ExitReason, Hosts, decide_exit
from apps.trainer.slow_hosts import Beat

GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.1]:1"
NOBODY = dict.fromkeys(range(3), 1.0)


def beats(**changes: dict) -> dict[int, Beat]:
  """Return heartbeats of three processes; changes as _1={"failed": ...}."""
  plain = {i: Beat(f"h{i}", 7, 40, "in a step", {}) for i in range(3)}
  return {i: b._replace(**changes.get(f"_{i}", {})) for i, b in plain.items()}


def test_healthy_run_ends_when_all_are_done():
  done = {"done": True}
  assert decide_exit(beats(), NOBODY, 3, None) is None
  assert decide_exit(beats(_0=done, _1=done), NOBODY, 3, None) is None
  assert decide_exit(beats(_0=done, _1=done, _2=done), NOBODY, 3, None) == ExitReason(
    "done", 0, "", 0
  )


def test_missing_heartbeat_alone_is_left_to_jax():
  assert decide_exit(beats(), {0: 0.0, 1: 1.0, 2: 25.0}, 3, None) is None


def test_silent_process_is_dead_after_collective_error():
  failed = {"failed": GLOO, "code": 1}
  two = beats(_0=failed, _1=failed)
  assert decide_exit(two, {0: 0.0, 1: 1.0, 2: 4.0}, 3, 1.0) is None
  assert decide_exit(two, {0: 0.0, 1: 1.0, 2: 6.0}, 3, 3.0) == ExitReason(
    "gone", 2, "no heartbeat for 6 s", GONE
  )


@pytest.mark.parametrize("since", [0.0, 20.0])
def test_own_error_is_the_cause(since: float):
  every = beats(
    _0={"failed": GLOO, "code": 1}, _1={"failed": "no space", "code": 1}, _2={"failed": GLOO}
  )
  assert decide_exit(every, NOBODY, 3, since) == ExitReason("failed", 1, "no space", GONE)


def test_decision_waits_for_silent_processes():
  one = beats(_1={"failed": "no space", "code": 1})
  assert decide_exit(one, NOBODY, 3, 2.0) is None
  assert decide_exit(one, NOBODY, 3, 9.0) == ExitReason("failed", 1, "no space", GONE)


@pytest.mark.parametrize(("code", "expected"), [(1, GONE), (2, 2), (130, 130), (143, 143)])
def test_user_errors_and_signals_keep_exit_code(code: int, expected: int):
  end = decide_exit(beats(_2={"failed": "text", "code": code}), NOBODY, 3, 9.0)
  assert end == ExitReason("failed", 2, "text", expected)


def test_first_process_is_reported_if_all_lost_connection():
  failed = {"failed": GLOO, "code": 1}
  end = decide_exit(beats(_0=failed, _1=failed, _2=failed), NOBODY, 3, 0.0)
  assert end == ExitReason("failed", 0, GLOO, GONE)


def test_heartbeat_json_round_trip():
  beat = Beat("h", 1, 2, "saving", {"saving": 1.5}, "no space", 1, False)
  assert Beat(*json.loads(json.dumps(beat))) == beat


def test_single_process_is_not_watched(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(hosts.threading, "Thread", None)  # none is started
  with Hosts(print) as watched:
    watched.at(3, "saving")
  with (
    pytest.raises(UserError, match="as it was"),
    Hosts(print) as watched,
    watched.report_errors(),
  ):
    raise UserError("as it was")


def test_phases_are_timed(monkeypatch: pytest.MonkeyPatch):
  clock = iter([0.0, 1.0, 3.0, 7.0, 15.0])
  monkeypatch.setattr(hosts.time, "monotonic", lambda: next(clock))
  with Hosts(print) as watched:
    hooks = Hooks([watched])
    hooks.on_phase("main", 3, EVALUATING)
    with hooks.waiting_for_input():
      pass
    beat = watched._beat(0)
  assert (beat.step, beat.phase) == (3, EVALUATING)
  assert beat.spent == {"starting": 1.0, EVALUATING: 2.0 + 8.0, "waiting for input": 4.0}


def test_unresponsive_checkpoint_directory():
  def refuse() -> int:
    raise OSError("no network")

  assert hosts._within(5.0, lambda: 40) == 40
  assert hosts._within(5.0, refuse) is None
  assert hosts._within(0.05, lambda: hosts.time.sleep(1.0)) is None
