"""Captions from a server with the chat completions of OpenAI, such as vLLM.

https://platform.openai.com/docs/api-reference/chat/create

A request has one image as a data URL and a prompt with the alt text. Failed requests are repeated
with exponential backoff and jitter; a Retry-After delays the requests of all threads. Redirects are
not followed, so the API key is sent to one host only, and proxies of the environment are ignored.
The key is removed from every text of the server before it is stored or reported.
"""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import email.utils
import http.client
import json
import math
import socket
import ssl
import threading
import time
from typing import Any
import urllib.parse

from ov_data import fs, hashing

_READ_BYTES = 1 << 16
_MAX_DETAIL = 200  # characters of a message of the server
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds of backoff
_JITTER_SALT = 1
_MAX_TOKENS = 1 << 40  # of one `usage`; more is a broken counter
_REJECTED = (400, 413, 415, 422)  # this record cannot be captioned, others may
_TEMPORARY = (408, 409, 425, 429)  # and 5xx


@dataclasses.dataclass(frozen=True)
class Request:
  """Everything that determines the captions of an image.

  Attributes:
    model: name of the model on the server.
    prompt: prompt with "{caption}" for the alt text.
    prompt_without_text: prompt of records without alt text.
    captions: number of captions per image.
    temperature, top_p: sampling; `top_p` is the probability mass of the nucleus.
    top_k: number of most likely tokens; 0 omits it, because only some servers know it.
    max_tokens: maximum number of tokens of a caption.
    seed: seed of the sampling; each request gets a seed that depends on it and the record.

  Raises:
    ValueError: if a value is out of range.
  """

  model: str
  prompt: str
  prompt_without_text: str
  captions: int = 1
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  max_tokens: int = 256
  seed: int = 0

  def __post_init__(self) -> None:
    if not self.model:
      raise ValueError("served_model='': expected the name of a model on the server")
    if "{caption}" not in self.prompt:
      raise ValueError(f"prompt={self.prompt!r}: expected {{caption}} where the alt text belongs")
    _check("captions", self.captions, 1, 128)
    _check("temperature", self.temperature, 0, 10)
    _check("top_p", self.top_p, 1e-6, 1)
    _check("top_k", self.top_k, 0, 1 << 20)
    _check("max_tokens", self.max_tokens, 1, 1 << 16)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of the requests; they do not change captions.

  Attributes:
    requests_per_second: maximum rate of requests; 0 for no limit.
    concurrent: maximum number of concurrent requests.
    timeout: seconds of a request from its connection to the last byte.
    attempts: number of failed requests of a record after which it is unusable.
    max_wait: longest Retry-After in seconds; a longer one ends the run.
    max_bytes: maximum size of a response.

  Raises:
    ValueError: if a value is out of range.
  """

  requests_per_second: float = 0.0
  concurrent: int = 16
  timeout: float = 120.0
  attempts: int = 6
  max_wait: float = 600.0
  max_bytes: int = 4 << 20

  def __post_init__(self) -> None:
    _check("requests_per_second", self.requests_per_second, 0, 1e6)
    _check("concurrent", self.concurrent, 1, 4096)
    _check("timeout", self.timeout, 1e-3, 86_400)
    _check("attempts", self.attempts, 1, 1000)
    _check("max_wait", self.max_wait, 0, 86_400)
    _check("max_bytes", self.max_bytes, 1, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Answer:
  """Captions of one image.

  Attributes:
    captions: the captions; None if all attempts failed.
    error: reason of the failure, a short phrase for counting.
    detail: additional information about the failure.
    prompt_tokens, completion_tokens: tokens of all requests, also of failed ones; None if the
      server did not report them.
  """

  captions: tuple[str, ...] | None
  error: str | None = None
  detail: str = ""
  prompt_tokens: int | None = None
  completion_tokens: int | None = None


class Stopped(Exception):
  """The client was closed."""


class _Failure(Exception):
  """A failed request of one record."""

  def __init__(self, reason: str, detail: str = "", wait: float = 0.0, usage: Any = None):
    super().__init__(reason)
    self.reason, self.detail, self.wait, self.usage = reason, detail, wait, usage


class _Rejected(_Failure):
  """The server rejects this record; another attempt cannot succeed."""


class _Unreachable(_Failure):
  """No connection; the server fails, not the record."""


class _Unusable(_Failure):
  """A response without usable caption; it may depend on the sampled tokens."""


class Client:
  """Requests captions from several threads.

  Args:
    url: base URL, such as http://localhost:8000/v1.
    request: model, prompt and sampling.
    limits: limits of the requests.
    api_key: key of the server, or "".

  Raises:
    ValueError: if the URL or the key is invalid; the message does not contain the key.
  """

  def __init__(self, url: str, request: Request, limits: Limits, api_key: str = ""):
    self._scheme, self._host, self._port, self._path = _parse(url)
    if not all(33 <= ord(letter) <= 126 and letter not in "\"'\\" for letter in api_key):
      raise ValueError(
        "the API key has spaces, quotes or characters that are not ASCII; set the environment "
        "variable to the key only"
      )
    self.request, self.limits = request, limits
    self._key = api_key
    self._tls = ssl.create_default_context() if self._scheme == "https" else None
    self._lock = threading.Lock()
    self._sockets: set[socket.socket] = set()
    self._stop = threading.Event()
    self._next = self._paused = 0.0

  def __repr__(self) -> str:
    return f"Client({self._scheme}://{self._host}:{self._port}{self._path})"

  def close(self) -> None:
    """End all requests; their threads raise `Stopped`."""
    self._stop.set()
    with self._lock:
      for connected in self._sockets:
        _shut(connected)

  def caption(self, record: int, image: bytes, mime: str, text: str | None) -> Answer:
    """Request the captions of an image, until there are enough or too many requests failed.

    Args:
      record: number of the record, for the seed.
      image: encoded image.
      mime: its media type, such as "image/jpeg".
      text: alt text, or None.

    Raises:
      ValueError: if the server rejects the key, the model or the URL.
      OSError: if the server is not reachable, or demands a longer wait than `max_wait`.
      Stopped: if the client was closed.
    """
    captions: list[str] = []
    tokens: list[tuple[int, int]] = []
    failures = unusable = 0
    while (missing := self.request.captions - len(captions)) > 0:
      seed = hashing.key(self.request.seed, record, len(captions), unusable) >> 33
      try:
        found, usage = self._ask(self._body(image, mime, text, missing, seed))
        captions += found[:missing]
        tokens += usage
      except _Failure as failure:
        failures += 1
        unusable += isinstance(failure, _Unusable)
        tokens += failure.usage or ()
        if failures >= self.limits.attempts or isinstance(failure, _Rejected):
          if isinstance(failure, _Unreachable):
            raise OSError(
              f"{self._scheme}://{self._host}:{self._port} is not reachable after {failures} "
              f"attempts ({failure.detail}); start the server, and repeat the command to resume"
            ) from None
          return Answer(None, failure.reason, failure.detail, *_sums(tokens))
        spread = 0.5 + hashing.Uniforms(_JITTER_SALT, self.request.seed, record, failures)() / 2
        backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(failures - 1, 10))
        self._sleep(max(failure.wait, backoff * spread))
    return Answer(tuple(captions), None, "", *_sums(tokens))

  def _body(self, image: bytes, mime: str, text: str | None, captions: int, seed: int) -> bytes:
    request = self.request
    prompt = request.prompt.replace("{caption}", text) if text else request.prompt_without_text
    url = f"data:{mime};base64,{base64.b64encode(image).decode()}"
    content = [
      {"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}},
    ]  # fmt: skip
    body: dict[str, Any] = {
      "model": request.model, "messages": [{"role": "user", "content": content}], "n": captions,
      "temperature": request.temperature, "top_p": request.top_p, "max_tokens": request.max_tokens,
      "seed": seed,
    }  # fmt: skip
    if request.top_k:
      body["top_k"] = request.top_k
    return json.dumps(body).encode()

  def _ask(self, body: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the captions of one request, and its tokens."""
    self._wait_for_turn()
    status, headers, data = self._send(body)
    if status == http.client.OK:
      return self._parsed(data)
    detail = self._message(data)
    if status in _REJECTED:
      raise _Rejected(f"rejected with status {status}", detail)
    if status in _TEMPORARY or status >= 500:
      wait = _retry_after(headers.get("Retry-After"))
      if wait > self.limits.max_wait:
        raise OSError(
          f"the server responds with status {status} and Retry-After: {wait:,.0f} seconds, more "
          f"than max_wait={self.limits.max_wait:,.0f}; repeat the command later to resume"
        )
      if wait:
        self._pause(wait)
      raise _Failure(f"status {status}", detail, wait)
    remedy = {401: "; set the API key in the environment", 403: "; check the API key",
              404: "; check --server and --served_model"}  # fmt: skip
    moved = "; redirects are not followed, give the final URL" if 300 <= status < 400 else ""
    raise ValueError(
      f"the server responds with status {status}{f' ({detail})' if detail else ''}"
      f"{remedy.get(status, moved)}"
    )

  def _parsed(self, data: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    try:
      content = json.loads(data)
    except (ValueError, RecursionError):
      raise _Unusable("response is not JSON") from None
    usage = _usage(content)
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list):
      raise _Unusable("response without choices", usage=usage)
    captions = []
    for choice in choices:
      message = choice.get("message") if isinstance(choice, dict) else None
      text = message.get("content") if isinstance(message, dict) else None
      if isinstance(text, str) and (cleaned := self._cleaned(text).strip()):
        captions.append(cleaned)
    if not captions:
      raise _Unusable("response without caption", usage=usage)
    return captions, usage

  def _send(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request and return status, headers and content."""
    seconds = self.limits.timeout
    connection = (
      http.client.HTTPConnection(self._host, self._port, timeout=seconds)
      if self._tls is None
      else http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=self._tls)
    )
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    try:
      connection.connect()
    except ssl.SSLCertVerificationError as error:
      raise OSError(
        f"{self._host} has no valid certificate ({error.verify_message}); expected one that this "
        "machine trusts"
      ) from None
    except OSError as error:
      connection.close()
      raise _Unreachable("not reachable", error.strerror or type(error).__name__) from None
    with contextlib.closing(connection), self._watched(connection.sock, seconds) as expired:
      try:
        connection.request("POST", f"{self._path}/chat/completions", body, headers)
        response = connection.getresponse()
        data = bytearray()
        while block := response.read(min(_READ_BYTES, self.limits.max_bytes + 1 - len(data))):
          data += block
          if len(data) > self.limits.max_bytes:
            raise _Unusable("response too large", f"more than {self.limits.max_bytes:,} bytes")
        if response.length:
          raise _Failure("incomplete response")
        if expired.is_set():
          raise TimeoutError
        return response.status, response.headers, bytes(data)
      except (OSError, http.client.HTTPException, ValueError) as error:
        if self._stop.is_set():
          raise Stopped from None
        if expired.is_set() or isinstance(error, TimeoutError):
          raise _Failure("time-out", f"no response within {seconds:g} s") from None
        # The text of these errors can contain parts of the response.
        raise _Failure("broken response", type(error).__name__) from None

  @contextlib.contextmanager
  def _watched(self, connected: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Shut the connection down after a time, also if the server sends a byte now and then."""
    expired = threading.Event()

    def expire() -> None:
      expired.set()
      _shut(connected)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    with self._lock:
      self._sockets.add(connected)
    timer.start()
    try:
      if self._stop.is_set():
        raise Stopped
      yield expired
    finally:
      timer.cancel()
      with self._lock:
        self._sockets.discard(connected)

  def _wait_for_turn(self) -> None:
    """Wait until the rate and the pauses that the server demands allow a request."""
    rate = self.limits.requests_per_second
    while True:
      with self._lock:
        now = time.monotonic()
        if is_paused := self._paused > now:
          turn = self._paused
        else:
          turn = max(now, self._next)
          self._next = turn + (1 / rate if rate else 0)
      self._sleep(turn - now)
      if not is_paused:
        return

  def _pause(self, seconds: float) -> None:
    with self._lock:
      self._paused = max(self._paused, time.monotonic() + seconds)

  def _sleep(self, seconds: float) -> None:
    if self._stop.wait(max(0.0, seconds)):
      raise Stopped

  def _message(self, data: bytes) -> str:
    """Return the message of an error of the server on one line; "" if it has another form."""
    try:
      error = json.loads(data)
      error = error.get("error", error)
      text = error if isinstance(error, str) else error["message"]
      return fs.printable(" ".join(self._cleaned(text).split()))[:_MAX_DETAIL]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
      return ""

  def _cleaned(self, text: str) -> str:
    """Return a text of the server without the key, and without characters that are not stored."""
    if self._key:
      text = text.replace(self._key, "[API key]")
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _parse(url: str) -> tuple[str, str, int, str]:
  """Return scheme, host, port and path of a base URL; messages repeat no credentials."""
  example = "expected a base URL such as http://localhost:8000/v1"
  try:
    parts = urllib.parse.urlsplit(url)
    port = parts.port
  except ValueError:
    raise ValueError(f"--server is not a valid URL; {example}") from None
  if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
    raise ValueError(
      f"--server has a user, password, query or fragment; {example}, and the API key in the "
      "environment"
    )
  if parts.scheme not in ("http", "https"):
    raise ValueError(f"--server has the scheme {parts.scheme!r:.40}, not http or https; {example}")
  if not parts.hostname or not all(33 <= ord(letter) <= 126 for letter in url):
    raise ValueError(f"--server has no host, or characters that URLs do not have; {example}")
  default = 443 if parts.scheme == "https" else 80
  return parts.scheme, parts.hostname, port or default, parts.path.rstrip("/")


def _usage(content: Any) -> list[tuple[int, int]]:
  """Return the pair of prompt and completion tokens of a response, if it has them."""
  usage = content.get("usage") if isinstance(content, dict) else None
  if not isinstance(usage, dict):
    return []
  counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
  valid = [count for count in counts if type(count) is int and 0 <= count < _MAX_TOKENS]
  return [(valid[0], valid[1])] if len(valid) == len(counts) else []


def _sums(tokens: list[tuple[int, int]]) -> tuple[int | None, int | None]:
  if not tokens:
    return None, None
  return sum(pair[0] for pair in tokens), sum(pair[1] for pair in tokens)


def _retry_after(value: str | None) -> float:
  """Return the seconds of a Retry-After header, a number or a date; 0 if it has neither."""
  try:
    seconds = float(value or 0)
  except ValueError:
    try:
      date = email.utils.parsedate_to_datetime(value or "")
      now = datetime.datetime.now(datetime.UTC)
      seconds = (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
      return 0.0
  return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _check(name: str, value: float, lowest: float, highest: float) -> None:
  if not lowest <= value <= highest:
    raise ValueError(f"{name}={value}: expected {lowest:g} to {highest:g}")


def _shut(connected: socket.socket) -> None:
  with contextlib.suppress(OSError):
    socket.socket.shutdown(connected, socket.SHUT_RDWR)
