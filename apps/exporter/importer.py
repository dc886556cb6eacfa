"""Import models of other libraries into a workdir.

Fine-tune the model with `--config.init_from.path=WORKDIR`, or export it with `//apps:export
--workdir=WORKDIR`. The metadata state the origin of the model and what was changed.
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
from ov_convert import provenance
from ov_convert.reading import inside
from ov_convert.release import Imported, TokenizerSpec, option_problems, portable
import ov_data
import ov_models

_VOCABULARY = "vocab.txt"  # stored with published checkpoints, one token per line


def import_model(
  spec: str,
  to_workdir: Path,
  *,
  image_size: int | None = None,
  num_heads: int | None = None,
  python: str | os.PathLike[str] | None = None,
) -> list[str]:
  """Read a model and write a workdir.

  The checkpoint of step 0 contains {"params": ...} in the tree of the model. A single tower is
  stored under its name in training, "encoder" or "text", so that `init_from` finds it; the model in
  the metadata is that of the tower.

  Args:
    spec: FORMAT:PATH, with a format in `IMPORTS`.
    to_workdir: output folder; must not exist or be empty.
    image_size: image size, for checkpoints of the published JAX code, which do not state it.
    num_heads: number of heads, for such checkpoints with unpublished sizes and 2-D kernels.
    python: interpreter with PyTorch, for PyTorch files; see `ov_convert.client_env`.

  Returns:
    Lines to print.

  Raises:
    ValueError, OSError: if the format or folder does not exist, the model is incompatible, or the
      workdir is not empty. No workdir is created then.
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
  """Write a model as a workdir of step 0; see `import_model`.

  Args:
    to_workdir: output folder, created atomically.
    found: imported model.
    origin: origin of the model for the metadata, without local paths.
    folder: folder of the model, which may contain a vocabulary.

  Returns:
    The notes of the metadata.

  Raises:
    ValueError: if the parameters do not match the config.
  """
  found = dataclasses.replace(found, config=portable(found.config))
  ov_models.bind(found.config, found.params)  # checks names and shapes
  with new_folder(to_workdir) as partial:
    fingerprint, more = _write_tokenizer(partial / "tokenizer", found, folder)
    # Notes are shown in model cards, which must not contain local paths.
    notes = tuple(note.replace(f"{folder}/", "") for note in (*found.notes, *more))
    about = {"from": origin, "notes": list(notes)} | provenance.read(folder)
    _write_checkpoint(partial / "checkpoints", found, about, fingerprint)
  return notes


def _parse(spec: str) -> tuple[Format, Path]:
  """Return the format and the folder of FORMAT:PATH."""
  kind, _, name = spec.partition(":")
  if kind not in IMPORTS or not name:
    raise ValueError(f"{spec!r} is not FORMAT:PATH; formats are {', '.join(IMPORTS)}")
  return IMPORTS[kind], places.existing(f"{kind}:", name)


def _read(chosen: Format, path: Path, options: ReadOptions) -> Imported:
  for name in ("image_size", "num_heads"):
    value = getattr(options, name)
    if value and name not in chosen.reads:
      takers = ", ".join(f.name for f in IMPORTS.values() if name in f.reads)
      raise ValueError(
        f"{name}={value} applies only to {takers}; folders of {chosen.name} contain it. Omit {name}"
      )
  assert chosen.read is not None  # true for all of IMPORTS
  return chosen.read(path, options)


def _write_tokenizer(
  folder: Path, found: Imported, source: Path
) -> tuple[str | None, tuple[str, ...]]:
  """Write the tokenizer as training does; return its fingerprint and notes on what was omitted."""
  text = _text_tower(found.config)
  decoder = getattr(found.config, "decoder", None)
  if text is None and decoder is None:
    return None, ()
  if found.words is None and not (source / _VOCABULARY).exists():
    return None, (
      f"the model has no tokenizer: import it from a folder with its {_VOCABULARY}, or train with "
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
      # Other families do not remove the punctuation of prompts.
      canonical = not option_problems(found.config)
      processor = ov_data.TextProcessor(
        tokenizer, length, append_cls, text.pool, text.padding, canonical
      )
      processor.save(folder)
  except ValueError as error:
    shutil.rmtree(folder, ignore_errors=True)
    return None, (f"its tokenizer is not imported: {error}",)
  return tokenizer.fingerprint, ()


def _tokenizer(words: TokenizerSpec) -> ov_data.Tokenizer:
  """Return the ov_data tokenizer; raise ValueError if its special ids differ from the model's."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tokenizer.json"
    file.write_text(words.tokenizer_json, "utf-8")
    try:
      tokenizer = ov_data.Tokenizer.from_file(file, special=_special(words))
    except ValueError as error:
      raise ValueError(str(error).replace(str(file), file.name)) from None
  roles = ["pad_id", "bos_id", "eos_id"] + ["cls_id"] * words.append_cls
  if differing := [r for r in roles if getattr(tokenizer, r) != getattr(words, r)]:
    raise ValueError(
      "the model was trained with "
      + ", ".join(f"{role} {getattr(words, role)}" for role in differing)
      + "; the vocabulary assigns by name "
      + ", ".join(f"{role} {getattr(tokenizer, role)}" for role in differing)
    )
  return tokenizer


def _special(words: TokenizerSpec) -> dict[str, str] | None:
  """Return the special tokens of texts without [bos] by role; None for usual names."""
  if words.bos_id is not None:
    return None
  ids = {"pad": words.pad_id, "eos": words.eos_id, "unk": words.unk_id}
  return {role: token for role, number in ids.items() if (token := words.token(number)) is not None}


def _write_checkpoint(
  folder: Path, found: Imported, about: dict[str, Any], fingerprint: str | None
) -> None:
  params = found.params
  if isinstance(found.config, ov_models.ViTConfig):
    params = {"encoder": params}
  elif isinstance(found.config, ov_models.TextConfig):
    params = {"text": params}
  metadata: dict[str, Any] = {
    "stage": "import",
    "config": None,  # only runs have one
    "model": ov_models.config_to_dict(found.config),
    "imported": about,
    "preprocess": dataclasses.asdict(found.preprocess) if found.preprocess else None,
  }
  if fingerprint:
    metadata["tokenizer"] = fingerprint
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(0, {"params": params}, metadata)


def _text_tower(config: Any) -> ov_models.TextConfig | None:
  return config if isinstance(config, ov_models.TextConfig) else getattr(config, "text", None)
