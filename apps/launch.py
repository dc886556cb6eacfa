"""What the main of every training app does: flags, devices, demo data, then check or run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import itertools
from pathlib import Path
import re
import sys
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from apps.configs import base as configs_base
from apps.configs import published
from apps.trainer.errors import UserError, user_errors
from apps.trainer.names import leaves, nearest_leaf
from apps.trainer.settings import check_settings
from apps.trainer.stages import resolve_stages
from apps.trainer.startup import printable

if TYPE_CHECKING:
  from apps.trainer.parts import App
  from apps.trainer.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_COMPILE = flags.DEFINE_bool(
  "compile", False, "Compile the train step of every stage for the cache, and stop."
)
_CHECK = flags.DEFINE_bool("check", False, "Resolve everything, read one batch, and stop.")

# Sections that hold fields of another config, by name.
_FREE = (
  "model.encoder_options.",
  "model.text_options.",
  "model.decoder_options.",
  "optimizer.options.",
)


def launch(make_app: Callable[[], "App"], base: str, recipes: str) -> None:
  """Runs or checks the app that `make_app` builds; it imports what is heavy.

  Args:
    make_app: called once the flags are known to be right.
    base: name of the function of apps/configs/base.py whose settings the app reads.
    recipes: configurations made for it, for the message to who brings another.

  Raises:
    UserError: flags, settings or data that cannot be used.
  """
  config = _CONFIG.value
  if _CHECK.value and _COMPILE.value:
    raise UserError("--check --compile: give one of them; --check compiles nothing")
  if config is None or not _WORKDIR.value:
    raise UserError("give --config=apps/configs/NAME.py and --workdir=DIRECTORY")
  with user_errors():
    for argument in sys.argv:
      if re.search("[\ud800-\udfff]", argument):  # how Python keeps bytes that are no text
        raise ValueError(f"{argument}: this is not valid UTF-8; paths and settings must be")
    if missing := _missing_file(sys.argv[1:]):
      raise ValueError(missing)
    check_config(config, base, recipes)
  # Heavy imports wait until the flags are known to be right.
  import jax

  from apps import demo_data
  from apps.trainer.check import check_run, compile_run
  from apps.trainer.hooks import Hooks
  from apps.trainer.hosts import Hosts
  from apps.trainer.loop import run_training
  from apps.trainer.progress import Terminal
  from apps.trainer.summary import Report
  import ov_sharding

  ov_sharding.initialize(gone_after_seconds=config.hosts.gone_after)
  terminal = Terminal(active=jax.process_index() == 0)
  app = make_app()
  code = 0
  with (
    Hosts(terminal.phase, place=printable(_WORKDIR.value), **config.hosts) as hosts,
    hosts.told(),
    _opened(config, terminal.phase) as workdir,
  ):
    demo_data.prepare(config, workdir, terminal)
    if _CHECK.value or _COMPILE.value:
      (check_run if _CHECK.value else compile_run)(config, workdir, app, terminal)
    else:
      code = run_training(config, workdir, app, terminal, Hooks([hosts, Report()]))
  if code:
    sys.exit(code)


def check_config(config: ConfigDict, base: str, recipes: str) -> None:
  """Check a configuration as far as is possible without devices and data.

  Args:
    config: of the run; a value of the published code is replaced by its current name.
    base: as of `launch`.
    recipes: as of `launch`.

  Raises:
    ValueError: a setting that is missing, unknown, of another type or out of range.
  """
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"get_config of the file of --config returned a {type(config).__name__}; expected a "
      "ConfigDict, such as caption_config() of apps/configs/base.py"
    )
  config.lock()  # where the file could not be loaded, this says so
  known = getattr(configs_base, base)()
  check_settings(config)
  _check_kind(config, known, recipes)
  if problems := _unknown_settings(leaves(config), base):
    raise ValueError(f"the configuration file: {problems[0]}")
  given = set(leaves(config))
  if missing := [name for name in leaves(known) if name not in given]:
    raise ValueError(
      f"the configuration has no setting {missing[0]}; start from {base}() of apps/configs/base.py "
      "and change single settings, such as config.optimizer.learning_rate"
    )
  if current := published.REMAT.get(config.model.remat):
    logging.warning("config.model.remat=%s is now called %s", config.model.remat, current)
    config.model.remat = current
  resolve_stages(config)


@contextlib.contextmanager
def _opened(config: ConfigDict, say: Callable[[str], None]) -> Iterator["Workdir"]:
  """The workdir, locked with the folder of checkpoints unless the run only looks (--check)."""
  from apps.trainer.checkpoint_folder import check_path
  from apps.trainer.prepare import check_writable
  from apps.trainer.workdir import locked, open_workdir

  place, writes = str(_WORKDIR.value), not _CHECK.value
  with contextlib.ExitStack() as stack:
    with user_errors():
      if not config.checkpoint.dir:
        check_path(place, "--workdir=")
      check_writable(place, "--workdir")
      workdir = stack.enter_context(open_workdir(place, writes=writes, exclusive=writes, say=say))
      if writes and (checkpoints := config.checkpoint.dir):
        setting = f"config.checkpoint.dir={checkpoints}"
        check_writable(checkpoints, "config.checkpoint.dir")
        stack.enter_context(locked(checkpoints, setting, say))
    yield workdir


def explain_flags(base: str, argv: Sequence[str]) -> str | None:
  """Say what is wrong with the names of flags, and what the names of the published code are here.

  Args:
    base: as of `launch`.
    argv: the command line.

  Returns:
    One line; None where every name is known.
  """
  if missing := _missing_file(argv):
    return missing
  settings: dict[str, str] = {}
  for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
    if match := re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL):
      value = match[2] if match[2] is not None or following.startswith("-") else following
      settings[match[1]] = value or ""
  problems = _unknown_settings(settings, base, values=settings)
  flags_of = {row.name: row for row in published.FLAGS}
  for arg in argv:
    name = re.sub("^--?(no)?", "--", arg).partition("=")[0]
    if name in flags_of:
      problems.append(f"{name} of the published code is not needed here: {flags_of[name].note}")
  return "; ".join(problems) or None


def _missing_file(argv: Sequence[str]) -> str | None:
  """A message where the file of --config is not there."""
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
        return f"--config={match[1]}: there is no such file; {hint}"
  return None


def _unknown_settings(
  names: Iterable[str], base: str, values: dict[str, str] | None = None
) -> list[str]:
  """One message for each of the names that is no setting of the app."""
  known = list(leaves(getattr(configs_base, base)()))
  problems = []
  for name in names:
    if name in known or any(name.startswith(part) for part in _FREE):
      continue
    value = (values or {}).get(name)
    said = published.explain_setting(name, value, caption=base == "caption_config")
    if said is None:
      near = nearest_leaf(name, known)
      said = f"--config.{name}: there is no such setting; " + (
        f"did you mean --config.{near}?" if near else "apps/configs/base.py lists all"
      )
    problems.append(said)
  return problems


def _check_kind(config: ConfigDict, known: ConfigDict, recipes: str) -> None:
  expected, given = set(known.model), set(config.get("model", ()))
  if given != expected:
    raise ValueError(
      f"this configuration is for another app: config.model has {_some(given - expected)} and "
      f"lacks {_some(expected - given)}; use one such as {recipes}"
    )


def _some(names: set[str]) -> str:
  return ", ".join(sorted(names)) or "nothing more"
