"""Key-value store for short texts, shared by all processes over TCP connections to process 0.

Calls involve no collective and no device, so background threads can use them. JAX has such a
key-value store, but no public API for it.
"""

from collections.abc import Sequence
import contextlib
import functools
import hmac
import json
import logging
import os
import secrets
import socket
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

logger = logging.getLogger(__name__)

_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 10.0
_RETRY_SECONDS = 1.0  # after a connection that could not be accepted
_LINE_BYTES = 1 << 20  # limit for one request
_ADDRESS_BYTES = 1024  # size of the broadcast with the address and token of process 0


class Server:
  """TCP server of the key-value store, with one thread per client; runs in process 0.

  Requests must carry a token, because any host in the network can connect.

  Attributes:
    port: TCP port, open on all interfaces.
    token: secret that authenticates requests.
  """

  def __init__(self) -> None:
    """Start the server."""
    self._texts: dict[str, str] = {}
    self._lock = threading.Lock()
    self._closed = threading.Event()
    self.token = secrets.token_hex(16)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
    self.port = self._socket.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def answer(self, operation: str, key: str, text: str = "") -> Any:
    """Run one `Board` operation and return its result."""
    with self._lock:
      if operation == "put":
        self._texts[key] = text
        return None
      if operation == "get":
        return self._texts.get(key)
      folder = f"{key}/"
      return {k.removeprefix(folder): t for k, t in self._texts.items() if k.startswith(folder)}

  def close(self) -> None:
    """Stop accepting connections."""
    self._closed.set()
    with contextlib.suppress(OSError):  # macOS: not connected
      self._socket.shutdown(socket.SHUT_RDWR)  # Linux: close() does not wake accept()
    self._socket.close()

  def _accept(self) -> None:
    while not self._closed.is_set():
      try:
        connection, _ = self._socket.accept()
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
      except (OSError, RuntimeError) as error:  # RuntimeError: no new thread can start
        if not self._closed.is_set():
          logger.warning(
            "cannot accept a connection on port %d: %s; retrying in %g s",
            self.port,
            error,
            _RETRY_SECONDS,
          )
          self._closed.wait(_RETRY_SECONDS)

  def _serve(self, connection: socket.socket) -> None:
    broken = contextlib.suppress(OSError, ValueError, TypeError)  # malformed requests
    with broken, connection, connection.makefile("rwb") as stream:
      while line := stream.readline(_LINE_BYTES):
        token, *request = json.loads(line)
        if not hmac.compare_digest(token, self.token):
          return
        stream.write(json.dumps(self.answer(*request)).encode() + b"\n")
        stream.flush()


class Board:
  """Client of the key-value store.

  `put`, `get` and `items` raise ConnectionError if process 0 cannot be reached.

  Attributes:
    address: host and port of process 0.
  """

  def __init__(self, address: tuple[str, int], token: str, server: Server | None = None):
    """Create a client. Call `board()` instead.

    Args:
      address: host and port of process 0.
      token: token of the server.
      server: the server, in process 0 only, which then needs no connection.
    """
    self.address = address
    self._token, self._server = token, server
    self._lock = threading.Lock()
    self._stream: Any = None

  def put(self, key: str, text: str) -> None:
    """Set the text under `key`, such as "hosts/3"."""
    self._request("put", key, text)

  def get(self, key: str) -> str | None:
    """Return the text under `key`, or None."""
    found: str | None = self._request("get", key)
    return found

  def items(self, folder: str) -> dict[str, str]:
    """Return all texts with keys below `folder`, keyed by the rest of the key."""
    found: dict[str, str] = self._request("items", folder)
    return found

  def reachable(self) -> bool:
    """Return whether process 0 accepts connections."""
    try:
      socket.create_connection(self.address, _CONNECT_SECONDS).close()
    except OSError:
      return False
    return True

  def _request(self, *request: str) -> Any:
    if self._server is not None:
      return self._server.answer(*request)
    with self._lock:
      try:
        if self._stream is None:
          connection = socket.create_connection(self.address, _CONNECT_SECONDS)
          connection.settimeout(_ANSWER_SECONDS)
          self._stream = connection.makefile("rwb")
          connection.close()  # the stream keeps the socket open
        self._stream.write(json.dumps([self._token, *request]).encode() + b"\n")
        self._stream.flush()
        line = self._stream.readline()
        if not line:
          raise ConnectionResetError("the connection was closed")
        return json.loads(line)
      except OSError as error:
        with contextlib.suppress(OSError):
          if self._stream is not None:
            self._stream.close()
        self._stream = None
        raise ConnectionError(f"process 0 does not answer: {error}") from error


@functools.cache
def board() -> Board | None:
  """Return the key-value store of this run, or None if there is only one process.

  The first call is a collective, so all processes must make it. If a process cannot connect to
  process 0, all processes get None, and process 0 logs a warning.
  """
  if jax.process_count() == 1:
    return None
  server = Server() if jax.process_index() == 0 else None
  address = (_hosts(), server.port, server.token) if server else None
  hosts, port, token = _broadcast(address)
  if server is not None:
    found: Board | None = Board(("127.0.0.1", port), token, server)
  else:
    found = _connect(hosts, port, token)
  connected = multihost_utils.process_allgather(np.asarray(found is not None)).reshape(-1)
  if connected.all():
    return found
  if server is not None:
    server.close()
    logger.warning(
      "processes %s cannot connect to port %d of %s: slow and lost processes will not be reported",
      np.flatnonzero(~connected).tolist(),
      port,
      ", ".join(hosts),
    )
  return None


def _hosts() -> list[str]:
  """Return host names and addresses of this machine to try, the most likely first."""
  hosts = [os.environ.get("OV_COORDINATOR", "").rpartition(":")[0].strip("[]")]
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("192.0.2.1", 9))  # selects the outgoing interface; sends nothing
    hosts.append(probe.getsockname()[0])
  return [host for host in dict.fromkeys([*hosts, socket.gethostname(), "127.0.0.1"]) if host]


def _connect(hosts: Sequence[str], port: int, token: str) -> Board | None:
  """Return a client of the first reachable host, or None."""
  for host in hosts:
    found = Board((host, port), token)
    with contextlib.suppress(ConnectionError, ValueError):
      found.get("")
      return found
  return None


def _broadcast(value: Any) -> Any:
  """Return the JSON value of process 0 on every process."""
  data = np.zeros(_ADDRESS_BYTES, np.uint8)
  if value is not None:
    text = json.dumps(value).encode()
    data[: len(text)] = np.frombuffer(text, np.uint8)
  data = np.asarray(multihost_utils.broadcast_one_to_all(data))
  return json.loads(data.tobytes().rstrip(b"\0"))
