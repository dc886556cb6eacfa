"""The data side of a run, from its configuration: sources, tokenizer, loaders."""

from collections.abc import Iterator, Mapping, Sequence
import os
from pathlib import Path
from typing import Any, Literal

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from apps.trainer.progress import Terminal
from apps.trainer.task import Task
from apps.trainer.workdir import Workdir, open_workdir
import ov_data
import ov_sharding

_TOKENIZER_RECORDS = 200_000  # at most so many records teach a new tokenizer


def training_sources(config: ConfigDict) -> list[ov_data.Source]:
  """The sources of `config.input`; ValueError unless exactly one way of naming them is used."""
  inputs = config.input
  texts = (*inputs.get("alt_keys", ()), *inputs.caption_keys)  # what a new tokenizer learns from
  shared = {"image_key": inputs.image_key, "caption_keys": tuple(dict.fromkeys(texts))}
  if inputs.data_dir and inputs.sources:
    raise ValueError("config.input.data_dir and config.input.sources are both set; use one")
  if inputs.sources:
    return [ov_data.Source(**{**shared, **_at_home(source)}) for source in inputs.sources]
  if not inputs.data_dir:
    raise ValueError(
      "no training data: set --config.input.data_dir to a folder of record shards, a glob, a TFDS "
      "directory, or a split file such as dataset_coco.json (local or gs://)"
    )
  path = os.path.expanduser(inputs.data_dir)
  return [ov_data.Source(path, split=inputs.split or None, **shared)]


def train_loader(
  config: ConfigDict,
  task: Task,
  tokenizer: ov_data.Tokenizer,
  mesh: jax.sharding.Mesh,
  stage_index: int,
) -> ov_data.Loader:
  """Endless batches for the rows of this process; every stage shuffles differently."""
  inputs = config.input
  check_batch_size(config, mesh)
  return ov_data.Loader(
    training_sources(config),
    image_size=task.image_size,
    batch_size=config.batch_size,
    rows=ov_sharding.process_rows(mesh, config.batch_size),
    tokenizer=tokenizer,
    text_len=task.text_len,
    seed=config.seed + stage_index,
    shuffle=inputs.shuffle,
    lanes=inputs.lanes,
    fit=inputs.fit,
    crop=ov_data.Crop(area=(inputs.area_min, 1.0)),
    max_bad_fraction=inputs.max_bad_fraction,
    threads=inputs.num_threads or None,
    **_texts(task.text_specs),
  )


def check_batch_size(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raise ValueError unless the devices and micro-batches divide `config.batch_size`."""
  _check_divides("batch_size", config.batch_size, mesh, config.accumulate)


def eval_loader(
  config: ConfigDict,
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
) -> ov_data.Loader:
  """One pass over held-out examples, whole pictures, for the rows of this process.

  Args:
    config: of the stage; says how pictures are fitted and how many may be broken.
    task: whose sizes and texts are taken.
    tokenizer: of the run.
    mesh: its size must divide `batch_size`.
    path: as `config.input.data_dir`.
    split: TFDS split, "" for plain shards.
    batch_size: rows of a global batch.
    examples: only the first so many; 0 takes all.
    extra_keys: further features to deliver.
    image_key: "" takes that of the training data.
    image_root: folder of the pictures that a Karpathy JSON names.
    caption_keys: None takes those of the training data.
    texts: None takes `task.text_specs`; {} makes none, for pictures without texts.
    captions: "all" also delivers every text under `caption_keys`, see `Loader`.

  Raises:
    ValueError: the data are not there or not as described, or the batch size does not divide.
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
    caption_keys=tuple(inputs.caption_keys if caption_keys is None else caption_keys),
    **folder,
  )
  return ov_data.Loader.evaluation(
    source,
    fit="squash" if inputs.fit == "squash" else "center",
    image_size=task.image_size,
    batch_size=batch_size,
    rows=ov_sharding.process_rows(mesh, batch_size),
    tokenizer=tokenizer,
    text_len=task.text_len,
    extra_keys=tuple(extra_keys),
    max_bad_fraction=inputs.max_bad_fraction,
    threads=inputs.num_threads or None,
    captions=captions,
    **_texts(task.text_specs if texts is None else texts),
  )


