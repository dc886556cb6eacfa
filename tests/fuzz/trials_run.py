"""Trials of damaged inputs of runs, imports and comparisons: one class for each kind of input.

The trials call the functions of the apps in this process. An outcome is "used" or "refused". Files
with a checksum may be used only if the result is that of the undamaged file.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import math
from pathlib import Path
import shutil
import sys
from typing import Any
from unittest import mock

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np

from apps import launch
from apps.configs import base
from apps.exporter import importer
from apps.exporter.formats.format import ReadOptions
from apps.exporter.formats.table import IMPORTS
from apps.exporter.source import load_source
from apps.trainer import report
from apps.trainer.checkpoint_folder import find_checkpoint
from apps.trainer.errors import MAX_MESSAGE, UserError, one_line
from apps.trainer.names import leaves
from apps.trainer.parts import build_parts
from apps.trainer.sinks import read_metrics
from ov_convert import open_clip, timm_vit, torch_module, transformers_vit
from ov_convert import testing as convert_testing
from ov_convert.release import Imported, Preprocess, TokenizerSpec
import ov_data
import ov_eval
import ov_models
import ov_sharding
from tests.fuzz.trials import Outcome, Refused
from tools.compare import evaluations, page, text_table

_BLOCK: dict[str, Any] = {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2}
_CLIP = ov_models.VisionLanguageConfig.from_names(
  "Ti/8", "Ti", "Ti", image_size=16, vocab_size=64, text_len=8, caption_len=6, embed_dim=8,
  encoder_options=_BLOCK, text_options=_BLOCK, decoder_options=_BLOCK,
)  # fmt: skip
_VIT = ov_models.ViTConfig(**_BLOCK, patch_size=8, image_size=16)


@contextlib.contextmanager
def _refusing(name: str = "") -> Iterator[None]:
  """Convert errors that are shown to users into Refused.

  Args:
    name: text that the message must contain, or "".

  Raises:
    AssertionError: if the message is empty or too long, or does not contain `name`.
  """
  try:
    yield
  except (UserError, ValueError, OSError) as error:
    text = one_line(error)  # as errors.report prints it
    assert text, f"a {type(error).__name__} without a word"
    assert len(text) <= MAX_MESSAGE, f"{len(text)} characters: {text[:200]} ..."
    assert name in text, f"does not name {name}: {text}"
    raise Refused(text) from None


class _Files:
  """Files of a folder. Before each trial all files are rewritten; then one is damaged.

  Attributes:
    seeds: the contents of the files.
  """

  def __init__(self, folder: Path, names: Sequence[str] = ("*",)):
    self.folder = folder
    found = sorted(path for name in names for path in folder.rglob(name) if path.is_file())
    self._contents = {path: path.read_bytes() for path in found}
    self._by_seed = {data: path for path, data in self._contents.items()}
    self.seeds = [data for data in self._by_seed if data]
    self._last: Path | None = None

  def damage(self, data: bytes, original: bytes) -> Path:
    """Replace the file whose content is `original` by `data`, and return its path."""
    if self._last is not None:
      self._last.write_bytes(self._contents[self._last])
    self._last = path = self._by_seed[original]
    path.write_bytes(data)
    return path


def _defaults(config: ConfigDict) -> dict[str, str]:
  """Return flags for all settings of a configuration with their values."""
  found = {}
  for name in leaves(config):
    value = config
    for part in name.split("."):
      value = value[part]
    if value is not None and not isinstance(value, ConfigDict):
      found[name] = str(value)
  return found


_SMALL = (
  "--config.model.encoder_options={'width': 8, 'depth': 1, 'mlp_dim': 8, 'num_heads': 2}",
  "--config.model.decoder_options={'width': 8, 'depth': 1, 'mlp_dim': 8, 'num_heads': 2}",
  "--config.model.vocab_size=0",
)


class _Configs:
  """Configurations: parsed like flags, validated, and built without arrays."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._tokenizer = ov_data.Tokenizer.train(["a red square"], 30, kind="words")
    self._mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig())

  def build(self, argv: Sequence[str], kind: str) -> None:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    argv = ["app", *argv]
    with mock.patch.object(sys, "argv", argv):
      with _refusing_flags():
        values(argv)
      with _refusing():
        config = launch.check_config(values.config, kind)
    (stage, *_) = launch.resolve_stages(config)
    with _refusing():
      build_parts(stage.config, self._tokenizer, self._mesh)


@contextlib.contextmanager
def _refusing_flags() -> Iterator[None]:
  """Report flag errors like run_app; all errors in a configuration file are errors of the user."""
  try:
    yield
  except Exception as error:
    raise Refused(str(error)) from None


