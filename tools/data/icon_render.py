"""Rendering of checked SVG documents to PNG, in a process with limits on time and memory.

resvg is native code that a Python thread cannot interrupt. A `Renderer` therefore owns a process
that renders one document at a time. If it takes too long or ends, only that icon is lost.
"""

import io
import os
import resource
import select
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import IO

import numpy as np
from PIL import Image

from tools.data.icon_svg import SvgError

SECONDS = 5.0  # limit for one icon
_MEMORY_BYTES = 2 << 30
_MAX_PNG_BYTES = 1 << 20
_HEADER = struct.Struct("<cI")  # status, length of the body
_DONE, _FAILED = b"d", b"f"
_MIN_CONTRAST = 16  # of 255; a drawing with less is blank


class Renderer:
  """Renders SVG documents in a separate process, which is started when needed.

  Args:
    seconds: time limit for one document.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds = seconds
    self._process: subprocess.Popen[bytes] | None = None

  def __enter__(self) -> "Renderer":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._stop()

  def render(self, svg: str, image_size: int) -> np.ndarray:
    """Render a document on a white background.

    Args:
      svg: document whose width and height are `image_size`.
      image_size: pixels per side.

    Returns:
      uint8 [image_size, image_size, 3].

    Raises:
      SvgError: if the document cannot be rendered, takes too long, or shows nothing.
    """
    process = self._running()
    assert process.stdin and process.stdout
    data = svg.encode()
    limit = time.monotonic() + self._seconds
    try:
      process.stdin.write(_HEADER.pack(_DONE, len(data)) + data)
      process.stdin.flush()
      status, size = _HEADER.unpack(_read(process.stdout, _HEADER.size, limit))
      if size > _MAX_PNG_BYTES:
        raise EOFError
      answer = _read(process.stdout, size, limit)
    except TimeoutError:
      self._stop()
      raise SvgError("slow rendering", f"more than {self._seconds:g} s") from None
    except (EOFError, BrokenPipeError):
      code = process.wait()
      self._stop()
      raise SvgError("renderer failed", f"exit code {code}") from None
    if status == _FAILED:
      raise SvgError("renderer failed", answer.decode(errors="replace")[:200])
    return _pixels(answer, image_size)

  def _running(self) -> subprocess.Popen[bytes]:
    if self._process is None:
      self._process = subprocess.Popen(
        [sys.executable, "-c", "from tools.data import icon_render; icon_render.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
      )
      # The time limit does not include the start of the process.
      assert self._process.stdout
      _read(self._process.stdout, _HEADER.size, time.monotonic() + 60)
    return self._process

  def _stop(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None


def encode_png(pixels: np.ndarray) -> bytes:
  """Encode uint8 [H, W, 3] as PNG, as grayscale if all channels are equal."""
  gray = (pixels == pixels[..., :1]).all()
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if gray else pixels).save(buffer, "PNG", compress_level=9)
  return buffer.getvalue()


def serve() -> None:
  """Render documents from stdin until it is closed; the main function of the process."""
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  import resvg_py

  inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # keep printed output out of the answers
  outbox.write(_HEADER.pack(_DONE, 0))
  outbox.flush()
  while header := inbox.read(_HEADER.size):
    svg = inbox.read(_HEADER.unpack(header)[1]).decode()
    try:
      status = _DONE
      answer = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
      )
    except MemoryError:
      raise
    except BaseException as error:  # a panic of Rust is not an Exception
      status, answer = _FAILED, f"{type(error).__name__}: {error}".encode()[:1000]
    outbox.write(_HEADER.pack(status, len(answer)) + answer)
    outbox.flush()


def _read(pipe: IO[bytes], size: int, limit: float) -> bytes:
  """Read `size` bytes; raise TimeoutError at the time `limit`, EOFError if the process ended."""
  data = b""
  while len(data) < size:
    if not select.select([pipe], [], [], max(limit - time.monotonic(), 0))[0]:
      raise TimeoutError
    part = os.read(pipe.fileno(), size - len(data))
    if not part:
      raise EOFError
    data += part
  return data


def _pixels(png: bytes, image_size: int) -> np.ndarray:
  with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
    if image.size != (image_size, image_size):
      raise SvgError("renderer failed", f"{image.size} pixels")
    pixels = np.asarray(image.convert("RGB"))
  if int(pixels.max()) - int(pixels.min()) < _MIN_CONTRAST:
    raise SvgError("blank")
  return pixels
