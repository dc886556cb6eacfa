"""Limits and checks of requests: host, headers, size and speed of bodies, bytes in memory."""

import asyncio
from collections.abc import Callable
import dataclasses
import math
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The page loads nothing from elsewhere, runs no inline script, and cannot be embedded.
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
  "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Bytes of a refused body that are read and discarded. Closing the connection earlier would reset
# it, and a client that is still sending would not see the answer.
_DISCARDED = 256 << 20
_HEADERS = {
  "content-security-policy": _POLICY,
  "cross-origin-resource-policy": "same-origin",
  "cross-origin-opener-policy": "same-origin",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
}


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a server.

  Attributes:
    body_bytes: maximum size of the body of a request.
    pixels: maximum width x height of an image.
    body_seconds: maximum time to receive a body.
    header_seconds: maximum time to receive the headers of a request.
    response_seconds: maximum time that a client may leave responses unread.
    buffered_bytes: maximum size of all bodies in memory.
    connections: maximum number of connections.
    waiting: maximum number of items that wait for the model.
    texts: maximum number of texts or labels of a request.
    characters: maximum length of a text.
    results: maximum number of results of a search.
  """

  body_bytes: int = 16 << 20
  pixels: int = 32_000_000
  body_seconds: float = 30.0
  header_seconds: float = 15.0
  response_seconds: float = 60.0
  buffered_bytes: int = 128 << 20
  connections: int = 256
  waiting: int = 512
  texts: int = 256
  characters: int = 8192
  results: int = 200

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{field.name}={value}: expected a number above 0")
    if self.waiting < self.texts:  # a request of that many texts would never be accepted
      raise ValueError(f"waiting={self.waiting}: expected at least texts={self.texts}")


class Refused(Exception):
  """A request that is answered with an error.

  Attributes:
    status: HTTP status code.
    param: field of the request that is wrong, or None.
  """

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status = status
    self.param = param


class Bodies:
  """Reads bodies within the limits and counts the bytes of all of them."""

  def __init__(self, limits: Limits):
    self._limits = limits
    self.buffered = 0  # bytes of all bodies in memory

  async def read(self, request: Request) -> bytes:
    """Return the body of a request. `release` must be called with its size afterwards.

    Raises:
      Refused: if the body is too large or too slow, its client left, or the memory is used up.
    """
    most, length = self._limits.body_bytes, request.headers.get("content-length")
    refused = None
    if length is not None and not _is_at_most(length, most):
      refused = Refused(
        413, f"the body has {length[:20]} bytes; at most {most} are accepted; send a smaller image"
      )
      if "100-continue" in request.headers.get("expect", "").lower():
        raise refused  # the client waits for the answer before it sends the body
    parts: list[bytes] = []
    size = discarded = 0
    try:
      async with asyncio.timeout(self._limits.body_seconds):
        async for part in request.stream():
          if refused is not None:
            discarded += len(part)
            if discarded > _DISCARDED:
              raise refused
            continue
          parts.append(part)
          size += len(part)
          self.buffered += len(part)
          if size > most:
            refused = Refused(413, f"the body has more than {most} bytes; send a smaller image")
          elif self.buffered > self._limits.buffered_bytes:
            refused = Refused(
              503,
              f"all bodies together have more than {self._limits.buffered_bytes} bytes; "
              "try again later",
            )
          if refused is not None:
            self.release(size)
            size = 0
            parts.clear()
      if refused is not None:
        raise refused
      return b"".join(parts)
    except BaseException as error:
      self.release(size)
      if isinstance(error, TimeoutError):
        seconds = self._limits.body_seconds
        raise refused or Refused(
          408, f"the body was not complete after {seconds:g} s; send a smaller image"
        ) from None
      if isinstance(error, ClientDisconnect):
        raise Refused(400, "the client closed the connection") from None
      raise

  def release(self, size: int) -> None:
    """Count a body as released."""
    self.buffered -= size


class Guard:
  """ASGI middleware that checks the Host header and adds security headers to every response.

  Without the check of the host, a page of another site could read this server through a name that
  it resolves to the loopback address (DNS rebinding).

  Args:
    app: application.
    hosts: accepted names, without port; "*" accepts every name.
    refuse: function that answers with a `Refused`.
  """

  def __init__(
    self, app: ASGIApp, hosts: tuple[str, ...], refuse: Callable[[Refused], ASGIApp]
  ) -> None:
    self._app, self._refuse = app, refuse
    self._hosts = {host.lower() for host in hosts}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
          headers.setdefault(name, value)
      await send(message)

    given = Headers(scope=scope).get("host", "")
    host = _name(given)
    app = self._app
    if "*" not in self._hosts and host not in self._hosts:
      app = self._refuse(
        Refused(
          421,
          f"the Host header is {given[:80]!r}; expected one of {', '.join(sorted(self._hosts))}; "
          "start the server with --allow_host=NAME to add a name",
        )
      )
    await app(scope, receive, with_headers)


def _is_at_most(length: str, most: int) -> bool:
  """Return whether a Content-Length is a number of at most `most`."""
  return length.isdecimal() and len(length) <= 20 and int(length) <= most


def _name(host: str) -> str:
  """Return the name of a Host header, without port and brackets."""
  host = host.strip().lower()
  if host.startswith("["):
    return host[1:].partition("]")[0]
  return host.partition(":")[0]


def protocol(limits: Limits) -> type[H11Protocol]:
  """Return uvicorn's protocol with limits on the time to send headers and to read responses.

  uvicorn limits only the idle time between requests. A client could keep a connection for ever by
  sending one byte of a header from time to time, or by not reading the responses.
  """

  class TimedProtocol(H11Protocol):
    _headers_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _unread_since: float | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._watch_headers()
      self._watch_unread()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
      super().connection_lost(exc)
      self._stop_headers()
      if self._unread_timer is not None:
        self._unread_timer.cancel()

    def _watch_headers(self) -> None:
      """Start the timer of the headers unless a request is being answered."""
      if self.cycle is not None and not self.cycle.response_complete:
        self._stop_headers()
      elif self._headers_timer is None:
        self._headers_timer = self.loop.call_later(limits.header_seconds, self._close)

    def _stop_headers(self) -> None:
      if self._headers_timer is not None:
        self._headers_timer.cancel()
        self._headers_timer = None

    def _close(self) -> None:
      self._headers_timer = None
      if self.cycle is None or self.cycle.response_complete:
        self.transport.close()

    def _watch_unread(self) -> None:
      """Abort the connection if bytes have waited for the client for too long.

      A closed connection also ends only when all bytes are sent, so this continues until then.
      """
      now = self.loop.time()
      if not self.transport.get_write_buffer_size():
        self._unread_since = None
      elif self._unread_since is None:
        self._unread_since = now
      elif now - self._unread_since > limits.response_seconds:
        self.transport.abort()
        return
      self._unread_timer = self.loop.call_later(limits.response_seconds / 4, self._watch_unread)

  return TimedProtocol
