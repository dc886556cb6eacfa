"""A conversion killed before any of its file changes gives the same files when repeated.

A kill leaves the current files on disk. An audit hook therefore copies the output of one conversion
before each file change, and the test repeats the command in each copy.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
from pathlib import Path
import shutil
import sys
from typing import Any

from absl import flags
from absl.testing import flagsaver
import pytest

from ov_data import outputs, unfinished
from tools.data import convert
from tools.data.testing import jpeg, write

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_recorders: list[Callable[[str, tuple[Any, ...]], None]] = []  # audit hooks cannot be removed


def _hook(event: str, args: tuple[Any, ...]) -> None:
  for recorder in _recorders:
    recorder(event, args)


class _Recorder:
  """Recorder that copies `output` to numbered folders in `copies` before each file change.

  Attributes:
    changes: file changes in the order of the copies.
  """

  def __init__(self, output: Path, copies: Path):
    self.changes: list[str] = []
    self._output, self._copies = output, copies
    self._busy = False

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    if self._busy or not (
      event in _CHANGES or event == "open" and isinstance(args[2], int) and args[2] & _WRITES
    ):
      return
    if not isinstance(args[0], str | os.PathLike):
      return
    path = Path(args[0])  # shutil.rmtree passes names relative to an open folder
    if path.is_absolute() and not path.is_relative_to(self._output):
      return
    self._busy = True
    try:
      self._copy(f"{event} {path.name}")
      if event == "open" and not path.exists() and path.parent.is_dir():
        (self._copy(f"write {path.name}") / path.relative_to(self._output)).touch()
      if event == "os.rename":
        part = self._copy(f"half of {path.name}") / path.relative_to(self._output)
        os.truncate(part, part.stat().st_size // 2)
    finally:
      self._busy = False

  def _copy(self, change: str) -> Path:
    copy = self._copies / f"{len(self.changes):03d}"
    self.changes.append(change)
    if self._output.exists():
      shutil.copytree(self._output, copy, symlinks=True)
    return copy


@contextlib.contextmanager
def _recorded(output: Path, copies: Path) -> Iterator[_Recorder]:
  _install_hook()
  recorder = _Recorder(output, copies)
  _recorders.append(recorder)
  try:
    yield recorder
  finally:
    _recorders.remove(recorder)


@functools.cache
def _install_hook() -> None:
  sys.addaudithook(_hook)


def _convert(source: Path, output: Path, **values: object) -> None:
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["convert"])
  with flagsaver.flagsaver(shard_mb=1, workers=0, **values):
    convert.convert(str(source), output)


def _files(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Images for three shards, including a broken one and one without a class."""
  folder = tmp_path_factory.mktemp("source")
  for number in range(8):
    image = jpeg(number, (300, 300), "PNG")
    write(folder / "in" / ("cat" if number % 2 else "dog") / f"{number}.png", image)
  write(folder / "in/cat/broken.jpg", "broken")
  write(folder / "in/stray.jpg", jpeg(9))
  return folder / "in"


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
def test_a_killed_conversion_resumes_to_the_same_files(
  tmp_path: Path, source: Path, replaces: bool, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))
  output, copies = tmp_path / "out", tmp_path / "copies"
  values: dict[str, object] = {"format": "classes"}
  if replaces:
    _convert(source, output, max_side=64, **values)
    values["overwrite"] = True
  copies.mkdir()
  with _recorded(output, copies) as recorder:
    _convert(source, output, **values)
  expected = _files(output)
  assert len([name for name in expected if name.endswith(".tfrecord")]) == 3
  assert {"classes.txt", "skipped.jsonl", "dataset.json"} <= expected.keys()
  assert len(recorder.changes) > 60
  for number, change in enumerate(recorder.changes):
    copy = copies / f"{number:03d}"
    _convert(source, copy, **values)
    assert _files(copy) == expected, f"killed before change {number}: {change}"
    assert not (copy / unfinished.FOLDER).exists() and not (copy / outputs.LOCK).exists()
