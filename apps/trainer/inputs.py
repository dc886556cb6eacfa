"""Data sources, tokenizer and loaders of a run, built from its configuration."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from etils import epath
import jax
import numpy as np

from apps.trainer.progress import Terminal
from apps.trainer.run_config import RunConfig
from apps.trainer.task import Task
from apps.trainer.workdir import Workdir, open_workdir
import ov_data
from ov_data import recaptions
import ov_sharding

_TOKENIZER_RECORDS = 200_000  # maximum number of records for training a tokenizer


def training_sources(config: RunConfig) -> list[ov_data.Source]:
  """Return the sources of `config.input`; raise ValueError unless exactly one setting is used."""
  inputs = config.input
  texts = (*inputs.alt_keys, *inputs.caption_keys)  # training texts of a new tokenizer
  shared: dict[str, Any] = {
    "image_key": inputs.image_key,
    "caption_keys": tuple(dict.fromkeys(texts)),
  }
  if inputs.data_dir and inputs.sources:
    raise ValueError("config.input.data_dir and config.input.sources are both set; use one")
  for name in ("keep_list", "recaptions"):
    if inputs.sources and (value := getattr(inputs, name)):
      raise ValueError(
        f"config.input.{name}={value} is for config.input.data_dir; give each entry of "
        f"config.input.sources its own {name!r}"
      )
  if inputs.sources:
    return [ov_data.Source(**{**shared, **_expand_home(source)}) for source in inputs.sources]
  if not inputs.data_dir:
    raise ValueError(
      "no training data: set --config.input.data_dir to a folder of shards, a glob, a TFDS "
      "directory, or a split file such as dataset_coco.json (local, gs:// or s3://)"
    )
  path = os.path.expanduser(inputs.data_dir)
  keep_list = os.path.expanduser(inputs.keep_list) or None
  shared["recaptions"] = os.path.expanduser(inputs.recaptions) or None
  return [ov_data.Source(path, split=inputs.split or None, keep_list=keep_list, **shared)]


def train_loader(
  config: RunConfig,
  task: Task,
  tokenizer: ov_data.Tokenizer,
  mesh: jax.sharding.Mesh,
  stage_index: int,
) -> ov_data.Loader:
  """Return an endless loader of the rows of this process; each stage shuffles differently."""
  inputs = config.input
  check_batch_size(config, mesh)
  return ov_data.Loader(
    training_sources(config),
    batch_size=config.batch_size,
    rows=ov_sharding.process_rows(mesh, config.batch_size),
    tokenizer=tokenizer,
    seed=config.seed + stage_index,
    shuffle=inputs.shuffle,
    lanes=inputs.lanes,
    fit=inputs.fit,
    crop=ov_data.Crop(area=(inputs.area_min, 1.0)),
    max_bad_fraction=inputs.max_bad_fraction,
    threads=inputs.num_threads or None,
    **task.loader_options,
  )


def check_batch_size(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
  """Raise ValueError unless the devices and micro-batches divide `config.batch_size`."""
  _check_divides("batch_size", config.batch_size, mesh, config.accumulate)


def eval_loader(
  config: RunConfig,
  task: Task,
  tokenizer: ov_data.Tokenizer,
  mesh: jax.sharding.Mesh,
  path: str,
  split: str,
  *,
  batch_size: int,
  examples: int,
  extra_keys: Sequence[str] = (),
  image_key: str = "",
  image_root: str = "",
  caption_keys: Sequence[str] | None = None,
  texts: Mapping[str, ov_data.TextSpec] | None = None,
  captions: Literal["first", "all"] = "first",
  format: str = "auto",
) -> ov_data.Loader:
  """Return a loader for one pass over held-out examples without crops, for this process.

  Args:
    config: configuration of the stage; sets how images are fitted and how many may be invalid.
    task: task that gives the sizes and texts.
    tokenizer: tokenizer of the run.
    mesh: mesh of the run; its size must divide `batch_size`.
    path: path of the data, as in `config.input.data_dir`.
    split: TFDS split, "" for plain shards.
    batch_size: number of rows of a global batch.
    examples: maximum number of examples; 0 takes all.
    extra_keys: further features to deliver.
    image_key: feature of the image; "" takes that of the training data.
    image_root: folder of the images of a Karpathy JSON.
    caption_keys: features of the captions; None takes those of the training data. The feature
      "recaption", which held-out data lacks, is replaced by the other keys, or by `input.alt_keys`.
    texts: text specs; None takes `task.text_specs`, {} delivers no texts.
    captions: "all" also delivers every text of `caption_keys`, see `Loader`.
    format: format of the data, see `ov_data.Source`.

  Raises:
    ValueError: the data do not exist or do not match their description, or the batch size does not
      divide.
  """
  inputs = config.input
  _check_divides("eval.batch_size", batch_size, mesh, 1)
  if examples:
    split = f"{split}[:{examples}]"
  folder: dict[str, Any] = {"image_root": os.path.expanduser(image_root)} if image_root else {}
  source = ov_data.Source(
    os.path.expanduser(path),
    split=split or None,
    image_key=image_key or inputs.image_key,
    caption_keys=_held_out_keys(
      inputs.caption_keys if caption_keys is None else caption_keys, inputs.alt_keys
    ),
    format=format,
    **folder,
  )
  options = task.loader_options | ({} if texts is None else {"texts": texts})
  specs: Mapping[str, ov_data.TextSpec] = options.get("texts") or {}
  for name, spec in specs.items():
    keys = _held_out_keys(spec.keys, inputs.alt_keys)
    specs = {**specs, name: dataclasses.replace(spec, keys=keys)}
  return ov_data.Loader.evaluation(
    source,
    fit="squash" if inputs.fit == "squash" else "center",
    batch_size=batch_size,
    rows=ov_sharding.process_rows(mesh, batch_size),
    tokenizer=tokenizer,
    extra_keys=tuple(extra_keys),
    max_bad_fraction=inputs.max_bad_fraction,
    threads=inputs.num_threads or None,
    captions=captions,
    **options | ({"texts": specs} if specs else {}),
  )


def _held_out_keys(keys: Sequence[str], alt_keys: Sequence[str]) -> tuple[str, ...]:
  """Return features of texts of held-out data, which has no new captions of the training data."""
  if recaptions.FEATURE not in keys:
    return tuple(keys)
  if not (found := tuple(key for key in keys if key != recaptions.FEATURE) or tuple(alt_keys)):
    raise ValueError(
      f"held-out data has no feature {recaptions.FEATURE!r}, and config.input.alt_keys=(); name "
      "its captions there, such as ('txt',), or add them to config.input.caption_keys"
    )
  return found


def open_tokenizer(config: RunConfig, workdir: Workdir, terminal: Terminal) -> ov_data.Tokenizer:
  """Return the tokenizer in workdir/tokenizer; process 0 creates it if missing.

  An evaluation of another run's parameters (eval_only, init_from.path) uses that run's tokenizer.

  Raises:
    ValueError: the tokenizer of the workdir differs from `config.tokenizer.path`, or it is
      incomplete although the run has checkpoints.
  """
  folder, path = workdir.path / "tokenizer", os.path.expanduser(config.tokenizer.path)
  given = read_tokenizer(path) if path else None
  run = config.ft_from or config.init_from.path
  if not path and config.eval_only and run:
    given, path = _tokenizer_of(run), f"{run}/tokenizer"
  if not ov_data.Tokenizer.is_complete(folder) and jax.process_index() == 0:
    if folder.exists():
      _move_incomplete_aside(folder, config.checkpoint.dir or workdir.checkpoints, terminal)
    if given is None:
      terminal.phase(
        f"training a tokenizer of at most {config.tokenizer.train_vocab_size:,} entries"
      )
      given = ov_data.Tokenizer.train(
        _captions(config),
        config.tokenizer.train_vocab_size,
        kind=config.tokenizer.train_kind,
        strip_accents=config.tokenizer.train_strip_accents,
      )
    given.save(folder)
  workdir.share("tokenizer saved")
  tokenizer = ov_data.Tokenizer.load(folder)
  if given is not None and given.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f"{workdir.uri}/tokenizer holds another tokenizer than config.tokenizer.path={path}; "
      "params and tokenizer belong together: choose another --workdir, or leave "
      "config.tokenizer.path empty"
    )
  return tokenizer


def check_text_processor(
  workdir: Workdir, processors: Sequence[ov_data.TextProcessor | None]
) -> None:
  """Check that the text processor in the workdir is that of one of the stages, `processors`.

  Raises:
    ValueError: the parameters in the workdir were trained with another text processor.
  """
  expected = {processor.fingerprint: processor for processor in processors if processor is not None}
  saved = _saved_processor(workdir)
  if saved is not None and expected and saved.fingerprint not in expected:
    raise ValueError(
      f"{workdir.uri}/tokenizer belongs to texts of {_describe_processor(saved)}, but the "
      f"configuration requires {' or '.join(map(_describe_processor, expected.values()))}; params "
      "and texts belong together: keep config.model.token_len and the text tower's options, or "
      "choose another --workdir"
    )


def save_text_processor(
  workdir: Workdir, processor: ov_data.TextProcessor | None, *, replace: bool
) -> None:
  """Save the text processor of a stage next to the tokenizer, for evaluation and export.

  Args:
    workdir: workdir of the run.
    processor: text processor of the stage; None changes nothing.
    replace: overwrite the text processor of an earlier stage; see `check_text_processor`.
  """
  if processor is None:
    return
  if jax.process_index() == 0:
    saved = _saved_processor(workdir)
    if saved is None or (replace and saved.fingerprint != processor.fingerprint):
      processor.save(workdir.path / "tokenizer")
  workdir.share("text processor saved")


def describe(loader: ov_data.Loader) -> dict[str, Any]:
  """Return facts about the data of a loader for the report."""
  facts: dict[str, Any] = {
    "records": loader.num_examples,
    "examples read": loader.position,
    "epochs": ", ".join(f"{epochs:.2f}" for epochs in loader.epochs),
    "fingerprint": loader.fingerprint,
  }
  if shards := sum(len(dataset.indexes) for dataset in loader.datasets):
    facts["shards"] = shards
  for reason, count in loader.damaged.items():
    facts[f"left out: {reason}"] = count
  for reason, count in loader.dropped.items():
    facts[f"dropped by the keep-list: {reason}"] = count
  return facts


def _expand_home(source: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a source with ~ expanded in its paths."""
  paths = ("path", "image_root", "keep_list", "recaptions")
  names = [key for key in paths if isinstance(source.get(key), str)]
  return {**source, **{key: os.path.expanduser(source[key]) for key in names}}


