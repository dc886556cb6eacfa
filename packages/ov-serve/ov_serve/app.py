"""ASGI application: page, JSON API, OpenAI-compatible embeddings, health and metrics."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import importlib.metadata
import logging
import pathlib
import time
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ov_serve import api
from ov_serve import metrics as metrics_module
from ov_serve.batching import Busy
from ov_serve.guard import LOOPBACK, Bodies, Guard, Limits, Refused
from ov_serve.index import Index
from ov_serve.model import Model
from ov_serve.service import Service

log = logging.getLogger("ov_serve")

_T = TypeVar("_T", bound=msgspec.Struct)
Handler = Callable[[Request], Awaitable[Response]]

STATIC = pathlib.Path(__file__).parent / "static"
_THUMBNAIL = 320


def create_app(
  model: Model,
  index: Index | None = None,
  *,
  hosts: tuple[str, ...] = (),
  limits: Limits | None = None,
) -> ASGIApp:
  """Return the application.

  Args:
    model: model.
    index: index of this model; None for a server without search.
    hosts: accepted names of the Host header in addition to those of the loopback address; "*"
      accepts every name.
    limits: limits of requests.

  Raises:
    ValueError: if the index belongs to another model.
  """
  limits = limits or Limits()
  app = _App(Service(model, index, limits), Bodies(limits))
  table: tuple[tuple[str, str, Handler], ...] = (
    ("/", "GET", _file("index.html", "text/html; charset=utf-8")),
    ("/static/app.js", "GET", _file("app.js", "text/javascript; charset=utf-8")),
    ("/static/style.css", "GET", _file("style.css", "text/css; charset=utf-8")),
    ("/static/icon.svg", "GET", _file("icon.svg", "image/svg+xml")),
    ("/health", "GET", app.health),
    ("/metrics", "GET", app.metrics),
    ("/openapi.json", "GET", app.openapi),
    ("/images/{row}", "GET", app.image),
    ("/api/info", "GET", app.info),
    ("/api/search", "POST", app.search),
    ("/api/classify", "POST", app.classify),
    ("/api/caption", "POST", app.caption),
    ("/api/embed", "POST", app.embed),
    ("/v1/models", "GET", app.models),
    ("/v1/embeddings", "POST", app.embeddings),
  )
  starlette = Starlette(
    routes=[
      Route(path, app.timed(path, handler), methods=[method]) for path, method, handler in table
    ],
    exception_handlers={HTTPException: _http_error, Refused: _refused, Exception: _bug},
    lifespan=app.lifespan,
  )
  return Guard(starlette, (*LOOPBACK, *hosts), _error)


class _App:
  """Handlers of the routes."""

  def __init__(self, service: Service, bodies: Bodies):
    self._service, self._bodies = service, bodies
    service.metrics.watch_buffered(lambda: bodies.buffered)
    self._openapi = _json(api.openapi(_version()))

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    """Compile before the first request, and end the worker threads with the server."""
    start = time.perf_counter()
    await asyncio.to_thread(self._service.warm_up)
    log.info("ready; compiled in %.1f s", time.perf_counter() - start)
    yield
    await self._service.close()

  def timed(self, route: str, handler: Handler) -> Handler:
    """Return a handler that counts its requests and answers errors."""

    async def handle(request: Request) -> Response:
      start, status = time.perf_counter(), 500
      try:
        response = await handler(request)
        status = response.status_code
        return response
      except Refused as error:
        status = error.status
        raise
      except Busy as error:
        status = 503
        raise Refused(503, f"{error}; try again later") from None
      finally:
        self._service.metrics.request(route, status, time.perf_counter() - start)

    return handle

  async def health(self, request: Request) -> Response:
    """Return that the server is running."""
    return _json({"status": "ok", "model": self._service.model.name})

  async def metrics(self, request: Request) -> Response:
    """Return the metrics of Prometheus."""
    return Response(self._service.metrics.render(), media_type=metrics_module.CONTENT_TYPE)

  async def openapi(self, request: Request) -> Response:
    """Return the description of the API."""
    return self._openapi

  async def info(self, request: Request) -> Response:
    """Return what the server offers."""
    return _json(self._service.info())

  async def models(self, request: Request) -> Response:
    """Return the list of models of the OpenAI API."""
    entry = {"id": self._service.model.name, "object": "model", "created": 0, "owned_by": "local"}
    return _json({"object": "list", "data": [entry]})

  async def image(self, request: Request) -> Response:
    """Return a thumbnail of an image of the index."""
    row = request.path_params["row"]
    if (number := _number(row)) is None:
      raise Refused(404, f"row={row[:20]!r}: expected the number of a row", "row")
    size = request.query_params.get("size", str(_THUMBNAIL))
    if (side := _number(size)) is None:
      raise Refused(400, f"size={size[:20]!r}: expected a number of pixels", "size")
    content, tag = await self._service.thumbnail(number, side)
    # `private`: photos must not stay in a shared cache.
    headers = {"etag": f'"{tag}"', "cache-control": "private, max-age=3600"}
    if request.headers.get("if-none-match") == headers["etag"]:
      return Response(status_code=304, headers=headers)
    return Response(content, media_type="image/jpeg", headers=headers)

  async def search(self, request: Request) -> Response:
    """Search by text, image or row."""
    async with self._read(request, api.SearchRequest) as (given, image):
      if (given.text is not None) + (image is not None) + (given.row is not None) != 1:
        raise Refused(400, "expected exactly one of text, image and row")
      if image is not None:
        vector = await self._service.embed_image(image)
      elif given.row is not None:
        vector = self._service.vector_of(given.row)
      else:
        [vector] = await self._service.embed_texts([given.text or ""])
    return _json(await self._service.search(vector, given.k))

  async def classify(self, request: Request) -> Response:
    """Return the probabilities of labels."""
    async with self._read(request, api.ClassifyRequest) as (given, image):
      return _json(await self._service.classify(_needed(image), given.labels, given.template))

  async def caption(self, request: Request) -> Response:
    """Write a caption."""
    async with self._read(request, api.ImageRequest) as (_, image):
      return _json(await self._service.caption(_needed(image)))

  async def embed(self, request: Request) -> Response:
    """Embed an image."""
    async with self._read(request, api.ImageRequest) as (_, image):
      vector = await self._service.embed_image(_needed(image))
    return _json(api.EmbedResponse(vector.tolist()))

  async def embeddings(self, request: Request) -> Response:
    """Embed texts, and images as data URLs, in the form of the OpenAI API."""
    async with self._read(request, api.EmbeddingsRequest) as (given, _):
      inputs = [given.input] if isinstance(given.input, str) else given.input
      if given.dimensions not in (None, self._service.model.dim):
        raise Refused(
          400,
          f"dimensions={given.dimensions}: the vectors of this model have size "
          f"{self._service.model.dim}; omit dimensions",
          "dimensions",
        )
      if not 1 <= len(inputs) <= self._service.limits.texts:
        limit = self._service.limits.texts
        raise Refused(400, f"input: {len(inputs)} items; expected 1 to {limit}", "input")
      texts = [text for text in inputs if not text.startswith("data:image/")]
      of_texts = iter(await self._service.embed_texts(texts) if texts else ())
      vectors: list[np.ndarray] = []
      for text in inputs:
        if text.startswith("data:image/"):
          vectors.append(await self._service.embed_image(api.image_bytes(text)))
        else:
          vectors.append(next(of_texts))
    tokens = await self._service.count_tokens(texts)
    numbers = given.encoding_format == "float"
    data = [
      api.Embedding("embedding", i, v.tolist() if numbers else api.floats_as_base64(v))
      for i, v in enumerate(vectors)
    ]
    usage = api.Usage(tokens, tokens)
    return _json(api.EmbeddingsResponse("list", data, self._service.model.name, usage))

  @contextlib.asynccontextmanager
  async def _read(self, request: Request, kind: type[_T]) -> AsyncIterator[tuple[_T, bytes | None]]:
    """Yield the fields of a request and its image; the body counts as buffered until the end.

    A body of type image/* is the image itself, with the other fields in the query string.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.startswith("image/"):
      raise Refused(415, f"content-type {media[:40]!r}: expected application/json or image/*")
    fields = msgspec.structs.fields(kind)
    if media.startswith("image/") and not any(field.name == "image" for field in fields):
      raise Refused(415, f"content-type {media[:40]!r}: expected application/json")
    body = await self._bodies.read(request)
    try:
      if media == "application/json":
        given = api.parse_json(body, kind)
        text = getattr(given, "image", None)
        yield given, None if text is None else api.image_bytes(text)
      else:
        query = request.query_params
        if "image" in query:
          raise Refused(400, "image: the body is the image", "image")
        lists = {field.name for field in fields if field.type == list[str]}
        values = {k: query.getlist(k) if k in lists else query[k] for k in query}
        image_in_body = {"image": ""}
        yield api.parse_query(values | image_in_body, kind), body
    finally:
      self._bodies.release(len(body))


def _file(name: str, kind: str) -> Handler:
  """Return the handler of a file of the page, which is read once."""
  content = (STATIC / name).read_bytes()

  async def handle(request: Request) -> Response:
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

  return handle


def _number(text: str) -> int | None:
  """Return the number in a URL, or None if it is not one or has more than 18 digits."""
  return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def _needed(image: bytes | None) -> bytes:
  if image is None:
    raise Refused(400, "image: expected an image", "image")
  return image


def _json(value: Any, status: int = 200) -> Response:
  # Not `application/json` of a page: the browser must not guess another type.
  return Response(
    msgspec.json.encode(value),
    status,
    media_type="application/json",
    headers={"cache-control": "no-store"},
  )


def _error(error: Refused) -> Response:
  kind = "invalid_request_error" if error.status < 500 else "server_error"
  detail = api.ErrorDetail(str(error), kind, error.param)
  response = _json(api.ErrorResponse(detail), error.status)
  if error.status == 503:
    response.headers["retry-after"] = "1"
  if error.status in (408, 413):
    response.headers["connection"] = "close"  # the rest of the body is not read
  return response


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  path = request.url.path[:80]
  allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
  messages = {
    404: f"{path!r}: no such path; GET /openapi.json lists the paths of the API",
    405: f"{request.method[:20]} {path!r}: expected {allowed}",
  }
  message = messages.get(error.status_code, error.detail)
  response = _error(Refused(error.status_code, message))
  response.headers.update(error.headers or {})
  return response


async def _bug(request: Request, error: Exception) -> Response:
  log.error("%s %s: %r", request.method, request.url.path, error, exc_info=error)
  return _error(Refused(500, "internal error; the log of the server has the reason"))


def _version() -> str:
  try:
    return importlib.metadata.version("ov-serve")
  except importlib.metadata.PackageNotFoundError:  # in the repository
    return "0"
