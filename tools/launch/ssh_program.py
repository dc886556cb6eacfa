"""Runs a process of an app on each of some hosts, by ssh; when one fails, all begin again.

Written by tools/launch, its settings are at the end. Needs ssh and Python 3.8 or later, and nothing
of the checkout. It must stay alive as long as the run: start it in tmux or as a service. SIGTERM
or Ctrl-C asks the app for a checkpoint and the end; a second one does not wait for it.

Exit code 0: the run is at its end. 2: the app refused its settings. 128 + signal: stopped. Another:
that of the host which failed last.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import threading
import time

_USER_MISTAKE = 2  # the app's exit code when starting again would not help
_NO_CONNECTION = 255  # ssh's own exit code

# Seconds.
_BEAT = 10.0  # between signs of life to a host
_SILENCE = 60  # without one, after which a host ends its process
_SETTLE = 2.0  # after a failure, in which others may say their last words
_DYING = 15.0  # until an ssh that should end is ended
_PAUSES = (2.0, 300.0)  # before a new start: the first, and the longest when they fail in a row
_LONG_RUN = 600.0  # what ran that long was no failed start

_SSH = ["ssh", "-T", "-a", "-x", "-S", "none"]
for _option in (
  "BatchMode=yes",  # never asks
  "StrictHostKeyChecking=yes",
  "ConnectTimeout=30",
  "ServerAliveInterval=10",
  "ServerAliveCountMax=3",
):
  _SSH += ["-o", _option]

# On a host; the arguments are those of `on_host`. Whatever happens to the connection, the process
# ends: standard input is held open from here, and its end or its silence kills the process group.
_ON_HOST = r"""
job=$1 checkout=$2 locks=$3 silence=$4
shift 4
cd -- "$checkout" || exit 1
alive="/tmp/openvision-$UID"
mkdir -p -m 700 -- "$alive" && [ -O "$alive" ] && exec 9>> "$alive/$job.$OV_PROCESS_ID" || {
  echo "$alive: expected a folder of this user's"
  exit 1
}
if ! flock -w "$((silence + 30))" 9; then
  echo "another start of $job is alive here: fuser -v $alive/$job.$OV_PROCESS_ID"
  exit 1
