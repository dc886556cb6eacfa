"""A server of chat completions on the loopback interface that fails on purpose."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import hashlib
import http.server
import json
import threading
import time
from typing import Any

# Response to an image, a hash of 32 bits, and its attempt from 0: status, headers and content; None
# for the right response, or seconds to wait before it.
Fault = Callable[[int, int], "tuple[int, dict[str, str], bytes] | float | None"]


class FakeServer(http.server.ThreadingHTTPServer):
  """Records requests; captions depend only on model, prompt, image and seed.

  Args:
    fault: see `Fault`.
    supports_n: whether the server returns n captions, or always one.

  Attributes:
    bodies: bodies of all requests.
    keys: values of the header Authorization.
    times: when each request arrived.
    successes: number of right responses by image.
    most_concurrent: maximum number of requests at the same time.
  """

  daemon_threads = True

  def __init__(self, fault: Fault = lambda image, attempt: None, supports_n: bool = True):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.fault, self.supports_n = fault, supports_n
    self.lock = threading.Lock()
    self.bodies: list[dict[str, Any]] = []
    self.keys: list[str | None] = []
    self.times: list[float] = []
    self.attempts: Counter[str] = Counter()
    self.successes: Counter[str] = Counter()
    self.running = self.most_concurrent = 0

  @property
  def url(self) -> str:
    """Base URL."""
    return f"http://127.0.0.1:{self.server_address[1]}/v1"


def image_of(body: dict[str, Any]) -> bytes:
  """Return the image of a request."""
  url = body["messages"][0]["content"][1]["image_url"]["url"]
  return base64.b64decode(url.partition(",")[2])


def prompt_of(body: dict[str, Any]) -> str:
  """Return the prompt of a request."""
  return body["messages"][0]["content"][0]["text"]


@contextlib.contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[FakeServer]:
  """Run a `FakeServer` with these arguments."""
  with FakeServer(*args, **kwargs) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  server: FakeServer

  def log_message(self, *args: Any) -> None:
    """Log nothing."""

  def do_POST(self) -> None:  # noqa: N802
    """Respond to a request, as the fault of the server decides."""
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    image = hashlib.sha256(image_of(body)).hexdigest()
    with server.lock:
      server.bodies.append(body)
      server.keys.append(self.headers["Authorization"])
      server.times.append(time.monotonic())
      attempt = server.attempts[image]
      server.attempts[image] += 1
      server.running += 1
      server.most_concurrent = max(server.most_concurrent, server.running)
    try:
      self._respond(body, image, attempt)
    except OSError:  # the client has closed the connection
      self.close_connection = True
    finally:
      with server.lock:
        server.running -= 1

  def _respond(self, body: dict[str, Any], image: str, attempt: int) -> None:
    server = self.server
    fault = server.fault(int(image[:8], 16), attempt)
    if isinstance(fault, float):
      time.sleep(fault)
      fault = None
    if fault is None:
      with server.lock:
        server.successes[image] += 1
      fault = (200, {}, json.dumps(_completion(body, image, server.supports_n)).encode())
    status, headers, content = fault
    self.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)


def _completion(body: dict[str, Any], image: str, supports_n: bool) -> dict[str, Any]:
  count = body["n"] if supports_n else 1
  facts = json.dumps([body["model"], prompt_of(body), image, body["seed"]])
  digest = hashlib.sha256(facts.encode()).hexdigest()
  choices = [
    {"index": n, "message": {"role": "assistant", "content": f" caption {digest[:8]} {n}\n"}}
    for n in range(count)
  ]
  return {"choices": choices, "usage": {"prompt_tokens": 100, "completion_tokens": 7 * count}}
