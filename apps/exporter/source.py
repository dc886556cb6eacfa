"""Load the model of a run or an import, with its tokenizer, preprocessing and metrics."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np

from apps.configs.base import model_of
from apps.trainer.augment import MEAN, STD
from apps.trainer.checkpoint import find_checkpoint, read_metadata
from apps.trainer.config import init_sources, model_config
from apps.trainer.init_from import interpolate
from apps.trainer.init_source import restore_params
from apps.trainer.run_config import ModelSettings, RunConfig
from apps.trainer.workdir import Workdir, open_workdir
from ov_convert.release import (
  Preprocess,
  Release,
  TokenizerSpec,
  encoder_of,
  portable,
  round_params,
)
import ov_data
import ov_models

_T = TypeVar("_T")


class _Checkpoint(msgspec.Struct):
  dir: str | None = None


class _RunConfig(msgspec.Struct):
  """Fields of config.json of a run that are read."""

  checkpoint: _Checkpoint = msgspec.field(default_factory=_Checkpoint)


class _Result(msgspec.Struct):
  """One metric of an evaluation, as written by ov_eval."""

  name: str
  value: float | None
  count: int = 0
  unit: str | None = None
  interval: tuple[float | None, float | None] | None = None
  context: dict[str, Any] | None = None


class _Evaluation(msgspec.Struct):
  """Fields of evaluations/STEP.json that are read."""

  split: str
  results: list[_Result]
  examples_seen: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """A model with its tokenizer, metadata and metrics.

  Attributes:
    release: model to export, with parameters rounded to the dtype of the files.
    tokenizer: tokenizer of the run, or None.
    processor: text processor of the text tower, or None.
    about: metadata for the model card: config, step and versions of the run, or of the import.
    results: metrics of the evaluation at this step, as written by ov_eval.
  """

  release: Release
  tokenizer: ov_data.Tokenizer | None
  processor: ov_data.TextProcessor | None
  about: Mapping[str, Any]
  results: tuple[Mapping[str, Any], ...] = ()

  def license(self, given: str | None) -> str:
    """Return the licence for the model cards.

    Args:
      given: licence that the user states, or None.

    Returns:
      `given`, or that of the imported model ("" if it states none), or "apache-2.0".
    """
    if given is not None:
      return given
    imported = self.about.get("imported")
    return str(imported.get("license", "")) if imported else "apache-2.0"

  @property
  def specials(self) -> tuple[int, int, int] | None:
    """Ids of [bos], [eos] and padding for captions; None without a tokenizer with [bos]."""
    if self.tokenizer is None or self.tokenizer.bos_id is None:
      return None
    return self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id


def load_source(
  place: str | Path,
  *,
  step: int | None = None,
  part: str = "params",
  image_size: int | None = None,
  dtype: str = "float32",
  wise_ft: float | None = None,
) -> Source:
  """Read the workdir of a training run or of an import.

  Args:
    place: local or gs:// folder with `checkpoints/` and, for models with texts, `tokenizer/`.
    step: step of the checkpoint; the newest by default.
    part: "params" for the trained parameters, or "ema" for their average.
    image_size: image size if different from training; positions are computed or resampled.
    dtype: dtype of the files to be written.
    wise_ft: weight alpha of the trained parameters, see `init_from.interpolate`; None for 1.

  Raises:
    ValueError, OSError: if there is no such checkpoint, or files do not match each other.
  """
  with open_workdir(str(place), writable=False) as workdir:
    checkpoint = find_checkpoint(_checkpoints(workdir), step)
    metadata = read_metadata(checkpoint)
    tokenizer, processor = _texts(workdir.path / "tokenizer")
    results = _results(workdir.path, metadata["step"], part) if wise_ft is None else ()
  if tokenizer and metadata.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
    raise ValueError(
      f"{workdir.uri}/tokenizer is not the tokenizer of {checkpoint}: its fingerprint is "
      f"{tokenizer.fingerprint}, not {metadata['tokenizer']}; take both from the same run"
    )
  config = portable(_model(metadata, tokenizer))
  if isinstance(config, ov_models.TextConfig):
    raise ValueError(f"{workdir.uri} contains only a text tower; exports require an image tower")
  params = _params(checkpoint, metadata, config, part, wise_ft)
  if image_size:
    config, params = _at(config, params, image_size)
  text = getattr(config, "text", None)
  if processor is not None and text is not None:
    # The workdir stores the text processor of the latest stage; earlier lengths may differ.
    processor = dataclasses.replace(processor, length=text.max_len)
  release = Release(
    config,
    round_params(params, dtype),
    _preprocess(metadata, encoder_of(config).image_size),
    _words(config, tokenizer, processor),
    dtype,
  )
  names = ("config", "stage", "step", "versions", "imported", "fingerprint")
  about = {name: metadata.get(name) for name in names} | {"wise_ft": wise_ft}
  return Source(release, tokenizer, processor, about, results)


def _checkpoints(workdir: Workdir) -> str:
  """Return the checkpoint folder of a run: its workdir, unless its config sets another."""
  if not workdir.path.is_dir():
    found = "a file, not a folder" if workdir.path.exists() else "no such folder"
    raise ValueError(f"--workdir={workdir.uri}: {found}; expected the folder of a run or an import")
  file = workdir.path / "config.json"
  return (_read(file, _RunConfig).checkpoint.dir if file.exists() else "") or workdir.uri


def _texts(folder: Path) -> tuple[ov_data.Tokenizer | None, ov_data.TextProcessor | None]:
  if not folder.is_dir():
    return None, None
  if (folder / "text_processor.json").exists():
    processor = ov_data.TextProcessor.load(folder)
    return processor.tokenizer, processor
  return ov_data.Tokenizer.load(folder), None


def _model(metadata: Mapping[str, Any], tokenizer: ov_data.Tokenizer | None) -> Any:
  """Return the model config of a checkpoint, from an import or from the config of the run."""
  if metadata.get("model"):
    return ov_models.config_from_dict(metadata["model"])
  if tokenizer is None:
    raise ValueError("the workdir has no tokenizer/, which a trained model requires; copy it too")
  return model_config(model_of(metadata["config"]["model"]), vocab_size=tokenizer.vocab_size)


def _params(
  checkpoint: Any, metadata: Mapping[str, Any], config: Any, part: str, wise_ft: float | None
) -> Any:
  """Return parameters on the host; a single image tower is stored under "encoder"."""
  where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    ov_models.abstract_params(config),
  )
  alone = isinstance(config, ov_models.ViTConfig)
  params = restore_params(checkpoint, {"encoder": abstract} if alone else abstract, part)
  if wise_ft is not None:
    saved = metadata.get("config") or {}
    given = {name: saved[name] for name in ("init_from", "ft_from") if name in saved}
    model = model_of(saved["model"]) if saved else ModelSettings()
    sources = init_sources(dataclasses.replace(RunConfig.parse(given), model=model))
    params = interpolate(sources, params, wise_ft)
  return jax.tree.map(np.asarray, params["encoder"] if alone else params)


def _at(config: Any, params: Any, image_size: int) -> tuple[Any, Any]:
  """Return config and parameters at another resolution."""
  alone = isinstance(config, ov_models.ViTConfig)
  old = encoder_of(config)
  new = dataclasses.replace(old, image_size=image_size)
  tower = params if alone else params["encoder"]
  if new.position == "learned":
    table = ov_models.resample_positions(
      tower["position_embedding"], old.grid, new.grid, int(old.cls_token), old.position_resize
    )
    tower = tower | {"position_embedding": np.asarray(table)}
  if alone:
    return new, tower
  return dataclasses.replace(config, encoder=new), params | {"encoder": tower}


def _preprocess(metadata: Mapping[str, Any], image_size: int) -> Preprocess:
  if given := metadata.get("preprocess"):
    fields = {"fit": given["fit"], "mean": tuple(given["mean"]), "std": tuple(given["std"])}
    fields["interpolation"] = given.get("interpolation", "bilinear")
    return Preprocess(image_size, **fields)
  config = metadata.get("config")
  data = config["input"] if config is not None else {}
  mean, std = (tuple(data.get(name, known)) for name, known in (("mean", MEAN), ("std", STD)))
  squash = data.get("fit") == "squash"
  return Preprocess(image_size, "squash" if squash else "center", mean, std)


def _words(
  config: Any, tokenizer: ov_data.Tokenizer | None, processor: ov_data.TextProcessor | None
) -> TokenizerSpec | None:
  """Return the tokenizer of the text tower, or else that of the decoder."""
  if tokenizer is None:
    return None
  if processor is not None:
    length, append_cls = processor.length, processor.append_cls
  elif caption_len := getattr(config, "caption_len", 0):
    length, append_cls = caption_len, False
  else:
    return None
  return TokenizerSpec(
    tokenizer.to_json(), length, append_cls,
    tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.cls_id,
  )  # fmt: skip


def _results(workdir: Path, step: int, part: str) -> tuple[Mapping[str, Any], ...]:
  """Return the metrics of `step`, if the run was evaluated there; they apply to "params" only."""
  file = workdir / "evaluations" / f"{step}.json"
  if not file.exists() or part != "params":
    return ()
  content = _read(file, _Evaluation)
  shared = {"split": content.split, "examples_seen": content.examples_seen}
  return tuple(msgspec.to_builtins(result) | shared for result in content.results)


def _read(file: Path, form: type[_T]) -> _T:
  """Read a JSON file of a run.

  Raises:
    ValueError: if the file is not JSON, or does not match `form`.
  """
  try:
    return msgspec.json.decode(file.read_bytes(), type=form)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(
      f"{file} is damaged: {error}; restore it, or move it away to export without it"
    ) from None
