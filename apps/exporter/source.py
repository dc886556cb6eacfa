"""What is exported: the model of a run, or of an import, with its texts, pictures and figures."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict
import msgspec
import numpy as np

from apps.caption_task import captioner_config
from apps.clip_task import two_towers_config
from apps.trainer.augment import MEAN, STD
from apps.trainer.checkpoint import find_checkpoint, read_metadata, restore_arrays
from apps.trainer.workdir import Workdir, open_workdir
from ov_convert.release import Preprocess, Release, Words, encoder_of, portable, round_params
import ov_data
import ov_models

_T = TypeVar("_T")


class _Checkpoint(msgspec.Struct):
  dir: str | None = None


class _RunConfig(msgspec.Struct):
  """What is read of config.json of a run."""

  checkpoint: _Checkpoint = msgspec.field(default_factory=_Checkpoint)


class _Result(msgspec.Struct):
  """One number of an evaluation, as ov_eval writes it."""

  name: str
  value: float | None
  count: int = 0
  unit: str | None = None
  interval: tuple[float | None, float | None] | None = None
  context: dict[str, Any] | None = None


class _Evaluation(msgspec.Struct):
  """What is read of evaluations/STEP.json."""

  split: str
  results: list[_Result]
  examples_seen: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """A model and what is known of it.

  Attributes:
    release: what is written; its params are rounded to the dtype of the files.
    tokenizer: of the run; None where there is none.
    processor: how texts reach the text tower; None without one.
    about: of the run, for the model card: config, step, examples seen, versions; or of the import.
    results: figures of the evaluation at this step, as ov_eval writes them.
  """

  release: Release
  tokenizer: ov_data.Tokenizer | None
  processor: ov_data.TextProcessor | None
  about: Mapping[str, Any]
  results: tuple[Mapping[str, Any], ...] = ()

  @property
  def specials(self) -> tuple[int, int, int] | None:
    """Ids of [bos], [eos] and padding, with which captions are written."""
    if self.tokenizer is None:
      return None
    return self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id


def load_source(
  place: str | Path,
  *,
  step: int | None = None,
  part: str = "params",
  image_size: int | None = None,
  dtype: str = "float32",
) -> Source:
  """Reads a workdir of a training app or of an import.

  Args:
    place: a folder, local or gs://, with `checkpoints/` and, where the model reads or writes text,
      `tokenizer/`.
    step: which checkpoint, by default the newest.
    part: the trained parameters, or "ema", their average.
    image_size: pixels, when other than trained: positions are computed or resampled for it.
    dtype: of the files to be written.

  Raises:
    ValueError, OSError: no such checkpoint, or files that do not fit each other.
  """
  with open_workdir(str(place), writes=False) as workdir:
    checkpoint = find_checkpoint(_checkpoints(workdir), step)
    metadata = read_metadata(checkpoint)
    tokenizer, processor = _texts(workdir.path / "tokenizer")
    results = _results(workdir.path, metadata["step"], part)
  if tokenizer and metadata.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
    raise ValueError(
      f"{workdir.place}/tokenizer is not the tokenizer of {checkpoint}: its fingerprint is "
      f"{tokenizer.fingerprint}, not {metadata['tokenizer']}; take both from the same run"
    )
  config = portable(_model(metadata, tokenizer))
  if isinstance(config, ov_models.TextConfig):
    raise ValueError(
      f"{workdir.place} holds a text tower alone; formats are for models that see pictures"
    )
  params = _params(checkpoint, config, part)
  if image_size:
    config, params = _at(config, params, image_size)
  text = getattr(config, "text", None)
  if processor is not None and text is not None:
    # The workdir keeps the texts of the stage it is in; an earlier checkpoint had its own.
    processor = dataclasses.replace(processor, length=text.max_len)
  release = Release(
    config,
    round_params(params, dtype),
    _preprocess(metadata, encoder_of(config).image_size),
    _words(config, tokenizer, processor),
    dtype,
  )
  told = ("config", "stage", "step", "versions", "imported", "fingerprint")
  about = {name: metadata.get(name) for name in told}
  return Source(release, tokenizer, processor, about, results)


def _checkpoints(workdir: Workdir) -> str:
  """Where a run keeps them: in its workdir unless its config says otherwise."""
  if not workdir.path.is_dir():
    found = "it is a file, not a folder" if workdir.path.exists() else "there is no such folder"
    raise ValueError(f"--workdir={workdir.place}: {found}; expected that of a run or an import")
  file = workdir.path / "config.json"
  return (_read(file, _RunConfig).checkpoint.dir if file.exists() else "") or workdir.place


def _texts(folder: Path) -> tuple[ov_data.Tokenizer | None, ov_data.TextProcessor | None]:
  if not folder.is_dir():
    return None, None
  if (folder / "text_processor.json").exists():
    processor = ov_data.TextProcessor.load(folder)
    return processor.tokenizer, processor
  return ov_data.Tokenizer.load(folder), None


def _model(metadata: Mapping[str, Any], tokenizer: ov_data.Tokenizer | None) -> Any:
  """The model of a checkpoint: named by an import, else that of the run's config."""
  if metadata.get("model"):
    return ov_models.config_from_dict(metadata["model"])
  if tokenizer is None:
    raise ValueError(
      "the workdir has no tokenizer/, which a trained model needs; copy it there too"
    )
  model = ConfigDict(metadata["config"]["model"])
  make = two_towers_config if "text" in model else captioner_config
  return make(model, vocab_size=tokenizer.vocab_size)


