"""Call an ASGI application in the same process, without a socket."""

import asyncio
import dataclasses
import json
from typing import Any
from urllib.parse import quote, urlencode


@dataclasses.dataclass(frozen=True)
class Answer:
  """Response of an application."""

  status: int
  headers: dict[str, str]
  body: bytes

  @property
  def json(self) -> Any:
    return json.loads(self.body)

  @property
  def message(self) -> str:
    return str(self.json["error"]["message"])


class Client:
  """Client of an ASGI application.

  Args:
    app: application.
    host: Host header of every request.
  """

  def __init__(self, app: Any, host: str = "localhost:8000"):
    self._app, self._host = app, host
    self._loop = asyncio.new_event_loop()

  def get(self, path: str, **query: Any) -> Answer:
    """Send a GET request."""
    return self.send("GET", path, query)

  def post(self, path: str, value: Any) -> Answer:
    """Send a JSON request."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return self.send("POST", path, {}, body, "application/json")

  def image(self, path: str, data: bytes, kind: str = "image/jpeg", **query: Any) -> Answer:
    """Send an image as body."""
    return self.send("POST", path, query, data, kind)

  def send(
    self,
    method: str,
    path: str,
    query: dict[str, Any],
    body: bytes = b"",
    kind: str = "",
    headers: dict[str, str] | None = None,
    raw: bool = False,
  ) -> Answer:
    """Send a request; `raw` leaves the path as it is."""
    return self._loop.run_until_complete(
      self._send(method, path, query, body, kind, headers or {}, raw)
    )

  def together(self, *requests: tuple[str, Any]) -> list[Answer]:
    """Send JSON requests (path, value) at the same time."""

    async def run() -> list[Answer]:
      return await asyncio.gather(
        *(
          self._send("POST", path, {}, json.dumps(value).encode(), "application/json", {}, False)
          for path, value in requests
        )
      )

    return self._loop.run_until_complete(run())

  async def _send(
    self,
    method: str,
    path: str,
    query: dict[str, Any],
    body: bytes,
    kind: str,
    headers: dict[str, str],
    raw: bool,
  ) -> Answer:
    fields = {"host": self._host, "content-length": str(len(body)), **headers}
    if kind:
      fields["content-type"] = kind
    scope = {
      "type": "http",
      "asgi": {"version": "3.0"},
      "http_version": "1.1",
      "method": method,
      "scheme": "http",
      "path": path,
      "raw_path": path.encode() if raw else quote(path).encode(),
      "query_string": urlencode(query, doseq=True).encode(),
      "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
      "client": ("127.0.0.1", 1),
      "server": ("127.0.0.1", 8000),
    }
    received = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
      return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
      sent.append(message)

    await self._app(scope, receive, send)
    return Answer(
      sent[0]["status"],
      {name.decode(): value.decode() for name, value in sent[0]["headers"]},
      b"".join(message.get("body", b"") for message in sent[1:]),
    )
