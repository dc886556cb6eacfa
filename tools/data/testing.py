"""Test utilities for the converter."""

import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tarfile
import tempfile
from types import ModuleType

import numpy as np
from PIL import Image

from ov_data import example, layouts, sources, writer
from tools.data import convert, shards

Row = dict[str, example.Feature]


def jpeg(value: int = 0, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
  """Return an encoded image of random pixels with seed `value`."""
  rng = np.random.default_rng(value)
  buffer = io.BytesIO()
  pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
  Image.fromarray(pixels).save(buffer, format)
  return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
  """Write a file and create its parent folders."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def lines(*rows: object) -> str:
  """Return the rows as JSON lines."""
  return "".join(json.dumps(row) + "\n" for row in rows)


def tar(
  path: Path,
  members: dict[str, bytes | str] | list[tuple[str, bytes | str]],
  format: int = tarfile.PAX_FORMAT,
) -> Path:
  """Write a tar file; a list of members may repeat a name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=format) as file:
    for name, data in members if isinstance(members, list) else members.items():
      content = data if isinstance(data, bytes) else data.encode()
      header = tarfile.TarInfo(name)
      header.size = len(content)
      file.addfile(header, io.BytesIO(content))
  return path


def convert_listing(
  found: layouts.Listing,
  output: Path,
  options: shards.Options | None = None,
  *,
  holdout: float = 0.0,
  shard_bytes: int = 1 << 20,
) -> writer.Summary:
  """Run the conversion in this process."""
  with tempfile.TemporaryDirectory() as folder:
    plan = shards.plan(
      found, folder, options or shards.Options(), holdout=holdout, shard_bytes=shard_bytes, seed=0
    )
    recipe = {"digest": shards.digest(found)}
    return writer.write_dataset(output, plan.shards, plan, recipe, workers=0)


def read_rows(output: Path, split: str = "train") -> dict[str, Row]:
  """Return the examples of a split by key."""
  data = sources.Dataset(sources.Source(str(output), split))
  found = [data.features(i) for i in range(len(data))]
  return {row["key"][0].decode("utf-8", "surrogateescape"): row for row in found}


def skipped(output: Path) -> dict[str, str]:
  """Return the reasons of skipped.jsonl by key."""
  path = output / writer.SKIPPED
  if not path.exists():
    return {}
  found = [json.loads(line) for line in path.read_text().splitlines()]
  assert len({row["key"] for row in found}) == len(found)
  return {row["key"]: row["reason"] for row in found}


def run_app(*arguments: str, app: ModuleType = convert) -> subprocess.CompletedProcess[str]:
  """Run an app in a process."""
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-m", app.__name__, *arguments]
  return subprocess.run(
    command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=120
  )
