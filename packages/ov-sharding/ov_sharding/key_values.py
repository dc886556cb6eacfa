"""Short texts that the processes of a run show each other, over TCP connections to process 0.

Nobody waits for anybody, and no device takes part: this is for threads next to the work. JAX has a
key-value store of this kind, but no public name for it.
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
_LINE_BYTES = 1 << 20  # of a request; longer ones are not read
_OFFER_BYTES = 1024  # of the broadcast that tells where process 0 listens


class Server:
  """The texts, and a thread for each process that asks for them; runs in process 0.

  Requests carry a token, because everybody in the network can connect.

  Attributes:
    port: where it listens, on all interfaces.
    token: what requests must carry.
  """

  def __init__(self) -> None:
    """Start to listen."""
    self._texts: dict[str, str] = {}
    self._lock = threading.Lock()
    self.token = secrets.token_hex(16)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
    self.port = self._socket.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def answer(self, operation: str, key: str, text: str = "") -> Any:
    """Return what `Board` returns."""
    with self._lock:
      if operation == "put":
        self._texts[key] = text
        return None
      if operation == "get":
        return self._texts.get(key)
      folder = f"{key}/"
      return {k.removeprefix(folder): t for k, t in self._texts.items() if k.startswith(folder)}

  def close(self) -> None:
    """Accept nobody new."""
    self._socket.close()

  def _accept(self) -> None:
    with contextlib.suppress(OSError):  # it was closed
      while True:
        connection, _ = self._socket.accept()
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

  def _serve(self, connection: socket.socket) -> None:
    broken = contextlib.suppress(OSError, ValueError, TypeError)  # a request may be anything
    with broken, connection, connection.makefile("rwb") as stream:
      while line := stream.readline(_LINE_BYTES):
        token, *request = json.loads(line)
        if not hmac.compare_digest(token, self.token):
          return
        stream.write(json.dumps(self.answer(*request)).encode() + b"\n")
        stream.flush()


class Board:
  """The texts, as one process sees them.

  Every method raises ConnectionError if process 0 cannot be reached.

  Attributes:
    address: host and port of process 0.
  """

  def __init__(self, address: tuple[str, int], token: str, server: Server | None = None):
    """Use `board()` instead.

    Args:
      address: host and port of process 0.
      token: of its server.
      server: the server itself, in process 0.
    """
    self.address = address
    self._token, self._server = token, server
    self._lock = threading.Lock()
    self._stream: Any = None

  def put(self, key: str, text: str) -> None:
    """Show a text in place of the one that was there. Keys look like paths."""
    self._ask("put", key, text)

  def get(self, key: str) -> str | None:
    """Return the text under `key`, or None."""
    found: str | None = self._ask("get", key)
    return found

  def items(self, folder: str) -> dict[str, str]:
    """Return all texts below `folder`, by the rest of their key."""
    found: dict[str, str] = self._ask("items", folder)
    return found

  def reachable(self) -> bool:
    """Return whether process 0 still listens."""
    try:
      socket.create_connection(self.address, _CONNECT_SECONDS).close()
    except OSError:
      return False
    return True

  def _ask(self, *request: str) -> Any:
    if self._server is not None:
      return self._server.answer(*request)
    with self._lock:
      try:
        if self._stream is None:
          connection = socket.create_connection(self.address, _CONNECT_SECONDS)
          connection.settimeout(_ANSWER_SECONDS)
          self._stream = connection.makefile("rwb")
          connection.close()  # the stream keeps it open
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
  """Return the board of this run, or None in a run of one process.

  The first call is a collective: all processes make it. Where one cannot connect to process 0, all
  get None, and process 0 logs which.
  """
  if jax.process_count() == 1:
    return None
  server = Server() if jax.process_index() == 0 else None
  offer = (_hosts(), server.port, server.token) if server else None
  hosts, port, token = _broadcast(offer)
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
      "processes %s cannot connect to port %d of %s: slow and lost processes are not named",
      np.flatnonzero(~connected).tolist(),
      port,
      ", ".join(hosts),
    )
  return None


def _hosts() -> list[str]:
  """Return names of this machine that other processes may reach, the most likely first."""
  hosts = [os.environ.get("OV_COORDINATOR", "").rpartition(":")[0].strip("[]")]
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the interface
    hosts.append(probe.getsockname()[0])
  return [host for host in dict.fromkeys([*hosts, socket.gethostname(), "127.0.0.1"]) if host]


def _connect(hosts: Sequence[str], port: int, token: str) -> Board | None:
  """Return a board over the first host that answers; None if none does."""
  for host in hosts:
    found = Board((host, port), token)
    with contextlib.suppress(ConnectionError, ValueError):
      found.get("")
      return found
  return None


def _broadcast(value: Any) -> Any:
  """Return the JSON value of process 0 in every process."""
  data = np.zeros(_OFFER_BYTES, np.uint8)
  if value is not None:
    text = json.dumps(value).encode()
    data[: len(text)] = np.frombuffer(text, np.uint8)
  data = np.asarray(multihost_utils.broadcast_one_to_all(data))
  return json.loads(data.tobytes().rstrip(b"\0"))
