"""Takes a model that others wrote into a workdir, as a run of our own would have left it.

Training begins from it with `--config.init_from.path=WORKDIR`, `//apps:export --workdir=WORKDIR`
writes it for other libraries, and its metadata say where it came from and what was changed.
"""

import dataclasses
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from apps.exporter import places
from apps.exporter.formats.format import Format, ReadOptions
from apps.exporter.formats.table import IMPORTS
from apps.exporter.new_folder import new_folder
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.checkpoint_folder import check_path
from ov_convert.reading import inside
from ov_convert.release import Imported, Words, portable
import ov_data
import ov_models

_VOCABULARY = "vocab.txt"  # beside published checkpoints: a token a line


def import_model(
  spec: str,
  to_workdir: Path,
  *,
  image_size: int | None = None,
  num_heads: int | None = None,
  python: str | os.PathLike[str] | None = None,
) -> list[str]:
  """Reads a model and writes a workdir.

  The checkpoint, of step 0, holds {"params": ...} in the tree of the model. A tower alone lies
  under the name that both training apps give it, "encoder" or "text", so that `init_from` finds
  it; the model in the metadata is then the tower's.

  Args:
    spec: FORMAT:PATH, with a format of `IMPORTS`.
    to_workdir: made; must not exist, or be empty.
    image_size: pixels; for checkpoints of the published JAX code, which do not tell.
    num_heads: for the same, where sizes are not published and kernels are not split.
    python: interpreter with PyTorch, for files that only it reads; see `ov_convert.client_env`.

  Returns:
    Lines to print.

  Raises:
    ValueError, OSError: no such format, folder or model of ours, or a workdir that is not empty.
      Nothing is left behind.
  """
  chosen, path = _parse(spec)
  to_workdir = places.new("", str(to_workdir))
  check_path(to_workdir, "--to_workdir=")
  found = _read(chosen, path, ReadOptions(python, image_size, num_heads))
  origin = f"{chosen.name}:{path.resolve().name}"
  notes = write_workdir(to_workdir, found, origin, path)
  name = type(found.config).__name__.removesuffix("Config")
  return [
    f"imported {origin}: {name} of {ov_models.num_params(found.config):,} parameters",
    *(f"  note: {note}" for note in notes),
    f"train from it: --config.init_from.path={to_workdir}; export it: --workdir={to_workdir}",
  ]


def write_workdir(to_workdir: Path, found: Imported, origin: str, folder: Path) -> tuple[str, ...]:
  """Writes a model as a workdir of step 0; see `import_model`.

  Args:
    to_workdir: made, whole or not at all.
    found: the model.
    origin: where it comes from, for the metadata: no place of this machine.
    folder: what it was read from; may hold a vocabulary.

  Returns:
    The notes of the metadata.

  Raises:
    ValueError: parameters that do not fit the config, or texts that do not fit the model.
  """
  found = dataclasses.replace(found, config=portable(found.config))
  ov_models.bind(found.config, found.params)  # checks names and shapes
  with new_folder(to_workdir) as partial:
    fingerprint, more = _write_tokenizer(partial / "tokenizer", found, folder)
    # They go into model cards, which tell no places of this machine.
    notes = tuple(note.replace(f"{folder}/", "") for note in (*found.notes, *more))
    _write_checkpoint(partial / "checkpoints", found, origin, notes, fingerprint)
  return notes


def _parse(spec: str) -> tuple[Format, Path]:
  """The format and the folder."""
  kind, _, name = spec.partition(":")
  if kind not in IMPORTS or not name:
    raise ValueError(f"{spec!r} is no FORMAT:PATH; formats are {', '.join(IMPORTS)}")
  return IMPORTS[kind], places.existing(f"{kind}:", name)


def _read(chosen: Format, path: Path, options: ReadOptions) -> Imported:
  for name in ("image_size", "num_heads"):
    value = getattr(options, name)
    if value and name not in chosen.reads:
      takers = ", ".join(f.name for f in IMPORTS.values() if name in f.reads)
      raise ValueError(
        f"{name}={value} is for {takers}: folders of {chosen.name} tell it themselves; leave it out"
      )
  assert chosen.read is not None  # as for all of IMPORTS
  return chosen.read(path, options)


def _write_tokenizer(
  folder: Path, found: Imported, source: Path
) -> tuple[str | None, tuple[str, ...]]:
  """Writes the texts of a model as training does; its fingerprint, and what could not be kept."""
  text = _text_tower(found.config)
  decoder = getattr(found.config, "decoder", None)
  if text is None and decoder is None:
    return None, ()
  if found.words is None and not (source / _VOCABULARY).exists():
    return None, (
      f"it came without a tokenizer: import it from a folder with its {_VOCABULARY}, or train with "
      "--config.tokenizer.path set to that file",
    )
  try:
    if words := found.words:
      tokenizer, length, append_cls = _tokenizer(words), words.length, words.append_cls
    else:
      tokenizer = ov_data.Tokenizer.from_vocab(inside(source, _VOCABULARY))
      length, append_cls = text.max_len if text else 0, True
    for part in (text, decoder):
      if part is not None:
        tokenizer.check_fits(part.vocab_size)
    if text is None:
      tokenizer.save(folder)
    else:
      processor = ov_data.TextProcessor(tokenizer, length, append_cls, text.pool, text.padding)
      processor.save(folder)
  except ValueError as error:
    shutil.rmtree(folder, ignore_errors=True)
    return None, (f"its tokenizer is left out: {error}",)
  return tokenizer.fingerprint, ()


def _tokenizer(words: Words) -> ov_data.Tokenizer:
  """The tokenizer, with the ids that the model knows; ValueError where ours would give others."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tokenizer.json"
    file.write_text(words.tokenizer_json, "utf-8")
    try:
      tokenizer = ov_data.Tokenizer.from_file(file)
    except ValueError as error:
      raise ValueError(str(error).replace(str(file), file.name)) from None
  roles = ["pad_id", "bos_id", "eos_id"] + ["cls_id"] * words.append_cls
  if differing := [r for r in roles if getattr(tokenizer, r) != getattr(words, r)]:
    raise ValueError(
      "the model was trained with "
      + ", ".join(f"{role} {getattr(words, role)}" for role in differing)
      + "; by their names the tokens of the vocabulary would be "
      + ", ".join(f"{role} {getattr(tokenizer, role)}" for role in differing)
    )
  return tokenizer


def _write_checkpoint(
  folder: Path, found: Imported, origin: str, notes: tuple[str, ...], fingerprint: str | None
) -> None:
  params = found.params
  if isinstance(found.config, ov_models.ViTConfig):
    params = {"encoder": params}
  elif isinstance(found.config, ov_models.TextConfig):
    params = {"text": params}
  metadata: dict[str, Any] = {
    "stage": "import",
    "config": None,  # of a run
    "model": ov_models.config_to_dict(found.config),
    "imported": {"from": origin, "notes": list(notes)},
    "preprocess": dataclasses.asdict(found.preprocess) if found.preprocess else None,
  }
  if fingerprint:
    metadata["tokenizer"] = fingerprint
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(0, {"params": params}, metadata)


def _text_tower(config: Any) -> ov_models.TextConfig | None:
  return config if isinstance(config, ov_models.TextConfig) else getattr(config, "text", None)