def open_tokenizer(config: ConfigDict, workdir: Workdir, terminal: Terminal) -> ov_data.Tokenizer:
  """The tokenizer of the run: kept in workdir/tokenizer, made there by process 0 when missing.

  To evaluate another run's params (eval_only and init_from.path), it is that run's.

  Raises:
    ValueError: the workdir's tokenizer is another one than `config.tokenizer.path` names, or it is
      incomplete although the run has checkpoints.
  """
  folder, path = workdir.path / "tokenizer", os.path.expanduser(config.tokenizer.path)
  given = _read_tokenizer(path) if path else None
  run = config.ft_from or config.init_from.path
  if not path and config.eval_only and run:
    given, path = _tokenizer_of(run), f"{run}/tokenizer"
  if not ov_data.Tokenizer.is_complete(folder) and jax.process_index() == 0:
    if folder.exists():
      _set_incomplete_aside(folder, config.checkpoint.dir or workdir.checkpoints, terminal)
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
      f"{workdir.place}/tokenizer holds another tokenizer than config.tokenizer.path={path}; "
      "params and tokenizer belong together: choose another --workdir, or leave "
      "config.tokenizer.path empty"
    )
  return tokenizer


def check_text_processor(
  workdir: Workdir, processors: Sequence[ov_data.TextProcessor | None]
) -> None:
  """Whether the texts kept in the workdir are those of one of the stages, `processors`.

  Raises:
    ValueError: the workdir's params were trained with texts prepared in another way.
  """
  ways = {processor.fingerprint: processor for processor in processors if processor is not None}
  kept = _kept_processor(workdir)
  if kept is not None and ways and kept.fingerprint not in ways:
    raise ValueError(
      f"{workdir.place}/tokenizer belongs to texts of {_way(kept)}, the configuration asks for "
      f"{' or '.join(_way(processor) for processor in ways.values())}; params and texts belong "
      "together: keep config.model.token_len and the text tower's options, or choose another "
      "--workdir"
    )


def keep_text_processor(
  workdir: Workdir, processor: ov_data.TextProcessor | None, *, replace: bool
) -> None:
  """Keeps how texts reach the model beside its tokenizer, where evaluation and export read it.

  Args:
    workdir: of the run.
    processor: of the stage; None changes nothing.
    replace: that of an earlier stage makes room; see `check_text_processor`.
  """
  if processor is None:
    return
  if jax.process_index() == 0:
    kept = _kept_processor(workdir)
    if kept is None or (replace and kept.fingerprint != processor.fingerprint):
      processor.save(workdir.path / "tokenizer")
  workdir.share("text processor kept")


def describe(loader: ov_data.Loader) -> dict[str, Any]:
  """Facts about the data of a loader for the report."""
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
  return facts


def _at_home(source: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a source, ~ in its places resolved."""
  places = {key: os.path.expanduser(source[key]) for key in ("path", "image_root") if key in source}
  return {**source, **places}


def _texts(specs: Mapping[str, ov_data.TextSpec] | None) -> dict[str, Any]:
  return {} if specs is None else {"texts": specs}


def _kept_processor(workdir: Workdir) -> ov_data.TextProcessor | None:
  try:
    return ov_data.TextProcessor.load(workdir.path / "tokenizer")
  except FileNotFoundError:
    return None


def _way(processor: ov_data.TextProcessor) -> str:
  return (
    f"{processor.length} tokens, pool {processor.pool}, padding {processor.padding}, "
    f"vocabulary {processor.tokenizer.fingerprint}"
  )


def _set_incomplete_aside(folder: Path, checkpoints: str, terminal: Terminal) -> None:
  """Rename a folder that no tokenizer was completely saved into, so that it is recreated.

  Raises:
    ValueError: the run has checkpoints, so their tokenizer was complete once.
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
  """The tokenizer in another run's workdir; None where there is none, as beside one checkpoint."""
  with open_workdir(run, writes=False) as other:
    folder = other.path / "tokenizer"
    return ov_data.Tokenizer.load(folder) if folder.is_dir() else None


def _read_tokenizer(path: str) -> ov_data.Tokenizer:
  if not os.path.exists(path):
    raise ValueError(
      f"config.tokenizer.path={path}: there is no such file or folder; give a vocabulary (a token "
      "a line), a tokenizer.json or a saved tokenizer, or leave it empty to train one on captions"
    )
  if os.path.isdir(path):
    return ov_data.Tokenizer.load(path)
  if path.endswith(".json"):
    return ov_data.Tokenizer.from_file(path)
  return ov_data.Tokenizer.from_vocab(path)


def _captions(config: ConfigDict) -> Iterator[str]:
  """Captions of evenly spread training records."""
  for source in training_sources(config):
    dataset = ov_data.Dataset(source)
    dataset.check_keys()
    count = min(len(dataset), _TOKENIZER_RECORDS)
    for record in np.linspace(0, len(dataset) - 1, count).astype(int):
      try:
        features = dataset.features(int(record), source.caption_keys)
      except ValueError:  # a broken record; the loader counts it when its turn comes
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