def _saved_processor(workdir: Workdir) -> ov_data.TextProcessor | None:
  try:
    return ov_data.TextProcessor.load(workdir.path / "tokenizer")
  except FileNotFoundError:
    return None


def _describe_processor(processor: ov_data.TextProcessor) -> str:
  return (
    f"{processor.length} tokens, pool {processor.pool}, padding {processor.padding}, "
    f"vocabulary {processor.tokenizer.fingerprint}"
  )


def _move_incomplete_aside(folder: Path, checkpoints: str, terminal: Terminal) -> None:
  """Rename the folder of an incompletely saved tokenizer, so that it is recreated.

  Raises:
    ValueError: the run has checkpoints, so their tokenizer was once complete.
  """
  saved = epath.Path(checkpoints).expanduser()
  if saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir()):
    raise ValueError(
      f"{folder} is incomplete, but the checkpoints in {saved} need its tokenizer; copy the folder "
      "back, remove it to train the same tokenizer again from the same captions, or choose another "
      "--workdir"
    )
  if not any(folder.iterdir()):
    folder.rmdir()
    return
  number = 0
  while (aside := folder.with_name(f"{folder.name}.incomplete-{number}")).exists():
    number += 1
  folder.rename(aside)
  terminal.phase(f"{folder} was not saved completely: moved to {aside.name} and recreated")


