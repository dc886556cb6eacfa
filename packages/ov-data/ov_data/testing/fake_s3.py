"""Fake S3 server on the loopback, which counts requests and bytes.

with FakeS3() as store:
  store.objects["bucket/a.tar"] = data
  os.environ.update(store.environment())
  ov_data.Source("s3://bucket/a.tar")
  store.requests, store.bytes_sent
"""

from collections import Counter
from http import server
import threading
from typing import Any, Self
from urllib import parse
from xml.sax import saxutils

_PAGE = 1000  # names per response, as in the real service


class FakeS3:
  """Objects in memory; a context manager.

  Attributes:
    objects: "bucket/name" -> content.
    requests: number of requests by kind: "GET", "HEAD", "LIST", "PUT".
    ranges: number of bytes of each GET of an object.
    read_only: whether to refuse writing.
  """

  def __init__(self) -> None:
    self.objects: dict[str, bytes] = {}
    self.requests: Counter[str] = Counter()
    self.ranges: list[int] = []
    self.read_only = False
    self.parts: dict[str, dict[int, bytes]] = {}
    self.lock = threading.Lock()

  def environment(self) -> dict[str, str]:
    """Return environment variables that direct a program to this server."""
    return {
      "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
      "AWS_ACCESS_KEY_ID": "test",
      "AWS_SECRET_ACCESS_KEY": "test",
      "AWS_EC2_METADATA_DISABLED": "true",
    }

  def reset(self) -> None:
    """Reset the counters."""
    self.requests.clear()
    self.ranges.clear()

  def __enter__(self) -> Self:
    self._server = _Server(("127.0.0.1", 0), _Handler)
    self._server.store = self
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._server.shutdown()
    self._server.server_close()


class _Server(server.ThreadingHTTPServer):
  store: FakeS3


class _Handler(server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: _Server

  def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (as in http.server)
    """Log nothing."""

  def do_HEAD(self) -> None:
    self._object(is_head=True)

  def do_GET(self) -> None:
    name, query = self._target()
    if "list-type" in query or "/" not in name:
      self._list(name, query)
    else:
      self._object(is_head=False)

  def do_PUT(self) -> None:
    name, query = self._target()
    data = self._body()
    store = self.server.store
    if store.read_only:
      self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
      return
    with store.lock:
      store.requests["PUT"] += 1
      if "partNumber" in query:
        store.parts.setdefault(query["uploadId"], {})[int(query["partNumber"])] = data
      else:
        store.objects[name] = data
    self._send(200, b"", {"ETag": '"tag"'})

  def do_POST(self) -> None:
    name, query = self._target()
    self._body()
    store = self.server.store
    if store.read_only:
      self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
    elif "uploads" in query:
      text = f"<InitiateMultipartUploadResult><UploadId>{parse.quote(name, '')}</UploadId>"
      self._send(200, f"{text}</InitiateMultipartUploadResult>".encode())
    else:
      with store.lock:
        parts = store.parts.pop(query["uploadId"], {})
        store.objects[name] = b"".join(parts[number] for number in sorted(parts))
      text = "<CompleteMultipartUploadResult><ETag>tag</ETag></CompleteMultipartUploadResult>"
      self._send(200, text.encode())

  def _target(self) -> tuple[str, dict[str, str]]:
    split = parse.urlsplit(self.path)
    query = dict(parse.parse_qsl(split.query, keep_blank_values=True))
    return parse.unquote(split.path).strip("/"), query

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "") == "chunked":
      data = b""
      while size := int(self.rfile.readline().partition(b";")[0], 16):
        data += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
      return data
    found = b""
    while data:  # SIZE[;...] CRLF DATA CRLF
      line, _, rest = data.partition(b"\r\n")
      size = int(line.partition(b";")[0], 16)
      if not size:
        break
      found, data = found + rest[:size], rest[size + 2 :]
    return found

  def _object(self, *, is_head: bool) -> None:
    name, _ = self._target()
    store = self.server.store
    with store.lock:
      store.requests["HEAD" if is_head else "GET"] += 1
      data = store.objects.get(name)
    is_bucket = any(key.startswith(name + "/") for key in store.objects) and "/" not in name
    if data is None:
      self._send(200 if is_bucket else 404, b"", is_head=is_head)
      return
    headers = {"Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "ETag": '"tag"'}
    if is_head:
      self._send(200, data, headers, is_head=True)
      return
    status = 200
    if wanted := self.headers.get("Range"):
      first, _, last = wanted.removeprefix("bytes=").partition("-")
      start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
      headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
      data, status = data[start:stop], 206
    with store.lock:
      store.ranges.append(len(data))
    self._send(status, data, headers)

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    store = self.server.store
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token", "")
    limit = min(_PAGE, int(query.get("max-keys", _PAGE)))
    with store.lock:
      store.requests["LIST"] += 1
      names = sorted(n.partition("/")[2] for n in store.objects if n.startswith(bucket + "/"))
    entries: dict[str, str] = {}
    for name in names:
      if not name.startswith(prefix) or len(entries) > limit:
        continue
      head, slash, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ("", "", "")
      entry = prefix + head + slash if slash else name
      if entry > after and entry not in entries:
        xml = saxutils.escape(entry)
        size = len(store.objects[f"{bucket}/{name}"])
        entries[entry] = (
          f"<CommonPrefixes><Prefix>{xml}</Prefix></CommonPrefixes>"
          if slash
          else f"<Contents><Key>{xml}</Key><Size>{size}</Size><ETag>tag</ETag>"
          "<LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>"
        )
    shown = list(entries)[:limit]
    more = len(entries) > limit
    last = saxutils.escape(shown[-1]) if shown else ""
    token = f"<NextContinuationToken>{last}</NextContinuationToken>"
    text = (
      '<?xml version="1.0" encoding="UTF-8"?>'
      '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
      f"<Name>{bucket}</Name><Prefix>{saxutils.escape(prefix)}</Prefix>"
      f"<KeyCount>{len(shown)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
      f"<IsTruncated>{str(more).lower()}</IsTruncated>{token if more else ''}"
      f"{''.join(entries[name] for name in shown)}</ListBucketResult>"
    )
    self._send(200, text.encode(), {"Content-Type": "application/xml"})

  def _send(
    self, status: int, body: bytes, headers: dict[str, str] | None = None, *, is_head: bool = False
  ) -> None:
    self.send_response(status)
    for key, value in (headers or {}).items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if not is_head:
      self.wfile.write(body)