class Flags(_Configs):
  """Values of settings on the command line."""

  def __init__(self, folder: Path):
    super().__init__(folder)
    self._kinds = {}
    for kind in ("caption_config", "clip_config"):
      given = _defaults(getattr(base, kind)())
      names = list(given)
      for part in range(4):
        some = {name: given[name] for name in names[part::4]}
        self._kinds[json.dumps(some).encode()] = kind
    for stages in (
      [
        {"name": "84px", "total_steps": 900, "model.image_size": 84},
        {"name": "b", "batch_size": 8},
      ],
      [{"path": "/runs/a", "step": 3, "part": "ema", "include": ["^text/"]}],
    ):
      name = "stages" if "name" in stages[0] else "init_from.more"
      self._kinds[json.dumps({name: stages}).encode()] = "caption_config"
    self.seeds = [*self._kinds]

  def check(self, data: bytes, original: bytes) -> Outcome:
    kind = self._kinds[original]
    demo = "caption_demo" if kind == "caption_config" else "clip_demo"
    text = data.decode("utf-8", "surrogateescape")
    try:
      settings = json.loads(text)
      own = [f"--config.{name}={value}" for name, value in settings.items()]
    except (ValueError, AttributeError, RecursionError):  # not JSON: use the text as the value
      own = [f"--config.{text[2:40]}", f"--config.stages={text[:2000]}"]
    self.build([f"--config=apps/configs/{demo}.py", *_SMALL, *own], kind)
    return "used"


class ConfigFiles(_Configs):
  """Configuration files, which are Python programs."""

  def __init__(self, folder: Path):
    super().__init__(folder)
    lines = [
      "from apps.configs import caption_demo",
      "def get_config(arg=None):",
      "  config = caption_demo.get_config('runlocal')",
      "  config.batch_size = 8",
      "  config.optimizer.learning_rate = 1e-3",
      "  config.optimizer.frozen = ('^encoder/patch',)",
      "  config.model.encoder_options.depth = 1",
      "  config.stages = ({'name': 'a', 'total_steps': 9}, {'model.image_size': 24})",
      "  return config",
    ]
    self.seeds = ["\n".join(lines).encode(), "\n".join([*lines[:3], lines[-1]]).encode()]

  def check(self, data: bytes, original: bytes) -> Outcome:
    path = self._folder / "own.py"
    path.write_bytes(data)
    self.build([f"--config={path}", *_SMALL], "caption_config")
    return "used"


def _workdir(folder: Path) -> Path:
  """Create a workdir with a two-tower model, texts, a checkpoint of step 0 and metrics."""
  tokenizer = ov_data.Tokenizer.train(["a red square", "a blue dot"], 60, kind="words")
  spec = TokenizerSpec(
    tokenizer.to_json(), 8, True, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id,
    tokenizer.unk_id, tokenizer.cls_id,
  )  # fmt: skip
  params = jax.tree.map(np.asarray, ov_models.init(_CLIP, jax.random.key(0)))
  preprocess = Preprocess(16, "squash", (0.5,) * 3, (0.25,) * 3)
  workdir = folder / "run"
  found = Imported(_CLIP, params, preprocess, spec)
  importer.write_workdir(workdir, found, "somewhere", folder)
  (workdir / "config.json").write_text(json.dumps(base.clip_config().to_dict()))
  (workdir / "evaluations").mkdir()
  _write_figures(workdir / "evaluations/0.json", 0)
  return workdir


def _write_figures(path: Path, step: int) -> None:
  results = [
    ov_eval.Result("zero_shot_top1", 0.5, 9, 0.4, 0.6, "share", {"evaluator": "zero_shot"}),
    ov_eval.Result("caption_nll", 2.0 + step, 9, None, None, "nats", {"split": "b"}),
    ov_eval.Result("cider", math.nan, 9),
  ]
  ov_eval.write_results(path, results, split="heldout", step=step, examples_seen=9 * step)


class Checkpoints(_Files):
  """Files of a checkpoint: it is restored as it was written, or is not a checkpoint."""

  def __init__(self, folder: Path):
    self._workdir = _workdir(folder)
    super().__init__(self._workdir / "checkpoints")
    self._want = self._read()

  def _read(self) -> list[bytes]:
    source = load_source(self._workdir)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(source.release.params)]

  def check(self, data: bytes, original: bytes) -> Outcome:
    path = self.damage(data, original)
    with _refusing("checkpoint"):
      assert self._read() == self._want, f"{path} is damaged, and other arrays are read"
    return "used"


class Checksums(_Files):
  """The manifest of a checkpoint and its files: every change is detected."""

  def __init__(self, folder: Path):
    checkpoint = _workdir(folder) / "checkpoints/0"
    super().__init__(checkpoint, ("state/**/*", "metadata/*", "manifest.json"))

  def check(self, data: bytes, original: bytes) -> Outcome:
    path = self.damage(data, original)
    with _refusing("checkpoint"):
      find_checkpoint(self.folder)
      assert data == original, f"{path} is damaged, and its checkpoint is taken for intact"
    return "used"


