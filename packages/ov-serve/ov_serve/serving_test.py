"""The server on a real socket: slow clients, large bodies, bombs, termination."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import ov_serve
from ov_serve import serving
from ov_serve.testing.models import encoded, jpeg, png, write_images, write_model

_SERVE = """
import logging, sys
import ov_serve
from ov_serve import guard, serving
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
limits = guard.Limits(
  body_bytes=2**20, pixels=10**6, body_seconds=2.0, header_seconds=1.0, response_seconds=2.0
)
index = ov_serve.Index.open(sys.argv[1])
serving.serve(ov_serve.Model.of_index(index), index, port=0, limits=limits)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return the folder of an exported model."""
  return write_model(tmp_path_factory.mktemp("exported") / "model", caption=False)


@pytest.fixture(scope="module")
def model(folder):
  return ov_serve.Model.load(folder)


@pytest.fixture(scope="module")
def server(folder, model, tmp_path_factory):
  """Yield the process and its port."""
  place = tmp_path_factory.mktemp("served")
  dataset = ov_serve.open_images(str(write_images(place / "photos", range(8))))
  ov_serve.embed(model, dataset, place / "index", model_folder=folder)
  process = subprocess.Popen(
    [sys.executable, "-c", _SERVE, str(place / "index")],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr is not None
  lines = iter(process.stderr.readline, "")
  port = next(int(line.rpartition(":")[2]) for line in lines if "listening on" in line)
  for _ in range(600):  # programs are compiled before the first request
    try:
      assert ask(port, "GET", "/health")[0] == 200
      break
    except OSError:
      time.sleep(0.1)
  yield process, port
  process.kill()
  process.communicate()


def ask(port: int, method: str, path: str, body: bytes = b"", kind: str = "application/json"):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  try:
    connection.request(method, path, body, {"content-type": kind})
    answer = connection.getresponse()
    return answer.status, answer.read()
  finally:
    connection.close()


def resident(process: subprocess.Popen[str]) -> int:
  """Return the resident memory of a process in bytes."""
  with open(f"/proc/{process.pid}/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def exchange(port: int, *parts: bytes, pause: float = 0.0) -> tuple[bytes, float]:
  """Send bytes and return the answer until the connection closes, and the time that took."""
  start = time.monotonic()
  with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
    answer = b""
    try:
      for part in parts:
        connection.sendall(part)
        time.sleep(pause)
      while data := connection.recv(65536):
        answer += data
    except ConnectionError:
      pass  # closed by the server while this client was still sending
  return answer, time.monotonic() - start


def test_requests_of_many_clients(server):
  body = json.dumps({"text": "a red square"}).encode()
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    answers = [*pool.map(lambda _: ask(server[1], "POST", "/api/search", body), range(64))]
  assert {status for status, _ in answers} == {200}
  assert len({json.dumps(json.loads(text)["results"]) for _, text in answers}) == 1


def test_slow_headers_are_cut(server):
  slow = [b"GET /health HTTP/1.1\r\n", *[b"x"] * 8]
  answer, seconds = exchange(server[1], *slow, pause=0.5)
  assert answer == b"" and 0.9 < seconds < 30
  silent, seconds = exchange(server[1])
  assert silent == b"" and 0.9 < seconds < 30


def test_slow_bodies_are_cut(server):
  head = (
    b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: 100\r\n\r\n"
  )
  answer, seconds = exchange(server[1], head, b"{")
  assert answer.startswith(b"HTTP/1.1 408") and 1.9 < seconds < 30


def test_clients_that_do_not_read_are_cut(server):
  # More responses than the buffers of both sockets hold: 10 MB and more.
  size = len(ask(server[1], "GET", "/static/app.js")[1])
  count = 1 + (10 << 20) // size
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server[1]))
    connection.sendall(b"GET /static/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * count)
    time.sleep(6)  # the limit is 2 s
    received = 0
    with contextlib.suppress(ConnectionError):
      while data := connection.recv(1 << 20):
        received += len(data)
  assert received < count * size


_IMAGE = b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/jpeg\r\n"


def test_large_bodies_are_read_and_discarded(server):
  before = resident(server[0])
  head = _IMAGE + b"content-length: 104857600\r\n\r\n"
  answer, _ = exchange(server[1], head, *[bytes(1 << 20)] * 100)
  assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer
  # The limit of this server is 1 MiB; the rest is the memory of buffers and the allocator.
  assert resident(server[0]) - before < 40 << 20


def test_large_bodies_are_refused_before_they_are_sent_if_the_client_waits(server):
  head = _IMAGE + b"content-length: 104857600\r\nexpect: 100-continue\r\n\r\n"
  answer, _ = exchange(server[1], head)
  assert answer.startswith(b"HTTP/1.1 413")


def test_large_bodies_of_unknown_length_are_discarded(server):
  piece = b"10000\r\n" + bytes(65536) + b"\r\n"
  answer, _ = exchange(
    server[1], _IMAGE + b"transfer-encoding: chunked\r\n\r\n", *[piece] * 40, b"0\r\n\r\n"
  )
  assert answer.startswith(b"HTTP/1.1 413")
  assert b"ov_buffered_bytes 0.0" in ask(server[1], "GET", "/metrics")[1]


def test_bombs_are_refused(server):
  bomb = png(30_000, 30_000)
  assert len(bomb) < 200_000  # 900 million pixels
  status, text = ask(server[1], "POST", "/api/embed", bomb, "image/png")
  assert (status, b"too many pixels" in text) == (413, True)
  value = json.dumps({"image": encoded(bomb)}).encode()
  assert ask(server[1], "POST", "/api/embed", value)[0] == 413


@pytest.mark.parametrize(
  "request_bytes",
  [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: " + b"b" * 1_000_000 + b"\r\n\r\n",
    b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
    b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
    b"transfer-encoding: chunked\r\n\r\nzz\r\n",
  ],
  ids=["TLS", "version", "long header", "negative length", "bad chunk"],
)
def test_malformed_http_is_refused(server, request_bytes):
  answer, _ = exchange(server[1], request_bytes)
  assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
  assert ask(server[1], "GET", "/health")[0] == 200


def test_clients_that_leave_early_change_nothing(server):
  body = json.dumps({"image": encoded(jpeg(1, (900, 900)))}).encode()
  head = (
    "POST /api/embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    f"content-length: {len(body)}\r\n\r\n"
  )
  for sent in (10, len(body) // 2, len(body)):
    with socket.create_connection(("127.0.0.1", server[1])) as connection:
      connection.sendall(head.encode() + body[:sent])
  deadline = time.monotonic() + 20
  while b"ov_buffered_bytes 0.0" not in ask(server[1], "GET", "/metrics")[1]:
    assert time.monotonic() < deadline
    time.sleep(0.1)


def test_termination_ends_the_process(server):
  process, port = server
  process.send_signal(signal.SIGTERM)
  process.wait(30)
  with pytest.raises(OSError):
    ask(port, "GET", "/health")


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"host": "0.0.0.0"}, ValueError, "name this server with allow_host"),
    ({"port": 65_536}, ValueError, "port=65536: expected 0 to 65535"),
    ({"port": -1}, ValueError, "port=-1: expected 0 to 65535"),
    ({"host": "192.0.2.1", "allow_hosts": ("a",)}, ValueError, "an address of this machine"),
  ],
)
def test_wrong_addresses_are_reported(model, options, error, message):
  with pytest.raises(error, match=message):
    serving.serve(model, **options)


def test_a_used_port_is_reported(model):
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(OSError, match="choose another port"):
      serving.serve(model, port=port)


def test_the_module_runs_a_server_and_reports_mistakes_in_one_line(folder, tmp_path):
  def run(*arguments):
    command = [sys.executable, "-m", "ov_serve", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)

  done = run(f"--index={tmp_path}")
  assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
  assert "holds no index" in done.stderr
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen()
    port = other.getsockname()[1]
    done = run(f"--model={folder}", f"--port={port}")
  expected = f"127.0.0.1:{port}: Address already in use; choose another port"
  assert (done.returncode, done.stderr) == (2, f"ov_serve: error: {expected}\n")
  for arguments, message in (
    ((), "give --index=FOLDER"),
    (("--port=x",), "invalid int value: 'x'"),
  ):
    done = run(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
