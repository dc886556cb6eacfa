"""Run an app on several hosts over ssh, one process per host, and restart all if one fails.

Written by `tpu launch --kind=ssh`; the settings are at the end. Requires ssh and Python 3.8 or
later. It must stay alive during the run, so start it in tmux or as a service. SIGTERM or Ctrl-C
requests a checkpoint and ends the run; a second signal ends it immediately.

Exit codes: 0, the run is complete; 2, the app rejected its settings; 128 + signal, stopped; other
codes are those of the host that failed last.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import threading
import time

USER_ERROR = 2  # exit code for errors that a restart does not fix
_NO_CONNECTION = 255  # exit code of ssh for connection errors

# Seconds.
_HEARTBEAT = 10.0  # between messages to a host
_SILENCE = 60  # time without a message after which a host ends its process
_SETTLE = 2.0  # time for the last output of other hosts after a failure
_DYING = 15.0  # time from closing the input of an ssh to killing it
_PAUSES = (2.0, 300.0)  # first and longest pause before a restart
_LONG_RUN = 600.0  # a failure after this time does not lengthen the pause

# BatchMode disables prompts. The other options detect a lost connection.
_SSH = shlex.split(
  "ssh -T -a -x -S none -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=30 "
  "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
)

# Program that runs on a host with the arguments of `on_host`. It ends the app with the connection:
# end of file on standard input, or a silence, kills the process group.
_ON_HOST = r"""
job=$1 checkout=$2 locks=$3 silence=$4
shift 4
cd -- "$checkout" || exit 1
alive="/tmp/openvision-$UID"
mkdir -p -m 700 -- "$alive" && [ -O "$alive" ] && exec 9>> "$alive/$job.$OV_PROCESS_ID" || {
  echo "$alive: expected a folder owned by this user"
  exit 1
}
if ! flock -w "$((silence + 30))" 9; then
  echo "an earlier process of $job is alive on this host: fuser -v $alive/$job.$OV_PROCESS_ID"
  exit 1
fi
exec 3<&0 < /dev/null
set -m # the job gets its own process group
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
kill -KILL -- "-$app" 2> /dev/null # its children
kill "$watch" 2> /dev/null
exit "$code"
"""


def on_host(
  job: str, checkout: str, locks: str, arguments: list[str], variables: dict[str, str],
  silence: int = _SILENCE,
) -> list[str]:  # fmt: skip
  """Return the command that runs the app on a host until its standard input ends.

  Args:
    job: name of the job; a host runs each process of a job at most once.
    checkout: folder of the repository.
    locks: lock files for environment.py, separated by spaces.
    arguments: arguments of Python.
    variables: environment of the app, including OV_PROCESS_ID.
    silence: seconds without a line on standard input after which the app is ended.
  """
  env = ["env", *(f"{name}={value}" for name, value in variables.items())]
  own = [job, checkout, locks, str(silence)]
  return [*env, "bash", "-c", _ON_HOST, "openvision", *own, *arguments]


class _Process:
  """The app on one host."""

  def __init__(self, host: str, command: list[str]):
    self.host = host
    self.ended = False  # signals sent by this program
    # In a separate session, because this program receives Ctrl-C and forwards it.
    self.ssh = subprocess.Popen(
      [*_SSH, "--", host, shlex.join(command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    for line in self.ssh.stdout or ():
      _log(line.decode(errors="replace").rstrip("\r\n"), self.host)

  @property
  def failed(self) -> bool:
    return bool(self.ssh.poll()) and not self.ended

  def send(self, word: str) -> None:
    with contextlib.suppress(OSError):  # the process has ended
      if self.ssh.stdin and not self.ended:
        self.ssh.stdin.write(f"{word}\n".encode())
        self.ssh.stdin.flush()

  def end(self) -> None:
    """Close the input, so that the host kills the process."""
    self.ended = True
    with contextlib.suppress(OSError):
      if self.ssh.stdin:
        self.ssh.stdin.close()

  def reason(self) -> str:
    code = self.ssh.returncode
    if code == _NO_CONNECTION:
      return f"{self.host}: the connection was lost, or could not be made"
    if code < 0:
      return f"{self.host}: its ssh was ended by signal {-code}"
    return f"{self.host}: ended with code {code}" + (f", signal {code - 128}" * (code > 128))


_printing = threading.Lock()


def _log(line: str, source: str = "launch") -> None:
  with _printing:
    print(f"{source}: {line}", flush=True)


def _wait(processes: list[_Process], signals: list[int], grace: float) -> list[_Process]:
  """Wait until all processes have ended and return the failed ones.

  The first signal is forwarded. All processes are ended after a failure, a second signal, or
  `grace` seconds.
  """
  asked = False
  end_at = kill_at = float("inf")
  heartbeat = time.monotonic()
  while alive := [process for process in processes if process.ssh.poll() is None]:
    now = time.monotonic()
    if signals and not asked:
      asked, end_at = True, min(end_at, now + grace)
      _log(f"forwarded {signal.Signals(signals[0]).name}; waiting up to {grace:.0f} s")
      for process in alive:
        process.send("stop")
    if len(signals) > 1:
      end_at = min(end_at, now)
    elif not asked and any(process.failed for process in processes):
      end_at = min(end_at, now + _SETTLE)
    if now >= end_at:
      kill_at = min(kill_at, now + _DYING)
      for process in alive:
        process.end()
        if now >= kill_at:
          process.ssh.kill()
    if now >= heartbeat:
      heartbeat = now + _HEARTBEAT
      for process in alive:
        process.send("alive")
    time.sleep(0.05)
  failed = [process for process in processes if process.failed]
  for process in processes:
    process.end()
    process._reader.join(timeout=5)
  return failed


def run(
  *, job: str, hosts: list[str], coordinator: str, checkout: str, locks: str, platforms: str,
  arguments: list[str], grace: int, restarts: int,
) -> int:  # fmt: skip
  """Run the app until it is complete and return the exit code of this program."""
  signals: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda received, _: signals.append(received))
  variables = {
    "OV_COORDINATOR": coordinator, "OV_NUM_PROCESSES": str(len(hosts)), "JAX_PLATFORMS": platforms
  }  # fmt: skip
  pause = _PAUSES[0]
  for left in range(restarts, -1, -1):
    started = time.monotonic()
    processes = []
    for index, host in enumerate(hosts):
      own = {**variables, "OV_PROCESS_ID": str(index)}
      processes.append(_Process(host, on_host(job, checkout, locks, arguments, own)))
    failed = _wait(processes, signals, grace)
    if not signals:
      if not failed:
        return 0
      _log("; ".join(process.reason() for process in failed))
      codes = [process.ssh.returncode for process in failed]
      if USER_ERROR in codes or not left:
        _log("not restarted: " + ("no restarts left" if not left else "it would fail again"))
        return USER_ERROR if USER_ERROR in codes else max(codes[0], 1)
      if time.monotonic() - started > _LONG_RUN:
        pause = _PAUSES[0]
      _log(f"all restart in {pause:.0f} s from the last checkpoint; {left} restarts left")
      until, pause = time.monotonic() + pause, min(2 * pause, _PAUSES[1])
      while time.monotonic() < until and not signals:
        time.sleep(0.05)
    if signals:
      break
  _log(f"stopped by {signal.Signals(signals[0]).name}; start again to resume")
  return 128 + signals[0]
