"""Tests of requests to stop, and of preemption notices from a fake metadata server."""

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
  """Yield the answers of the fake server by name; it rejects requests without Google's header."""
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
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # notices bypass proxies
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
  "number, message, code", [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_signal_requests_stop_and_sets_exit_code(number: int, message: str, code: int):
  with StopRequest() as request:
    assert request.requested(0) is None and request.exit_code == 0
    os.kill(os.getpid(), number)
    assert request.requested(1) == message and request.exit_code == code
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_ctrl_c_exits_at_once():
  with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGINT)
    assert wait_for_request(request)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(60)  # the signal can reach another thread first


@pytest.mark.parametrize(
  "name, value",
  [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_preemption_notice_requests_stop(metadata: dict[str, str], name: str, value: str):
  with StopRequest() as request:
    time.sleep(0.2)
    assert request.requested(0) is None
    metadata[name] = value
    assert wait_for_request(request) == f"{name} {value}"
    assert request.exit_code == 143


def test_existing_notice_is_ignored(metadata: dict[str, str]):
  metadata["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
  with StopRequest() as request:
    time.sleep(0.5)
    assert request.requested(0) is None
    metadata["preempted"] = "TRUE"
    metadata["maintenance-event"] = "NONE"
    assert wait_for_request(request) == "preempted TRUE"


def test_migration_does_not_stop(metadata: dict[str, str]):
  metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
  assert stop.read_notices(os.environ["GCE_METADATA_HOST"]) == set()


def test_unresponsive_server_is_polled_again(metadata: dict[str, str]):
  metadata.clear()  # every request is rejected
  with StopRequest() as request:
    time.sleep(0.2)
    assert request.requested(0) is None
    metadata.update(QUIET, preempted="TRUE")
    assert wait_for_request(request) == "preempted TRUE"


def test_no_server_outside_gce(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  monkeypatch.setattr(stop.ov_sharding, "is_google_host", lambda: False)
  assert stop.metadata_server() is None
  monkeypatch.setattr(stop.ov_sharding, "is_google_host", lambda: True)
  assert stop.metadata_server() == "metadata.google.internal"
