"""Tests of rendering in a limited process."""

import io

import numpy as np
from PIL import Image
import pytest

from tools.data import icon_render, icon_svg


@pytest.fixture(scope="module")
def renderer():
  with icon_render.Renderer() as started:
    yield started


def svg(body, size=16):
  return icon_svg.document(body, size, 0, 0, 8, 8)


def test_a_square_covers_its_pixels(renderer):
  pixels = renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16)
  expected = np.full((16, 16, 3), 255)
  expected[4:12, 4:12] = 0
  np.testing.assert_array_equal(pixels, expected)
  colour = renderer.render(svg('<path fill="#0f0" d="M0 0h8v8H4z"/>'), 16)
  assert colour[0, -1].tolist() == [0, 255, 0]


def test_png_is_lossless_and_gray_if_possible(renderer):
  for body, mode in (('<path d="M2 1h4L2 7z"/>', "L"), ('<path fill="red" d="M2 1h4v6z"/>', "RGB")):
    pixels = renderer.render(svg(body), 16)
    with Image.open(io.BytesIO(icon_render.encode_png(pixels))) as image:
      assert image.mode == mode
      np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


@pytest.mark.parametrize(
  "body, reason",
  [
    ("", "blank"),
    ('<path fill="#fff" d="M0 0h8v8z"/>', "blank"),
    ('<path fill="#f9f9f9" d="M0 0h4v4z"/>', "blank"),
  ],
)
def test_blank_icons_are_rejected(renderer, body, reason):
  with pytest.raises(icon_svg.SvgError) as found:
    renderer.render(svg(body), 16)
  assert found.value.reason == reason


def test_an_invalid_document_does_not_end_the_process(renderer):
  with pytest.raises(icon_svg.SvgError, match="renderer failed: ValueError"):
    renderer.render("<svg", 16)
  assert renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16).min() == 0


def test_another_size_is_rejected(renderer):
  with pytest.raises(icon_svg.SvgError, match="renderer failed"):
    renderer.render(svg('<path d="M2 2h4v4H2z"/>', size=32), 16)


def test_a_slow_icon_is_stopped_and_the_next_one_is_rendered():
  groups = "".join(
    f'<g id="x{i + 1}">' + f'<use href="#x{i}"/>' * 10 + "</g>" for i in range(5)
  )  # 100,000 copies, which icon_svg rejects
  slow = f'<svg xmlns="http://www.w3.org/2000/svg"><g id="x0"><path d="M0 0h1z"/></g>{groups}</svg>'
  with icon_render.Renderer(seconds=0.1) as limited:
    with pytest.raises(icon_svg.SvgError) as found:
      limited.render(slow, 16)
    assert found.value.reason == "slow rendering"
  with icon_render.Renderer() as renderer:
    renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16)
    renderer._process.kill()
    with pytest.raises(icon_svg.SvgError, match="renderer failed: exit code -9"):
      renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16)
    assert renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16).min() == 0


def test_memory_is_limited():
  huge = svg('<path d="M2 2h4v4H2z"/>').replace(
    'width="16" height="16"', 'width="60000" height="60000"'
  )
  with icon_render.Renderer(seconds=60) as renderer:
    with pytest.raises(icon_svg.SvgError, match="renderer failed"):
      renderer.render(huge, 16)
    assert renderer.render(svg('<path d="M2 2h4v4H2z"/>'), 16).min() == 0
