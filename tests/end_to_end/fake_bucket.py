"""Fake Google Cloud Storage server in this process, for runs that write to gs://.

  with FakeBucket("bucket", folder) as bucket:
    runner.run(..., "--workdir=gs://bucket/run", **bucket.environment())
  bucket.objects["run/config.json"]

The programs under test are unchanged. TensorStore has a setting for the address of the server.
TensorFlow always uses https://www.googleapis.com, but through the proxy in `https_proxy`: this
server acts as that proxy, decrypts with a certificate made for the test, and serves the same
objects. Only the requests of the two libraries are implemented; others get status 501 and are
recorded.
"""

from collections.abc import Callable
from http import server
import json
from pathlib import Path
import re
import ssl
import subprocess
import threading
from typing import Any, Self
from urllib import parse

_HOSTS = ("www.googleapis.com", "storage.googleapis.com")
_PAGE = 1000  # names per response, as in the real service


class FakeBucket:
  """One bucket; a context manager.

  Attributes:
    objects: name -> content.
    unknown: requests that are not implemented.
    read_only: whether requests that change objects get status 403.
  """

  def __init__(self, name: str, folder: Path, on_write: Callable[[str], None] | None = None):
    """Create a certificate in `folder` with the program openssl.

    Args:
      name: name of the bucket; others do not exist.
      folder: for the certificate and its key.
      on_write: called with the name of an object before it is written.
    """
    self.name, self.objects, self._on_write = name, dict[str, bytes](), on_write
    self.unknown: list[str] = []
    self.read_only = False
    self.generations: dict[str, int] = {}
    self.uploads: dict[str, str] = {}  # resumable upload -> name of the object
    self.lock = threading.Lock()
    self._certificate = folder / "certificate.pem"
    key = folder / "key.pem"
    alternatives = ",".join(f"DNS:{host}" for host in _HOSTS)
    subprocess.run(
      [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        "-subj", "/CN=fake bucket", "-addext", f"subjectAltName={alternatives}",
        "-keyout", str(key), "-out", str(self._certificate),
      ],
      check=True, capture_output=True,
    )  # fmt: skip
    self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self.tls.load_cert_chain(self._certificate, key)

  def environment(self) -> dict[str, str]:
    """Return environment variables that direct a program to this bucket."""
    address = f"http://127.0.0.1:{self._server.server_port}"
    return {
      "TENSORSTORE_GCS_HTTP_URL": address,
      "https_proxy": address,
      "CURL_CA_BUNDLE": str(self._certificate),
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "GCS_RETRY_CONFIG_MAX_RETRIES": "2",
      "NO_GCE_CHECK": "true",
      "no_proxy": "127.0.0.1",
    }

  def names(self, prefix: str) -> list[str]:
    """Return the names of objects below `prefix`, without the prefix."""
    with self.lock:
      return sorted(n.removeprefix(prefix) for n in self.objects if n.startswith(prefix))

  def put(self, name: str, content: bytes) -> None:
    if self._on_write is not None:
      self._on_write(name)
    with self.lock:
      self.objects[name] = content
      self.generations[name] = self.generations.get(name, 0) + 1

  def __enter__(self) -> Self:
    self._server = _Server(("127.0.0.1", 0), _Handler)
    self._server.bucket = self
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._server.shutdown()
    self._server.server_close()


class _Refused(Exception):
  """An error response with its status code and reason."""


class _Server(server.ThreadingHTTPServer):
  """Server for all connections to one bucket."""

  bucket: FakeBucket


