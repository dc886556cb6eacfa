"""Requests and responses of the server as typed structures, and their OpenAPI description."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from ov_serve.guard import Refused

_T = TypeVar("_T", bound=msgspec.Struct)


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
  """Search by exactly one of a text, an image (base64 or data URL) and a row of the index."""

  text: str | None = None
  image: str | None = None
  row: int | None = None
  k: int = 20


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True):
  """Probabilities of labels for an image."""

  image: str
  labels: list[str]
  template: str = "a photo of a {}"


class ImageRequest(msgspec.Struct, forbid_unknown_fields=True):
  """An image, base64 or data URL."""

  image: str


class EmbeddingsRequest(msgspec.Struct):
  """Request of the OpenAI embeddings API. An input may be a text or a data URL of an image."""

  input: str | list[str]
  model: str = ""
  encoding_format: Literal["float", "base64"] = "float"
  dimensions: int | None = None
  user: str | None = None


class Match(msgspec.Struct, omit_defaults=True):
  """An image of the index."""

  row: int
  score: float
  key: str
  captions: list[str] = []
  class_name: str | None = None


class SearchResponse(msgspec.Struct):
  """Images of the index, best first, and the time of the search in milliseconds."""

  results: list[Match]
  milliseconds: float


class LabelScore(msgspec.Struct):
  """Probability of a label."""

  label: str
  probability: float


class ClassifyResponse(msgspec.Struct):
  """Labels, most probable first."""

  labels: list[LabelScore]


class CaptionResponse(msgspec.Struct):
  """A generated caption, its log probability and number of tokens."""

  caption: str
  log_prob: float
  tokens: int


class EmbedResponse(msgspec.Struct):
  """Unit vector of an image."""

  embedding: list[float]


class Embedding(msgspec.Struct):
  """One vector of the OpenAI embeddings API: numbers, or base64 of little-endian float32."""

  object: Literal["embedding"]
  index: int
  embedding: list[float] | str


class Usage(msgspec.Struct):
  """Number of text tokens."""

  prompt_tokens: int
  total_tokens: int


class EmbeddingsResponse(msgspec.Struct):
  """Response of the OpenAI embeddings API."""

  object: Literal["list"]
  data: list[Embedding]
  model: str
  usage: Usage


class InfoResponse(msgspec.Struct):
  """What the server offers."""

  model: str
  fingerprint: str
  dim: int
  images: int
  has_images: bool
  text_search: bool
  text_labels: bool
  captions: bool
  body_bytes: int
  pixels: int
  results: int


class ErrorDetail(msgspec.Struct):
  """Reason of an error, in the form of the OpenAI API."""

  message: str
  type: str
  param: str | None = None
  code: str | None = None


class ErrorResponse(msgspec.Struct):
  """Body of every response with a status of 400 and above."""

  error: ErrorDetail


# Path, request, response, summary.
OPERATIONS: tuple[tuple[str, type, type, str], ...] = (
  ("/api/search", SearchRequest, SearchResponse, "Search by text, image or row"),
  ("/api/classify", ClassifyRequest, ClassifyResponse, "Classify an image by labels"),
  ("/api/caption", ImageRequest, CaptionResponse, "Write a caption for an image"),
  ("/api/embed", ImageRequest, EmbedResponse, "Embed an image"),
  ("/v1/embeddings", EmbeddingsRequest, EmbeddingsResponse, "Embeddings, as in the OpenAI API"),
)


def parse_json(body: bytes, kind: type[_T]) -> _T:
  """Parse a JSON request.

  Raises:
    Refused: if the body is not JSON or does not match the structure.
  """
  try:
    return msgspec.json.decode(body, type=kind)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise Refused(400, f"invalid JSON request: {error}") from None


def parse_query(values: Mapping[str, Any], kind: type[_T]) -> _T:
  """Parse the fields of a request from the query string.

  Raises:
    Refused: if a field is unknown, missing or of a wrong type.
  """
  try:
    return msgspec.convert(values, kind, strict=False)
  except msgspec.MsgspecError as error:
    raise Refused(400, f"invalid query string: {error}") from None


def image_bytes(text: str) -> bytes:
  """Return the bytes of base64 text or a data URL.

  Raises:
    Refused: if the text is neither.
  """
  if text.startswith("data:"):
    head, comma, text = text.partition(",")
    if not comma or not head.endswith(";base64"):
      raise Refused(400, "image: expected a data URL with ;base64", "image")
  try:
    return binascii.a2b_base64(text, strict_mode=True)
  except (binascii.Error, ValueError) as error:
    raise Refused(400, f"image: not base64: {error}", "image") from None


def floats_as_base64(vector: Any) -> str:
  """Return float32 values as base64, little-endian."""
  return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def openapi(version: str) -> dict[str, Any]:
  """Return the OpenAPI 3.1 description of all operations."""
  types = [kind for _, request, response, _ in OPERATIONS for kind in (request, response)]
  schemas, components = msgspec.json.schema_components(
    [*types, ErrorResponse], ref_template="#/components/schemas/{name}"
  )
  error = _content(schemas[-1])
  paths: dict[str, Any] = {}
  for number, (path, _, _, summary) in enumerate(OPERATIONS):
    paths[path] = {
      "post": {
        "summary": summary,
        "requestBody": {"required": True, **_content(schemas[2 * number])},
        "responses": {
          "200": {"description": "Success", **_content(schemas[2 * number + 1])},
          "default": {"description": "Error", **error},
        },
      }
    }
  return {
    "openapi": "3.1.0",
    "info": {"title": "ov-serve", "version": version},
    "paths": paths,
    "components": {"schemas": components},
  }


def _content(schema: Any) -> dict[str, Any]:
  return {"content": {"application/json": {"schema": schema}}}