class Workdirs(_Files):
  """Inputs of an export in addition to checkpoints: configuration and metrics."""

  def __init__(self, folder: Path):
    super().__init__(_workdir(folder), ("config.json", "0.json"))

  def check(self, data: bytes, original: bytes) -> Outcome:
    self.damage(data, original)
    with _refusing():
      load_source(self.folder)
    return "used"


class Tokenizers(_Files):
  """Saved tokenizers with a text processor: the same token ids, or rejected."""

  _TEXTS = ("a red square", "two  Blue dots", "", "é [eos]")

  def __init__(self, folder: Path):
    super().__init__(_workdir(folder) / "tokenizer")
    self._want = self._ids()

  def _ids(self) -> list[list[int]]:
    return ov_data.TextProcessor.load(self.folder).encode(list(self._TEXTS)).tolist()

  def check(self, data: bytes, original: bytes) -> Outcome:
    path = self.damage(data, original)
    with _refusing():
      assert self._ids() == self._want, f"{path} is damaged, and the ids are others"
    return "used"


class Imports:
  """Model folders of other libraries: the model matches its config, or is rejected."""

  def __init__(self, folder: Path):
    clip = convert_testing.release(
      ov_models.VisionLanguageConfig.from_names(
        "Ti/8", "Ti", None, image_size=16, vocab_size=64, text_len=convert_testing.LENGTH,
        embed_dim=8, encoder_options=_BLOCK, text_options=_BLOCK, preset="openvision_released",
      )
    )  # fmt: skip
    vit = convert_testing.release(_VIT, words=None)
    self._files: dict[bytes, tuple[_Files, str]] = {}
    self._formats = {
      "open_clip": (open_clip.write, clip),
      "timm": (timm_vit.write, vit),
      "transformers": (transformers_vit.write, clip),
      "safetensors": (torch_module.write, clip),
    }
    for kind, (write, source) in self._formats.items():
      (folder / kind).mkdir()
      write(folder / kind, source)
      files = _Files(folder / kind, ("*.json", "*.safetensors"))
      self._files |= dict.fromkeys(files.seeds, (files, kind))
    # Most files contain weights; damage metadata more often.
    self.seeds = [*self._files]

  def check(self, data: bytes, original: bytes) -> Outcome:
    files, kind = self._files[original]
    files.damage(data, original)
    with _refusing():
      found = importer._read(IMPORTS[kind], files.folder, ReadOptions(sys.executable))
      ov_models.bind(found.config, found.params)
    return "used"


class Evaluations(_Files):
  """Files of metrics: compared and drawn, or rejected."""

  def __init__(self, folder: Path):
    run = folder / "run"
    (run / "evaluations").mkdir(parents=True)
    for step in (1, 2):
      _write_figures(run / f"evaluations/{step}.json", step)
    shutil.copy(run / "evaluations/2.json", run / "evaluation.json")
    super().__init__(run / "evaluations")
    _write_figures(folder / "other.json", 3)
    self._run, self._other = str(run), str(folder / "other.json")

  def check(self, data: bytes, original: bytes) -> Outcome:
    self.damage(data, original)
    with _refusing():
      runs = evaluations.read([self._run, self._other])
      columns = evaluations.columns(runs.rows)
      printed = text_table.render(runs.rows, columns, 80)
      assert "\x1b" not in printed
      page.render(runs.rows, columns, runs.all, evaluations.columns(runs.all))
    return "used"


class Reports(_Files):
  """Inputs of a report: report.json and metrics.jsonl."""

  def __init__(self, folder: Path):
    lines = [
      {"step": step, "stage": "main", "train/loss": 1 / step, "train/seconds": 1.0} for step in
      range(1, 6)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    report.write_report(
      folder,
      report.ReportData(
        title="x",
        results=(ov_eval.Result("caption_nll", 2.0, 9, 1.0, 3.0, "nats"),),
        summary={"steps": "5"},
        stages=(report.Stage("main", 0),),
        samples=(report.Sample(np.zeros((4, 4, 3), np.uint8), "a", ("b",)),),
        data={"train": {"records": 9}},
        skipped={"truncated": 1},
        config={"seed": 0},
        versions={"jax": "0"},
      ),
    )
    super().__init__(folder, ("report.json", "metrics.jsonl"))

  def check(self, data: bytes, original: bytes) -> Outcome:
    self.damage(data, original)
    with _refusing():
      read_metrics(self.folder / "metrics.jsonl")
      report.recreate_report(self.folder)
    return "used"


KINDS = {
  kind.__name__.lower(): kind
  for kind in (
    Flags, ConfigFiles, Checkpoints, Checksums, Workdirs, Tokenizers, Imports, Evaluations, Reports
  )
}  # fmt: skip
