"""Common main function of the training apps: flags, devices, demo data, then check or run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import itertools
from pathlib import Path
import re
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from apps.configs import base as configs_base
from apps.configs import published
from apps.trainer.errors import UserError, run_app, user_errors
from apps.trainer.names import MOVED, leaves, nearest_leaf
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import resolve_stages
from apps.trainer.startup import printable

if TYPE_CHECKING:
  from apps.trainer.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_COMPILE = flags.DEFINE_bool(
  "compile", False, "Compile the train step of every stage for the cache, and stop."
)
_CHECK = flags.DEFINE_bool("check", False, "Resolve everything, read one batch, and stop.")
_STORE_TEACHER = flags.DEFINE_string(
  "store_teacher",
  None,
  "Write the embeddings of the teacher for all positions of the run to this folder, and stop.",
)

# Sections whose fields are those of another config.
_FREE = (
  "model.encoder_options.",
  "model.text_options.",
  "model.decoder_options.",
  "optimizer.options.",
  "loss.more.",
)


def run(base: str) -> None:
  """Run a training app; user errors end it with one line.

  Args:
    base: name of the function in apps/configs/base.py with the defaults of the app.
  """
  run_app(functools.partial(launch, base), explain=explain_flags, rename=rename_flag)


def rename_flag(flag: str) -> str:
  """Return a flag with the current name of the setting, if it was renamed."""
  found = re.match(r"(--?config\.)([^=]+)(.*)", flag, re.DOTALL)
  return flag if found is None else found[1] + MOVED.get(found[2], found[2]) + found[3]


def launch(base: str) -> None:
  """Train, check or compile, depending on the flags.

  Args:
    base: see `run`.

  Raises:
    UserError: flags, settings or data are invalid.
  """
  config = _CONFIG.value
  if sum(map(bool, (_CHECK.value, _COMPILE.value, _STORE_TEACHER.value))) > 1:
    raise UserError("--check, --compile and --store_teacher: give one of them")
  if config is None or not _WORKDIR.value:
    raise UserError("give --config=apps/configs/NAME.py and --workdir=DIRECTORY")
  with user_errors():
    for argument in sys.argv:
      if re.search("[\ud800-\udfff]", argument):  # surrogates stand for undecodable bytes
        raise ValueError(f"{argument}: this is not valid UTF-8; paths and settings must be")
    if missing := _missing_file(sys.argv[1:]):
      raise ValueError(missing)
    config = check_config(config, base)
  # Delay slow imports until the flags are validated.
  import jax

  from apps import demo_data
  from apps.evaluators import make_evaluators
  from apps.trainer.baseline import Baseline
  from apps.trainer.check import check_run, compile_run
  from apps.trainer.hooks import Hooks
  from apps.trainer.hosts import Hosts
  from apps.trainer.loop import run_training
  from apps.trainer.progress import Terminal
  from apps.trainer.store_teacher import store_teacher
  from apps.trainer.summary import Report
  import ov_sharding

  ov_sharding.initialize(gone_after_seconds=config.hosts.gone_after)
  terminal = Terminal(active=jax.process_index() == 0)
  code = 0
  with (
    Hosts(terminal.phase, workdir=printable(_WORKDIR.value), **config.hosts.to_dict()) as hosts,
    hosts.report_errors(),
    _open_workdir(config, terminal.phase) as workdir,
  ):
    config = demo_data.prepare(config, workdir, terminal)
    if _CHECK.value:
      check_run(config, workdir, make_evaluators, terminal)
    elif _COMPILE.value:
      compile_run(config, workdir, terminal)
    elif _STORE_TEACHER.value:
      store_teacher(config, workdir, terminal, _STORE_TEACHER.value)
    else:
      code = run_training(
        config, workdir, make_evaluators, terminal, Hooks([hosts, Report(), Baseline()])
      )
  if code:
    sys.exit(code)


def check_config(config: ConfigDict, base: str) -> RunConfig:
  """Return the settings of a configuration, checked as far as possible without devices and data.

  Args:
    config: configuration of the run; old names and values of the released code are converted.
    base: see `run`.

  Raises:
    ValueError: a setting is missing, unknown, has the wrong type or is out of range.
  """
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"get_config of the file of --config returned a {type(config).__name__}; expected a "
      "ConfigDict, such as caption_config() of apps/configs/base.py"
    )
  config.lock()  # raises if the file could not be loaded
  known = getattr(configs_base, base)()
  given = list(leaves(configs_base.plain(config)))
  if missing := [name for name in leaves(configs_base.plain(known)) if name not in given]:
    raise ValueError(
      f"the configuration has no setting {missing[0]}; start from {base}() of apps/configs/base.py "
      "and change single settings, such as config.optimizer.learning_rate"
    )
  if problems := _unknown_settings(given):
    raise ValueError(f"the configuration file: {problems[0]}")
  resolved = configs_base.resolve(config)
  resolve_stages(resolved)
  return resolved


@contextlib.contextmanager
def _open_workdir(config: RunConfig, log: Callable[[str], None]) -> Iterator["Workdir"]:
  """Open the workdir, and lock it and the folder of checkpoints unless the run is a --check."""
  from apps.trainer.checkpoint_folder import check_path
  from apps.trainer.prepare import check_writable
  from apps.trainer.workdir import locked, open_workdir

  uri, writable = str(_WORKDIR.value), not _CHECK.value
  with contextlib.ExitStack() as stack:
    with user_errors():
      if not config.checkpoint.dir:
        check_path(uri, "--workdir=")
      check_writable(uri, "--workdir")
      workdir = stack.enter_context(
        open_workdir(uri, writable=writable, exclusive=writable, log=log)
      )
      if writable and (checkpoints := config.checkpoint.dir):
        setting = f"config.checkpoint.dir={checkpoints}"
        check_writable(checkpoints, "config.checkpoint.dir")
        stack.enter_context(locked(checkpoints, setting, log))
    yield workdir


def explain_flags(argv: Sequence[str]) -> str | None:
  """Return what is wrong with the names of flags, and the counterparts of released names.

  Args:
    argv: command line.

  Returns:
    One line; None if every name is known.
  """
  if missing := _missing_file(argv):
    return missing
  settings: dict[str, str] = {}
  for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
    if match := re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL):
      value = match[2] if match[2] is not None or following.startswith("-") else following
      settings[match[1]] = value or ""
  problems = _unknown_settings(settings, values=settings)
  flags_of = {row.name: row for row in published.FLAGS}
  for arg in argv:
    name = re.sub("^--?(no)?", "--", arg).partition("=")[0]
    if name in flags_of:
      problems.append(f"{name} of the published code is not needed here: {flags_of[name].note}")
  return "; ".join(problems) or None


def _missing_file(argv: Sequence[str]) -> str | None:
  """Return a message if the file of --config does not exist."""
  for arg in argv:
    if match := re.fullmatch(r"--?config=([^:]+)(:.*)?", arg, re.DOTALL):
      path = Path(match[1]).expanduser()
      if not path.is_file():
        here = Path(__file__).parent / "configs" / path.name
        hint = (
          f"did you mean --config=apps/configs/{path.name}?"
          if here.is_file()
          else ("recipes are in apps/configs")
        )
        return f"--config={match[1]}: the file does not exist; {hint}"
  return None


def _unknown_settings(names: Iterable[str], values: dict[str, str] | None = None) -> list[str]:
  """Return one message for each unknown setting."""
  known = list(leaves(configs_base.plain(configs_base.clip_config())))
  problems = []
  for name in names:
    if name in known or name in MOVED or any(name.startswith(part) for part in _FREE):
      continue
    value = (values or {}).get(name)
    explanation = published.explain_setting(name, value)
    if explanation is None:
      near = nearest_leaf(name, known)
      explanation = f"--config.{name}: unknown setting; " + (
        f"did you mean --config.{near}?" if near else "apps/trainer/run_config.py lists all"
      )
    problems.append(explanation)
  return problems