class _Handler(server.BaseHTTPRequestHandler):
  """Handler of one connection."""

  protocol_version = "HTTP/1.1"
  server: _Server

  @property
  def bucket(self) -> FakeBucket:
    return self.server.bucket

  def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (as in http.server)
    """Log nothing."""

  def do_CONNECT(self) -> None:
    self.send_response(200)
    self.end_headers()
    self.connection = self.bucket.tls.wrap_socket(self.connection, server_side=True)
    self.rfile = self.connection.makefile("rb")
    self.wfile = self.connection.makefile("wb", buffering=0)
    self.close_connection = False

  def _answer(self) -> None:
    body = self._body()
    split = parse.urlsplit(self.path)
    query = dict(parse.parse_qsl(split.query))
    try:
      for method, pattern, function in _ROUTES:
        found = re.fullmatch(pattern, split.path)
        if self.command == method and found:
          named = [parse.unquote(part) for part in found.groups()]
          if named[:1] not in ([], [self.bucket.name]):
            raise _Refused(404, "The specified bucket does not exist.")
          if self.bucket.read_only and method != "GET":
            raise _Refused(403, "The caller may not write here.")
          function(self, *named[1:], query=query, body=body)
          return
      self.bucket.unknown.append(f"{self.command} {self.path}")
      raise _Refused(501, "The fake bucket does not know this request.")
    except _Refused as refusal:
      code, reason = refusal.args
      self._send(json.dumps({"error": {"code": code, "message": reason}}).encode(), code=code)

  do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (names of http.server)

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    chunks = []
    while size := int(self.rfile.readline(), 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(chunks)

  def _send(self, data: bytes = b"", code: int = 200, **headers: Any) -> None:
    self.send_response(code)
    for name, value in {**headers, "Content-Length": len(data)}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    self.wfile.write(data)

  def _send_json(self, value: Any) -> None:
    self._send(json.dumps(value).encode(), Content_Type="application/json")

  def _content(self, name: str) -> tuple[bytes, int]:
    with self.bucket.lock:
      if name not in self.bucket.objects:
        raise _Refused(404, f"No such object: {name}")
      return self.bucket.objects[name], self.bucket.generations[name]

  def _metadata(self, name: str) -> dict[str, str]:
    content, generation = self._content(name)
    return {
      "name": name,
      "size": str(len(content)),
      "generation": str(generation),
      "updated": "2026-01-01T00:00:00.000Z",
    }

  def describe(self, *, query: dict[str, str], body: bytes) -> None:
    self._send_json({"name": self.bucket.name, "location": "US"})

  def list(self, *, query: dict[str, str], body: bytes) -> None:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    first, end = query.get("startOffset", ""), query.get("endOffset")
    first = max(first, query.get("pageToken", ""))
    size = min(int(query.get("maxResults", _PAGE)), _PAGE)
    found: dict[str, bool] = {}  # name -> whether an object, not a common prefix
    following = None
    for name in self.bucket.names(""):
      if not name.startswith(prefix) or name < first or (end is not None and name >= end):
        continue
      head, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      shown = prefix + head + slash if slash else name
      if shown not in found and len(found) == size:
        following = name
        break
      found[shown] = not slash
    items = [self._metadata(name) for name, is_object in found.items() if is_object]
    answer: dict[str, Any] = {"items": items}
    if prefixes := [name for name, is_object in found.items() if not is_object]:
      answer["prefixes"] = prefixes
    if following is not None:
      answer["nextPageToken"] = following
    self._send_json(answer)

  def get(self, name: str, *, query: dict[str, str], body: bytes) -> None:
    if query.get("alt") != "media":
      self._send_json(self._metadata(name))
    else:
      self.read(name, query=query, body=body)

  def read(self, name: str, *, query: dict[str, str], body: bytes) -> None:
    content, generation = self._content(name)
    headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not wanted:
      self._send(content, **headers)
      return
    begin, end = int(wanted[1]), int(wanted[2] or len(content)) + 1
    if begin >= len(content):
      raise _Refused(416, f"{name} has {len(content)} bytes")
    part = content[begin:end]
    span = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
    self._send(part, code=206, Content_Range=span, **headers)

  def upload(self, *, query: dict[str, str], body: bytes) -> None:
    name = query["name"]
    if query["uploadType"] == "resumable":
      with self.bucket.lock:
        session = str(len(self.bucket.uploads))
        self.bucket.uploads[session] = name
      self._send(Location=f"https://{_HOSTS[0]}/session/{session}")
      return
    expected = query.get("ifGenerationMatch")
    if expected is not None and int(expected) != self.bucket.generations.get(name, 0):
      raise _Refused(412, "The generation is another.")
    self.bucket.put(name, body)
    self._send_json(self._metadata(name))

  def finish_upload(self, *, query: dict[str, str], body: bytes) -> None:
    name = self.bucket.uploads[parse.urlsplit(self.path).path.rpartition("/")[2]]
    if not self.headers["Content-Range"].startswith("bytes */"):  # a status query of the upload
      self.bucket.put(name, body)
    self._send_json(self._metadata(name))

  def delete(self, name: str, *, query: dict[str, str], body: bytes) -> None:
    self._content(name)
    with self.bucket.lock:
      del self.bucket.objects[name], self.bucket.generations[name]
    self._send(code=204)

  def rewrite(
    self, name: str, bucket: str, new: str, *, query: dict[str, str], body: bytes
  ) -> None:
    self.bucket.put(new, self._content(name)[0])
    self._send_json({"done": True, "resource": self._metadata(new)})


_OF_BUCKET = "/storage/v1/b/([^/]+)"
_ROUTES = (
  ("GET", _OF_BUCKET, _Handler.describe),
  ("GET", f"{_OF_BUCKET}/o", _Handler.list),
  ("GET", f"{_OF_BUCKET}/o/([^/]+)", _Handler.get),
  ("GET", "/([^/]+)/(.+)", _Handler.read),  # of storage.googleapis.com
  ("POST", "/upload/storage/v1/b/([^/]+)/o", _Handler.upload),
  ("PUT", "/session/[0-9]+", _Handler.finish_upload),
  ("DELETE", f"{_OF_BUCKET}/o/([^/]+)", _Handler.delete),
  ("POST", f"{_OF_BUCKET}/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", _Handler.rewrite),
)