def _params(checkpoint: Any, config: Any, part: str) -> Any:
  """Parameters on the host; a vision tower may lie under "encoder", as an import keeps it."""
  where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    ov_models.abstract_params(config),
  )
  alone = isinstance(config, ov_models.ViTConfig)
  wanted = {part: {"encoder": abstract} if alone else abstract}
  params = restore_arrays(checkpoint, wanted, partial=True)[part]
  return jax.tree.map(np.asarray, params["encoder"] if alone else params)


def _at(config: Any, params: Any, image_size: int) -> tuple[Any, Any]:
  """The model at another resolution."""
  alone = isinstance(config, ov_models.ViTConfig)
  old = encoder_of(config)
  new = dataclasses.replace(old, image_size=image_size)
  tower = params if alone else params["encoder"]
  if new.position == "learned":
    table = ov_models.resample_positions(tower["position_embedding"], old.grid, new.grid)
    tower = tower | {"position_embedding": np.asarray(table)}
  if alone:
    return new, tower
  return dataclasses.replace(config, encoder=new), params | {"encoder": tower}


def _preprocess(metadata: Mapping[str, Any], image_size: int) -> Preprocess:
  if given := metadata.get("preprocess"):
    fields = {"fit": given["fit"], "mean": tuple(given["mean"]), "std": tuple(given["std"])}
    return Preprocess(image_size, **fields)
  config = metadata.get("config")
  squash = config is not None and config["input"]["fit"] == "squash"
  return Preprocess(image_size, "squash" if squash else "center", MEAN, STD)


def _words(
  config: Any, tokenizer: ov_data.Tokenizer | None, processor: ov_data.TextProcessor | None
) -> Words | None:
  """The texts of the text tower, else those of the decoder."""
  if tokenizer is None:
    return None
  decoder = getattr(config, "decoder", None)
  if processor is not None:
    length, append_cls = processor.length, processor.append_cls
  elif decoder is not None:
    length, append_cls = getattr(decoder, "max_len", None) or decoder.num_queries, False
  else:
    return None
  return Words(
    tokenizer.to_json(), length, append_cls,
    tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.cls_id,
  )  # fmt: skip


def _results(workdir: Path, step: int, part: str) -> tuple[Mapping[str, Any], ...]:
  """The figures of `step`, where the run was evaluated there; they are of its params."""
  file = workdir / "evaluations" / f"{step}.json"
  if not file.exists() or part != "params":
    return ()
  content = _read(file, _Evaluation)
  shared = {"split": content.split, "examples_seen": content.examples_seen}
  return tuple(msgspec.to_builtins(result) | shared for result in content.results)


def _read(file: Path, form: type[_T]) -> _T:
  """Read a JSON file of a run.

  Raises:
    ValueError: it is no JSON, or not of this form.
  """
  try:
    return msgspec.json.decode(file.read_bytes(), type=form)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(
      f"{file} is damaged: {error}; restore it, or move it away to export without it"
    ) from None
