"""Join the parts of an index into its final files."""

from collections.abc import Mapping, Sequence
import hashlib
import os
import pathlib
import shutil
from typing import Any

import numpy as np

import ov_data
from ov_data import fs
from ov_serve import index as files
from ov_serve import parts, search
from ov_serve.model import Model

_SUFFIXES = {"vectors": "npy", "records": "jsonl", "errors": "jsonl", "graph": "usearch"}


def merge(
  path: pathlib.Path,
  found: Sequence[pathlib.Path],
  model: Model,
  dataset: ov_data.Dataset,
  model_folder: str,
  recipe: str,
  graph: bool | None,
  threads: int,
) -> files.Info:
  """Write the files of an index, index.json last, and delete parts and files of earlier indexes.

  The files are named after their content, so an unchanged collection keeps its files.

  Args:
    path: folder of the index, which is locked.
    found: files of all parts, in order.
    model, dataset, model_folder, graph: see `ov_serve.embed`.
    recipe: see `parts.Parts`.
    threads: number of threads that build the graph.
  """
  digest = hashlib.sha256()
  sizes, errors = [], []
  for file in found:
    part = parts.read(file, model.dim)
    sizes.append(len(part.vectors))
    errors.append(part.errors)
    digest.update(hashlib.sha256(file.read_bytes()).digest())
  count = sum(sizes)
  has_graph = count > 0 and (count >= search.GRAPH_FROM if graph is None else graph)
  errors.append(_skips(dataset))
  digest.update(f"{recipe} {has_graph}".encode() + errors[-1])
  paths = {
    name: path / f"{name}-{digest.hexdigest()[:16]}.{suffix}" for name, suffix in _SUFFIXES.items()
  }
  if (path / files.INDEX).exists():
    info = files.read_info(path)
    if info.vectors.name == paths["vectors"].name:  # nothing changed; readers may map these files
      _delete_others(path, info)
      return info
  with fs.writing(str(path)), open(paths["records"], "wb") as records:
    paths["errors"].write_bytes(b"".join(errors))
    shape = (count, model.dim)
    vectors: Any = np.lib.format.open_memmap(paths["vectors"], "w+", np.float16, shape)
    row = 0
    for file, size in zip(found, sizes, strict=True):
      part = parts.read(file, model.dim)
      vectors[row : row + size] = part.vectors
      records.write(part.records)
      row += size
    vectors.flush()
  recall = None
  if has_graph:
    built = search.build_graph(vectors, threads=threads)
    built.save(str(paths["graph"]))
    recall = search.recall(built, vectors)
  bad = sum(parts.reasons(b"".join(errors)).values())
  info = _info(paths, model, dataset, model_folder, recipe, count, bad, recall)
  files.write_info(path, info)
  _delete_others(path, info)
  return info


def _skips(dataset: ov_data.Dataset) -> bytes:
  """Return the inputs without a record, one JSON object per line."""
  return parts.lines(
    parts.Failure(fs.printable(skip.key), skip.reason, skip.detail) for skip in dataset.skips
  )


def _info(
  paths: Mapping[str, pathlib.Path],
  model: Model,
  dataset: ov_data.Dataset,
  model_folder: str,
  recipe: str,
  count: int,
  bad: int,
  recall: float | None,
) -> files.Info:
  source = dataset.source
  return files.Info(
    format=files.FORMAT,
    count=count,
    dim=model.dim,
    bad=bad,
    model=files.ModelEntry(
      os.path.abspath(model_folder) if model_folder else "", model.fingerprint
    ),
    source=files.SourceEntry(
      path=[_absolute(path) for path in source.paths],
      split=source.split,
      image_key=source.image_key,
      caption_keys=[*source.caption_keys],
      image_root=source.image_root and _absolute(source.image_root),
      format=source.format,
      follow_links=source.follow_links,
    ),
    recipe=recipe,
    vectors=files.file_entry(paths["vectors"]),
    records=files.file_entry(paths["records"]),
    errors=files.file_entry(paths["errors"]),
    graph=None if recall is None else files.file_entry(paths["graph"]),
    recall_at_10=recall,
  )


def _absolute(path: str) -> str:
  return path if fs.is_remote(path) else os.path.abspath(path)


def _delete_others(path: pathlib.Path, info: files.Info) -> None:
  """Delete all parts, and files that index.json does not name."""
  for folder in path.glob(parts.FOLDERS):
    shutil.rmtree(folder)
  kept = files.files_of(info)
  for pattern in parts.INDEX_FILES:
    for file in path.glob(pattern):
      if file.name not in kept:
        file.unlink()
