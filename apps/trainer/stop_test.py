"""Requests to stop, and the notices of a server that stands for Google's."""

from collections.abc import Iterator
import http.server
import os
import signal
import threading
import time

import pytest

from apps.trainer import stop
from apps.trainer.stop import StopRequest

QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
  """What the stand-in answers, by name; it refuses who does not send Google's header."""
  values = dict(QUIET)

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      name = self.path.removeprefix("/computeMetadata/v1/instance/")
      known = name in values and self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if known else 403)
      self.end_headers()
      if known:
        self.wfile.write(f"{values[name]}\n".encode())

    def log_message(self, *_: object) -> None:
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # notices do not go through proxies
  monkeypatch.setattr(stop, "_POLL", 0.01)
  yield values
  server.shutdown()
  server.server_close()


def wait_for_request(request: StopRequest) -> str | None:
  deadline = time.monotonic() + 10
  while not request.requested(0) and time.monotonic() < deadline:
    time.sleep(0.01)
  return request.requested(0)


@pytest.mark.parametrize(
  "number, said, code", [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_a_signal_is_a_question_and_an_exit_code(number: int, said: str, code: int):
  with StopRequest() as request:
    assert request.requested(0) is None and request.exit_code == 0
    os.kill(os.getpid(), number)
    assert request.requested(1) == said and request.exit_code == code
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_acts_at_once():
  with StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
  "name, value",
  [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_stops_and_is_named(metadata: dict[str, str], name: str, value: str):
  with StopRequest() as request:
    time.sleep(0.2)
    assert request.requested(0) is None
    metadata[name] = value
    assert wait_for_request(request) == f"{name} {value}"
    assert request.exit_code == 143


def test_a_notice_that_is_there_at_the_start_was_heeded_before(metadata: dict[str, str]):
  metadata["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
  with StopRequest() as request:
    time.sleep(0.5)
    assert request.requested(0) is None
    metadata["preempted"] = "TRUE"
    metadata["maintenance-event"] = "NONE"
    assert wait_for_request(request) == "preempted TRUE"


def test_a_migration_is_no_reason_to_stop(metadata: dict[str, str]):
  metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
  assert stop.read_notices(os.environ["GCE_METADATA_HOST"]) == set()


def test_a_server_that_answers_late_is_asked_again(metadata: dict[str, str]):
  metadata.clear()  # every request is refused
  with StopRequest() as request:
    time.sleep(0.2)
    assert request.requested(0) is None
    metadata.update(QUIET, preempted="TRUE")
    assert wait_for_request(request) == "preempted TRUE"


def test_nobody_is_asked_elsewhere(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  monkeypatch.setattr(stop.ov_sharding, "is_google_host", lambda: False)
  assert stop.metadata_server() is None
  monkeypatch.setattr(stop.ov_sharding, "is_google_host", lambda: True)
  assert stop.metadata_server() == "metadata.google.internal"
