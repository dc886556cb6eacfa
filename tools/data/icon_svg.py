"""Checks of untrusted SVG icons before they are rendered.

An icon is rejected unless it is a small drawing without references outside itself: no entities, no
scripts, images, text or style sheets, and only links to its own elements. The number of elements
counts every copy that `<use>` makes, so nested copies cannot grow exponentially.
"""

import math
import re
from xml.etree import ElementTree

MAX_CHARS = 200_000
MAX_ELEMENTS = 5_000
MAX_DEPTH = 64
MAX_ASPECT = 3  # longer side : shorter side
_MAX_SIDE = 100_000
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_DRAWING = frozenset(
  [
    "svg",
    "g",
    "defs",
    "symbol",
    "use",
    "path",
    "circle",
    "ellipse",
    "rect",
    "line",
    "polyline",
    "polygon",
    "clipPath",
    "mask",
    "marker",
    "pattern",
    "linearGradient",
    "radialGradient",
    "stop",
    "filter",
    "title",
    "desc",
    "metadata",
  ]
)
_FILTER = frozenset(
  [
    "feBlend",
    "feColorMatrix",
    "feComponentTransfer",
    "feComposite",
    "feDropShadow",
    "feFlood",
    "feFuncA",
    "feFuncB",
    "feFuncG",
    "feFuncR",
    "feGaussianBlur",
    "feMerge",
    "feMergeNode",
    "feMorphology",
    "feOffset",
  ]
)
_ANIMATION = frozenset(["animate", "animateTransform", "animateMotion", "set", "mpath"])
_URL = re.compile(r"url\(\s*(['\"]?)(.*?)\1\s*\)", re.IGNORECASE)


class SvgError(ValueError):
  """An icon that is not rendered; `reason` is a short phrase for counting."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


def document(
  body: str, image_size: int, left: float, top: float, width: float, height: float
) -> str:
  """Return an SVG document of `image_size` pixels per side, for a checked body.

  Args:
    body: content of the `<svg>` element.
    image_size: width and height of the image; the drawing is centred in it.
    left, top, width, height: view box of the drawing.

  Raises:
    SvgError: if the drawing is rejected.
  """
  box = (left, top, width, height)
  if not all(map(math.isfinite, box)) or max(map(abs, box)) > _MAX_SIDE or min(box[2:]) <= 0:
    raise SvgError("invalid size", " ".join(map(str, box)))
  if max(width, height) > MAX_ASPECT * min(width, height):
    raise SvgError("elongated", f"{width} x {height}")
  if len(body) > MAX_CHARS:
    raise SvgError("large SVG", f"{len(body)} characters")
  if "<!" in body or "<?" in body:  # entities, comments, CDATA, processing instructions
    raise SvgError("unsupported XML", "<! or <?")
  text = (
    f'<svg xmlns="{_SVG}" xmlns:xlink="{_XLINK}" width="{image_size}" height="{image_size}" '
    f'viewBox="{left} {top} {width} {height}">{body}</svg>'
  )
  _check(text)
  return text


def _check(text: str) -> None:
  try:
    root = ElementTree.fromstring(text)
  except (ElementTree.ParseError, ValueError) as error:
    raise SvgError("invalid XML", str(error)) from None
  by_id: dict[str, ElementTree.Element] = {}
  elements, level = 0, [root]
  for _ in range(MAX_DEPTH):
    for element in level:
      _check_element(element)
      if (name := element.get("id")) is not None:
        by_id.setdefault(name, element)
    elements += len(level)
    level = [child for element in level for child in element]
    if elements + len(level) > MAX_ELEMENTS:
      raise SvgError("too many elements", f"more than {MAX_ELEMENTS}")
    if not level:
      break
  else:
    raise SvgError("deeply nested", f"more than {MAX_DEPTH} levels")
  _check_copies(root, by_id)


def _check_element(element: ElementTree.Element) -> None:
  namespace, _, name = element.tag.rpartition("}")
  if namespace != f"{{{_SVG}" or name not in _DRAWING | _FILTER:
    reason = "animated" if name in _ANIMATION else f"unsupported element {name[:30]}"
    raise SvgError(reason)
  for key, value in element.attrib.items():
    if key.rpartition("}")[2] == "href" and not value.strip().startswith("#"):
      raise SvgError("external reference", value[:80])
    if any(not url.startswith("#") for _, url in _URL.findall(value)) or "@" in value:
      raise SvgError("external reference", value[:80])
    if "\\" in value or len(_URL.findall(value)) != len(re.findall(r"url\s*\(", value, re.I)):
      raise SvgError("invalid reference", value[:80])


def _check_copies(root: ElementTree.Element, by_id: dict[str, ElementTree.Element]) -> None:
  """Check the number of drawn elements, in which a reference counts as what it refers to."""
  counts: dict[ElementTree.Element, int] = {}  # -1 while an element is being counted

  def count(element: ElementTree.Element, depth: int) -> int:
    if counts.get(element) == -1:
      raise SvgError("circular reference")
    if depth > 4 * MAX_DEPTH:
      raise SvgError("deeply nested", "references")
    if element not in counts:
      counts[element] = -1
      parts = [*element, *(by_id[name] for name in _references(element) if name in by_id)]
      total = 1 + sum(count(part, depth + 1) for part in parts)
      if total > MAX_ELEMENTS:
        raise SvgError("too many elements", f"more than {MAX_ELEMENTS} with copies")
      counts[element] = total
    return counts[element]

  count(root, 0)


def _references(element: ElementTree.Element) -> list[str]:
  found = [url[1:] for value in element.attrib.values() for _, url in _URL.findall(value)]
  links = [value for key, value in element.attrib.items() if key.rpartition("}")[2] == "href"]
  return found + [link.strip()[1:] for link in links]
