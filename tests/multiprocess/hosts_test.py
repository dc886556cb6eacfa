"""Reaction of four loopback processes when one of them dies, fails, is slow or is asked to stop.

Time limits are far above the times on an idle machine, so that they also hold under load.
"""

from collections.abc import Iterator
import contextlib
import http.server
import re
import signal
import threading
import time

import pytest

from tests.multiprocess import hosts_worker
from tests.multiprocess.launcher import Group

FOREVER = 1_000_000
LIMIT = 100  # seconds; an idle machine takes ten


def start(what: str, ends: int = FOREVER, processes: int = 4, **env: str) -> Group:
  """Start the workers; `env` applies to process 2."""
  return Group(
    [hosts_worker.__file__, what, str(ends)],
    processes=processes,
    devices=1,
    per_process_env=[{} if i != 2 else env for i in range(processes)],
  )


def wait_for(group: Group, text: str, index: int = 1) -> None:
  """Wait until a process has printed `text`."""
  deadline = time.monotonic() + LIMIT
  while text not in group.printed(index):
    assert None in group.codes() and time.monotonic() < deadline, group.printed(index)
    time.sleep(0.05)


def ended(group: Group) -> tuple[list[int], list[str]]:
  """Return exit codes, and the last line and the lines other than steps of each process."""
  assert group.wait(LIMIT), f"still alive: {group.codes()}"
  results = group.results()
  texts = [re.sub(r"^step \d+\n", "", r.stderr, flags=re.MULTILINE) for r in results]
  return [r.returncode for r in results], texts


@pytest.mark.parametrize(
  ("what", "victim"),
  [
    ("nothing", 2),  # a collective fails
    ("nothing", 0),  # the coordinator dies
    ("alone", 2),  # only heartbeats are missing
  ],
)
def test_the_others_end_and_name_the_dead_process(what: str, victim: int):
  with start(what) as group:
    wait_for(group, "step 30\n")
    killed = time.monotonic()
    group.running[victim].send_signal(signal.SIGKILL)
    codes, texts = ended(group)
    print(f"{what}, process {victim} killed: all ended after {time.monotonic() - killed:.1f} s")
  assert codes == [75 if i != victim else -9 for i in range(4)], texts
  for i in range(4):
    if i != victim:
      last = texts[i].splitlines()[-1]
      assert re.fullmatch(
        rf"hosts_worker: error: process {victim} \(.+\) is gone: .*; last checkpoint: step 40; "
        r"start all processes again .*",
        last,
      ), texts[i]
  if what == "nothing" and victim == 2:
    assert not any("Check failure" in text for text in texts), "the runtime of jax was faster"


def test_a_failing_process_is_reported_and_ends_the_others():
  with start("error", processes=3) as group:
    codes, texts = ended(group)
  assert codes == [75, 75, 1], texts
  assert "Traceback" in texts[2] and "ValueError: the disk is full" in texts[2]
  for text in texts[:2]:
    assert "Traceback" not in text
    assert re.search(r"error: process 2 \(.+\) failed: the disk is full; last checkpoint", text)


@pytest.mark.parametrize("what", ["mistake", "all"])
def test_an_error_of_the_user_is_reported_by_every_process(what: str):
  with start(what, processes=3) as group:
    codes, texts = ended(group)
  assert codes == [2, 2, 2], texts
  for i, text in enumerate(texts):
    assert "Traceback" not in text and text.count("error:") == 1
    own = what == "all" or i == 2
    assert ("process 2" not in text) == own, text
    assert "config.batch_size=0 is not positive" in text


def test_a_slow_process_is_reported_and_the_run_continues():
  with start("slow", ends=150, processes=3) as group:
    codes, texts = ended(group)
  assert codes == [0, 0, 0], texts
  named, over = [line for line in texts[0].splitlines() if line.startswith("process 2 (host ")]
  # Which of the two reports comes first depends on the duration of earlier steps.
  sign = r"(at step 20 for \d+ s, waiting for input|last 4 s were spent in: waiting for input; .+)"
  assert re.search(f"{sign}; the others wait for it$", named), named
  assert "caught up" in over
  assert not any("process" in text for text in texts[1:])


@contextlib.contextmanager
def metadata_server() -> Iterator[tuple[str, dict[str, str]]]:
  """Start a fake of Google's metadata server; return its host, port and answers."""
  values = {"maintenance-event": "NONE", "preempted": "FALSE"}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      self.send_response(200)
      self.end_headers()
      self.wfile.write(values[self.path.rpartition("/")[2]].encode())

    def log_message(self, *_: object) -> None:
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", values
    server.shutdown()


def test_a_notice_on_one_host_stops_all_at_the_same_step():
  with metadata_server() as (address, values), start(
    "nothing", processes=3, GCE_METADATA_HOST=address
  ) as group:  # fmt: skip
    wait_for(group, "step 30\n")
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    codes, texts = ended(group)
  assert codes == [143, 143, 143], texts
  stops = [re.findall(r"^.*: stopped at \d+$", text, re.MULTILINE) for text in texts]
  assert stops[0] == stops[1] == stops[2] and len(stops[0]) == 1
  assert stops[0][0].startswith("maintenance-event TERMINATE_ON_HOST_MAINTENANCE on ")
