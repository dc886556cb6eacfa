"""Tests of the checks of untrusted SVG."""

import math

import pytest

from tools.data import icon_svg

PATH = '<path d="M0 0h9v9z"/>'


def laughs(levels):
  """Return groups that each use the previous one ten times."""
  groups = "".join(
    f'<g id="x{i + 1}">' + f'<use href="#x{i}"/>' * 10 + "</g>" for i in range(levels)
  )
  return f'<g id="x0">{PATH}</g>{groups}'


@pytest.mark.parametrize(
  "body",
  [
    PATH,
    '<defs><linearGradient id="a"><stop offset="0"/></linearGradient></defs>'
    '<path fill="url(#a)" style="stroke: url(\'#a\')" d="M0 0h9v9z"/>',
    f'<g id="a">{PATH}</g><use xlink:href="#a" x="3"/><use href="#a"/><use href="#missing"/>',
    laughs(3),
  ],
)
def test_ordinary_icons_pass(body):
  text = icon_svg.document(body, 32, 0, -2, 24, 20)
  assert text.startswith("<svg ") and body in text and 'viewBox="0 -2 24 20"' in text


@pytest.mark.parametrize(
  "body, reason",
  [
    ('<image href="http://example.com/a.png"/>', "unsupported element image"),
    ("<script>1</script>", "unsupported element script"),
    ("<style>@import 'a.css'</style>", "unsupported element style"),
    ("<text>a</text>", "unsupported element text"),
    ('<foreignObject xmlns="http://www.w3.org/1999/xhtml"/>', "unsupported element foreignObject"),
    ('<path d="M0 0"><animate attributeName="d"/></path>', "animated"),
    ('<use href="other.svg#a"/>', "external reference"),
    ('<use xlink:href=" file:///etc/passwd"/>', "external reference"),
    ('<path fill="url(http://example.com/#a)"/>', "external reference"),
    ("<path fill=\"url( 'file:a#b' )\"/>", "external reference"),
    ('<path style="fill:URL(a.svg#b)"/>', "external reference"),
    ('<path style="fill:u\\72l(a.svg#b)"/>', "invalid reference"),
    ('<path style="fill:url(a.svg#b"/>', "invalid reference"),
    ('<!DOCTYPE svg [<!ENTITY a "aaaa">]><path d="&a;"/>', "unsupported XML"),
    ("<?xml-stylesheet href='a.css'?>", "unsupported XML"),
    ('<path d="&a;"/>', "invalid XML"),
    ("</svg><svg>", "invalid XML"),
    ("<path", "invalid XML"),
    ("\0", "invalid XML"),
    ('<g id="a"><use href="#a"/></g>', "circular reference"),
    ('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>', "circular reference"),
    ('<pattern id="a"><path fill="url(#a)"/></pattern>', "circular reference"),
    (laughs(9), "too many elements"),
    (PATH * 5001, "too many elements"),
    ("<g>" * 80 + "</g>" * 80, "deeply nested"),
    ("<g>" * 50_000 + "</g>" * 50_000, "large SVG"),
    (" " * 200_001, "large SVG"),
  ],
)
def test_unsafe_icons_are_rejected(body, reason):
  with pytest.raises(icon_svg.SvgError) as found:
    icon_svg.document(body, 32, 0, 0, 24, 24)
  assert found.value.reason == reason


@pytest.mark.parametrize(
  "box, reason",
  [
    ((0, 0, 0, 24), "invalid size"),
    ((0, 0, math.nan, 24), "invalid size"),
    ((0, math.inf, 24, 24), "invalid size"),
    ((0, 0, 1e9, 1e9), "invalid size"),
    ((0, 0, 24, -24), "invalid size"),
    ((0, 0, 100, 24), "elongated"),
  ],
)
def test_invalid_sizes_are_rejected(box, reason):
  with pytest.raises(icon_svg.SvgError) as found:
    icon_svg.document(PATH, 32, *box)
  assert found.value.reason == reason


def test_a_long_chain_of_references_is_rejected():
  chain = "".join(f'<g id="x{i}"><use href="#x{i + 1}"/></g>' for i in range(1000))
  with pytest.raises(icon_svg.SvgError, match="deeply nested"):
    icon_svg.document(chain, 32, 0, 0, 24, 24)
