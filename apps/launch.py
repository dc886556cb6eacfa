"""What the main of every training app does: flags, devices, demo data, then check or run."""

from collections.abc import Callable
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from apps.configs import base as configs_base
from apps.trainer.errors import UserError, user_errors

if TYPE_CHECKING:
  from apps.trainer.loop import App

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_COMPILE = flags.DEFINE_bool(
  "compile", False, "Compile the train step of every stage for the cache, and stop."
)
_CHECK = flags.DEFINE_bool("check", False, "Resolve everything, read one batch, and stop.")


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
    config.lock()  # where the file could not be loaded, this says so
  with user_errors():
    _check_kind(config, base, recipes)
  # Heavy imports wait until the flags are known to be right.
  import jax

  from apps import demo_data
  from apps.trainer.check import check_run, compile_run
  from apps.trainer.hosts import Hosts
  from apps.trainer.loop import run_training
  from apps.trainer.progress import Terminal
  from apps.trainer.workdir import open_workdir
  import ov_sharding

  ov_sharding.initialize(gone_after_seconds=config.hosts.gone_after)
  terminal = Terminal(active=jax.process_index() == 0)
  app = make_app()
  code = 0
  with (
    Hosts(terminal.phase, **config.hosts) as hosts,
    open_workdir(_WORKDIR.value, writes=not _CHECK.value) as workdir,
  ):
    demo_data.prepare(config, workdir, terminal)
    if _CHECK.value or _COMPILE.value:
      (check_run if _CHECK.value else compile_run)(config, workdir, app, terminal)
    else:
      code = run_training(config, workdir, app, terminal, hosts)
  if code:
    sys.exit(code)


def _check_kind(config: ConfigDict, base: str, recipes: str) -> None:
  expected, given = set(getattr(configs_base, base)().model), set(config.model)
  if given != expected:
    raise ValueError(
      f"this configuration is for another app: config.model has {_some(given - expected)} and "
      f"lacks {_some(expected - given)}; use one such as {recipes}"
    )


def _some(names: set[str]) -> str:
  return ", ".join(sorted(names)) or "nothing more"