fi
exec 3<&0 < /dev/null
set -m # a job is a process group of its own
(
  set -e
  venv="$(python3 tools/python/environment.py $locks)"
  export PYTHONPATH="$PWD$(printf ':%s' "$PWD"/packages/*/)"
  exec "$venv/bin/python3" "$@"
) 3<&- &
app=$!
set +m
(
  while read -r -t "$silence" word <&3; do
    [ "$word" != stop ] || kill -TERM "$app"
  done
  kill -KILL -- "-$app"
) &
watch=$!
code=0
wait "$app" 2> /dev/null || code=$?
kill -KILL -- "-$app" 2> /dev/null # what it started
kill "$watch" 2> /dev/null
exit "$code"
"""


def on_host(
  job: str, checkout: str, locks: str, arguments: list[str], variables: dict[str, str],
  silence: int = _SILENCE,
) -> list[str]:  # fmt: skip
  """The command that runs the app where it is called, until its standard input ends.

  Args:
    job: name; a host runs each process of a job once.
    checkout: folder of the repository.
    locks: files for environment.py, in one word each.
    arguments: of Python.
    variables: of the app; OV_PROCESS_ID is among them.
    silence: seconds without a line on standard input that end it.
  """
  env = ["env", *(f"{name}={value}" for name, value in variables.items())]
  own = [job, checkout, locks, str(silence)]
  return [*env, "bash", "-c", _ON_HOST, "openvision", *own, *arguments]


class _Process:
  """The app on one host, at the other end of a connection."""

  def __init__(self, host: str, command: list[str]):
    self.host = host
    self.told_to_end = False
    # In a session of its own: Ctrl-C is for this program, which passes it on.
    self.ssh = subprocess.Popen(
      [*_SSH, "--", host, shlex.join(command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    for line in self.ssh.stdout or ():
      _say(line.decode(errors="replace").rstrip("\r\n"), self.host)

  @property
  def code(self) -> int | None:
    return self.ssh.poll()

  @property
  def failed(self) -> bool:
    """Whether it ended badly, and by itself."""
    return bool(self.code) and not self.told_to_end

  def tell(self, word: str) -> None:
    try:
      if self.ssh.stdin and not self.told_to_end:
        self.ssh.stdin.write(f"{word}\n".encode())
        self.ssh.stdin.flush()
    except OSError:
      pass  # it has ended; its code says so

  def end(self) -> None:
    """The host kills the process when its standard input ends."""
    if not self.told_to_end:
      self.told_to_end = True
      self.close()

  def close(self) -> None:
    try:
      if self.ssh.stdin:
        self.ssh.stdin.close()
    except OSError:
      pass

  def last_words(self) -> None:
    self.ssh.wait()
    self.close()
    self._reader.join(timeout=5)

  def why(self) -> str:
    code = self.code or 0
    if code == _NO_CONNECTION:
      return f"{self.host}: the connection ended, or could not be made"
    if code < 0:
      return f"{self.host}: its ssh was ended by signal {-code}"
    return f"{self.host}: ended with code {code}" + (f", signal {code - 128}" * (code > 128))


_printing = threading.Lock()


def _say(line: str, who: str = "launch") -> None:
  with _printing:
    print(f"{who}: {line}", flush=True)


def _until_all_ended(processes: list[_Process], signals: list[int], grace: float) -> None:
  """Waits; passes the first signal on, ends all after a failure, a second signal, or `grace`."""
  asked = False
  end_at = kill_at = float("inf")
  beat = time.monotonic()
  while alive := [process for process in processes if process.code is None]:
    now = time.monotonic()
    if signals and not asked:
      asked, end_at = True, min(end_at, now + grace)
      _say(f"{signal.Signals(signals[0]).name} passed on; waiting up to {grace:.0f} s")
      for process in alive:
        process.tell("stop")
    if len(signals) > 1:
      end_at = min(end_at, now)
    elif not asked and end_at > now + _SETTLE and any(process.failed for process in processes):
      end_at = now + _SETTLE
    if now >= end_at:
      kill_at = min(kill_at, now + _DYING)
      for process in alive:
        process.end()
        if now >= kill_at:
          process.ssh.kill()
    if now >= beat:
      beat = now + _BEAT
      for process in alive:
        process.tell("alive")
    time.sleep(0.05)
  for process in processes:
    process.last_words()


def _code(failed: list[_Process]) -> int:
  """The exit code that says it best: a user's mistake, else that of the first host."""
  codes = [process.code or 0 for process in failed]
  return _USER_MISTAKE if _USER_MISTAKE in codes else max(codes[0], 1)


def run(
  *, job: str, hosts: list[str], coordinator: str, checkout: str, locks: str, platforms: str,
  arguments: list[str], grace: int, restarts: int,
) -> int:  # fmt: skip
  """Runs the app to its end; returns the exit code of this program."""
  signals: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda heard, _: signals.append(heard))
  variables = {
    "OV_COORDINATOR": coordinator, "OV_NUM_PROCESSES": str(len(hosts)), "JAX_PLATFORMS": platforms
  }  # fmt: skip
  tries, in_a_row = restarts + 1, 0  # failures in a row
  while True:
    started = time.monotonic()
    processes = []
    for index, host in enumerate(hosts):
      own = {**variables, "OV_PROCESS_ID": str(index)}
      processes.append(_Process(host, on_host(job, checkout, locks, arguments, own)))
    _until_all_ended(processes, signals, grace)
    tries -= 1
    failed = [process for process in processes if process.failed]
    if not signals:
      if not failed:
        return 0
      _say("; ".join(process.why() for process in failed))
      if _code(failed) == _USER_MISTAKE or not tries:
        _say("not started again: " + ("no tries left" if not tries else "it would not help"))
        return _code(failed)
      in_a_row = 0 if time.monotonic() - started > _LONG_RUN else in_a_row + 1
      _pause(min(_PAUSES[0] * 2 ** max(in_a_row - 1, 0), _PAUSES[1]), tries, signals)
    if signals:
      _say(f"stopped by {signal.Signals(signals[0]).name}; start again to go on")
      return 128 + signals[0]


def _pause(seconds: float, tries: int, signals: list[int]) -> None:
  _say(f"all begin again in {seconds:.0f} s, from the last checkpoint; {tries} tries left")
  until = time.monotonic() + seconds
  while time.monotonic() < until and not signals:
    time.sleep(0.05)