def _tokenizer_of(run: str) -> ov_data.Tokenizer | None:
  """Return the tokenizer of another run's workdir; None if there is none."""
  with open_workdir(run, writable=False) as other:
    folder = other.path / "tokenizer"
    return ov_data.Tokenizer.load(folder) if folder.is_dir() else None


def read_tokenizer(path: str) -> ov_data.Tokenizer:
  """Read a vocabulary, a tokenizer.json or a saved tokenizer; raise ValueError if it is missing."""
  if not os.path.exists(path):
    raise ValueError(
      f"config.tokenizer.path={path}: the path does not exist; give a vocabulary (one "
      "token per line), a tokenizer.json or a saved tokenizer, or leave it empty to train "
      "one on captions"
    )
  if os.path.isdir(path):
    return ov_data.Tokenizer.load(path)
  if path.endswith(".json"):
    return ov_data.Tokenizer.from_file(path)
  return ov_data.Tokenizer.from_vocab(path)


def _captions(config: RunConfig) -> Iterator[str]:
  """Yield captions of evenly spaced training records."""
  for source in training_sources(config):
    dataset = ov_data.Dataset(source)
    dataset.check_keys()
    count = min(len(dataset), _TOKENIZER_RECORDS)
    for record in np.linspace(0, len(dataset) - 1, count).astype(int):
      try:
        features = dataset.features(int(record), source.caption_keys)
      except ValueError:  # an invalid record; the loader counts it during training
        continue
      for key in source.caption_keys:
        for text in features.get(key, ()):
          if isinstance(text, bytes):
            yield text.decode("utf-8", "replace")


def _check_divides(name: str, size: int, mesh: jax.sharding.Mesh, accumulate: int) -> None:
  unit = mesh.size * accumulate
  if size % unit:
    raise ValueError(
      f"config.{name}={size} is not a multiple of {unit} = {mesh.size} devices"
      + (f" x accumulate {accumulate}" if accumulate > 1 else "")
      + f"; the next size that is: {-(-size // unit) * unit}"
    )
