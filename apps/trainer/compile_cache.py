"""Persistent compilation cache: stores, reuses and reports compiled programs.

  with CompileCache("~/.cache/openvision/xla", "gs://bucket/xla", terminal.phase) as cache:
    cache.fetch()                               # copy missing entries from the store
    with cache.watch("main: train step"):
      state, metrics = train_step(state, batch)   # prints: compiled or loaded, seconds, key
    cache.push()                                # copy new entries to the store

The folder is JAX's persistent cache, always local. Its keys are hashes of the program, the compile
options, XLA flags, versions of jaxlib and the backend, and the devices with their topology. With
XLA's autotuning cache enabled, JAX would also hash the path of the folder, so entries could not be
shared between folders or through a bucket. The autotuning cache is therefore disabled.

The store is a second folder, local or gs://, shared between machines. Only complete entries are
copied, into one sub-folder per version and kind of devices. Entries contain native code that is
executed, so a store must be trusted like the program itself. They are JAX's own cache entries;
serialized executables of `jax.experimental.serialize_executable` would in addition be unpickled.

Process 0 writes the folder and the store; every process reads both. Where hosts have separate home
directories, the store spares the other processes the compilation.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import functools
import os
from pathlib import Path
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self
import warnings

from absl import logging
import jax
from jax.experimental.compilation_cache import compilation_cache

from apps.trainer.compile_store import ENTRY, SUFFIX, Store, megabytes
from apps.trainer.errors import UserError, one_line
from apps.trainer.hooks import COMPILING, Hook

if TYPE_CHECKING:
  from apps.trainer.stages import Stage
  from apps.trainer.task import Evaluation

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"  # also recorded for cache hits
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"

# Warnings logged by JAX.
_NOT_WRITTEN = "Error writing persistent compilation cache entry"
_NOT_READ = "Error reading persistent compilation cache entry"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # a full cache costs a compilation, not the run

_LOG_SECONDS = 5.0  # all programs that take longer are logged

# Outside `watch` JAX keeps programs that compile for at least one second; `watch` keeps all.
_KEEP_ALL = {
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Program(NamedTuple):
  """One compiled or loaded program.

  Attributes:
    name: name in JAX, such as "jit(update)".
    key: key of the cache entry; None without a cache.
    loaded: whether the program was loaded from the cache, not compiled.
    damaged: whether an entry existed but could not be read.
    trace_seconds: seconds of tracing and lowering, which the cache does not avoid.
    seconds: seconds of compiling or loading.
    size: bytes of the entry in the local folder; None if there is none.
  """

  name: str
  key: str | None
  loaded: bool
  damaged: bool
  trace_seconds: float
  seconds: float
  size: int | None


class _Current(threading.local):
  """State of the program that this thread compiles."""

  key: str | None = None
  loaded = False
  damaged = False
  traced = 0.0
  lowered = 0.0


class CompileCache(Hook):
  """Set up JAX's compilation cache, report its programs, and copy entries from and to a store."""

  def __init__(self, folder: str, store: str, log: Callable[[str], None]):
    """Validate the arguments without touching any folder.

    Args:
      folder: `config.compile_cache`; "" disables the cache.
      store: `config.compile_store`; "" disables the store.
      log: function that prints a line; prints only on process 0.

    Raises:
      ValueError: the folder or the store is not usable.
    """
    if "://" in folder:
      raise ValueError(
        f"config.compile_cache={folder}: the cache is a local folder; "
        "config.compile_store=gs://... copies its entries to and from a bucket"
      )
    if "://" in store and not store.startswith("gs://"):
      raise ValueError(f"config.compile_store={store}: expected a folder or gs://bucket/folder")
    if store and not folder:
      raise ValueError(
        f"config.compile_store={store} needs a local folder to copy from and to: "
        "set config.compile_cache, too"
      )
    self._folder = Path(folder).expanduser().absolute() if folder else None
    self._store = Store(store, log) if store else None
    self._log = log
    self._current = _Current()
    self._watched: list[Program] | None = None
    self._used: dict[str, Program] = {}  # by key
    self._offered = 0  # size of `_used` at the last push
    self._full = False  # whether an entry could not be written
    self._compiling = contextlib.ExitStack()

  def __enter__(self) -> Self:
    if self._folder is not None:
      self._open(self._folder)
    self._undo = contextlib.ExitStack()
    self._undo.callback(compilation_cache.reset_cache)  # JAX opens the folder only once
    settings = {
      "jax_compilation_cache_dir": None if self._folder is None else str(self._folder),
      "jax_persistent_cache_enable_xla_caches": "none",
    }
    self._undo.enter_context(_settings(settings))
    compilation_cache.reset_cache()
    _watch_files()
    _file_watchers.append(self._on_open)
    self._undo.callback(_file_watchers.remove, self._on_open)
    self._undo.enter_context(warnings.catch_warnings())
    for text in (_NOT_READ, _NOT_WRITTEN):
      warnings.filterwarnings("always", text)
    self._show, warnings.showwarning = warnings.showwarning, self._on_warning
    jax.monitoring.register_event_listener(self._on_event)
    self._undo.callback(jax.monitoring.unregister_event_listener, self._on_event)
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._undo.callback(jax.monitoring.unregister_event_duration_listener, self._on_duration)
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._compiling.close()
    self._undo.close()

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """Watch the train step of a stage during compilation."""
    self._compiling.close()
    if phase == COMPILING:
      self._compiling.enter_context(self.watch(f"{stage}: train step"))

  def on_step(self, step: int) -> None:
    """Copy new entries to the store."""
    if len(self._used) > self._offered:
      self.push()

  def on_eval(self, stage: "Stage", step: int, evaluation: "Evaluation") -> None:
    """Copy new entries to the store."""
    self.push()

  @contextlib.contextmanager
  def watch(self, label: str) -> Iterator[list[Program]]:
    """Report the last program that the block compiles, and cache it regardless of its size.

    Yields:
      A list that collects the programs that the block compiles or loads.
    """
    programs: list[Program] = []
    self._watched = programs
    try:
      with _settings(_KEEP_ALL):
        yield programs
    finally:
      self._watched = None
    if programs:
      self._log(self._text(label, programs[-1]))
      if jax.process_index() and not programs[-1].loaded:
        logging.warning("process %d: %s", jax.process_index(), self._text(label, programs[-1]))

  def fetch(self) -> None:
    """Copy missing entries from the store; unreadable entries are compiled instead."""
    if self._store is None or self._folder is None:
      return
    try:
      self._store.fetch(self._folder)
    except Exception as error:
      self._warn(f"{self._store.path} cannot be read, programs are compiled: {_short(error)}")

  def push(self, *, required: bool = False) -> None:
    """Copy entries that this process created or used and the store lacks; process 0 only.

    Args:
      required: raise an error if the store cannot be written, instead of logging it.

    Raises:
      OSError: the store is required and cannot be written.
    """
    self._offered = len(self._used)
    if self._store is None or self._folder is None or jax.process_index():
      return
    try:
      self._store.push(
        self._folder, {f"{key}{SUFFIX}": found.damaged for key, found in self._used.items()}
      )
    except Exception as error:
      message = f"{self._store.path} cannot be written: {_short(error)}"
      if required:
        raise OSError(message) from error
      self._warn(message)

  def _open(self, folder: Path) -> None:
    """Create the folder with access for this user only, because entries contain native code.

    Raises:
      UserError: the folder cannot be read, or belongs to another user.
    """
    try:
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      next(folder.iterdir(), None)
      status = folder.stat()
      if status.st_uid not in (0, os.geteuid()):
        raise UserError(
          f"config.compile_cache={folder} belongs to another user (number {status.st_uid}), who "
          'could run code in this program with it; choose another folder, or "" to compile at '
          "every start"
        )
      if stat.S_IMODE(status.st_mode) & 0o077 and status.st_uid == os.geteuid():
        self._close_to_others(folder, stat.S_IMODE(status.st_mode))
    except OSError as error:
      if error.errno in DISK_FULL:
        self._warn(
          f"{folder} cannot be created: {error.strerror}; programs are not cached", "cache"
        )
        return
      raise UserError(
        f"config.compile_cache={folder} cannot be used: {error.strerror}; choose another folder, "
        'or "" to compile at every start'
      ) from error

  def _close_to_others(self, folder: Path, mode: int) -> None:
    """Revoke the access of other users and remove the entries that they could have written."""
    folder.chmod(0o700)
    if not mode & 0o022:
      return
    removed = 0
    for path in folder.iterdir():
      status = path.lstat()
      changeable = status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o022
      if changeable and not stat.S_ISDIR(status.st_mode):  # directories are not read
        path.unlink(missing_ok=True)
        removed += 1
    self._warn(
      f"{folder} could be written by other users (mode {mode:04o}): access is now restricted to "
      f"you, and {removed} programs that others could have changed are removed",
      "cache",
    )

  def _on_open(self, path: Path) -> None:
    """Record the key of the entry that this thread reads or writes."""
    if path.parent == self._folder and ENTRY.fullmatch(path.name):
      self._current.key = path.name.removesuffix(SUFFIX)

  def _on_event(self, event: str, **kwargs: str | int) -> None:
    if event == _REQUEST:
      vars(self._current).update(key=None, loaded=False, damaged=False)
    elif event == _HIT:
      self._current.loaded = True

  def _on_warning(self, message: Warning | str, *args: Any, **kwargs: Any) -> None:
    """Remove damaged or incomplete entries, and print each cause once.

    JAX would keep a damaged entry and compile at every start.
    """
    written, read = (str(message).startswith(text) for text in (_NOT_WRITTEN, _NOT_READ))
    if (written or read) and self._current.key and jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._path(self._current.key).unlink(missing_ok=True)
    self._current.damaged |= read
    if not written:
      self._show(message, *args, **kwargs)
    elif not self._full:
      self._full = True
      cause = str(message).rpartition(": ")[2]
      self._warn(f"{self._folder} cannot be written: {cause}; programs are not cached", "cache")

  def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
    current = self._current
    if event == _TRACED:
      current.traced = duration_secs  # the outermost function finishes last
    elif event == _LOWERED:
      current.lowered = duration_secs
    elif event == _COMPILED:
      path = self._path(current.key) if current.key else None
      program = Program(
        name=str(kwargs.get("fun_name", "a program")),
        key=current.key,
        loaded=current.loaded,
        damaged=current.damaged,
        trace_seconds=current.traced + current.lowered,
        seconds=duration_secs,
        size=path.stat().st_size if path and path.exists() else None,
      )
      vars(current).clear()  # clears the state of this thread only
      if program.key:
        self._used[program.key] = program
      if self._watched is not None:
        self._watched.append(program)
      elif program.damaged or program.seconds + program.trace_seconds >= _LOG_SECONDS:
        self._log(self._text(program.name, program))

  def _path(self, key: str) -> Path:
    assert self._folder is not None
    return self._folder / f"{key}{SUFFIX}"

  def _text(self, label: str, program: Program) -> str:
    took = f"{program.seconds:.1f} s (tracing {program.trace_seconds:.1f} s before)"
    if self._folder is None:
      return f"{label} compiled in {took}; not cached: config.compile_cache is empty"
    if program.key is None:
      return f"{label} compiled in {took}, not cached in {self._folder}: " + (
        "process 0 alone writes there" if jax.process_index() else "it could not be written"
      )
    size = "" if program.size is None else f" ({megabytes(program.size)})"
    key = short_key(program.key)
    if program.loaded:
      return f"{label} loaded from the compile cache in {took}: {key}{size}"
    kept = f"cached in {self._folder} as {key}{size}"
    if program.size is None:
      kept = f"not cached in {self._folder}: {key} could not be written"
    damaged = "; the existing entry could not be read" if program.damaged else ""
    return f"{label} compiled in {took}, {kept}{damaged}"

  def _warn(self, text: str, what: str = "store") -> None:
    if jax.process_index():
      logging.warning("process %d: compile %s %s", jax.process_index(), what, text)
    self._log(f"compile {what} {text}")


def short_key(key: str) -> str:
  """Return a readable key: the name of the program and the first digits of the hash."""
  name, _, digest = key.rpartition("-")
  return f"{name}-{digest[:8]}"


_file_watchers: list[Callable[[Path], None]] = []


@functools.cache
def _watch_files() -> None:
  """Call `_file_watchers` for every opened file. Audit hooks cannot be removed, so add only one.

  JAX reports that it found an entry, but not which one.
  """

  def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _file_watchers and str(arguments[0]).endswith(SUFFIX):
      for watcher in _file_watchers:
        watcher(Path(str(arguments[0])))

  sys.addaudithook(audit)


@contextlib.contextmanager
def _settings(values: dict[str, Any]) -> Iterator[None]:
  """Set JAX configuration values within a block."""
  before = {name: getattr(jax.config, name) for name in values}
  try:
    for name, value in values.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def _short(error: Exception) -> str:
  return f"{type(error).__name__}: {one_line(error, 300)}"
