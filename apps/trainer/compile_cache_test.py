"""Tests of the compile cache: reuse across starts, damaged entries, stores."""

import errno
import functools
import os
from pathlib import Path
import stat
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.trainer import compile_cache
from apps.trainer.compile_cache import CompileCache, Program, short_key
from apps.trainer.errors import UserError


class Start:
  """Simulates the start of a process, without compiled programs in memory."""

  def __init__(self, folder: Path | str = "", store: Path | str = "", rows: int = 4):
    jax.clear_caches()
    self.messages: list[str] = []
    self.traces = 0
    with CompileCache(str(folder), str(store), self.messages.append) as cache:
      cache.fetch()
      with cache.watch("main: train step") as self.programs:
        self.result = self.step(np.ones([rows, 8], np.float32))
      cache.push(required=True)

  @functools.partial(jax.jit, static_argnums=0)
  def step(self, x):
    self.traces += 1
    return jnp.tanh(x @ x.T).sum()

  @property
  def program(self) -> Program:
    (program,) = (p for p in self.programs if p.name == "jit(step)")
    return program

  @property
  def line(self) -> str:
    (line,) = (line for line in self.messages if line.startswith("main: train step "))
    return line


def entries(folder: Path) -> list[Path]:
  return sorted(folder.glob("**/jit_step-*-cache"))


def test_second_start_loads_from_cache(tmp_path):
  first, second = Start(tmp_path), Start(tmp_path)
  (entry,) = entries(tmp_path)
  key = short_key(entry.name.removesuffix("-cache"))
  size = entry.stat().st_size
  assert first.program.key == second.program.key == entry.name.removesuffix("-cache")
  assert first.program.size == second.program.size == size > 0
  # Microseconds to compile: only a watched program is kept.
  assert " compiled in " in first.line and f"cached in {tmp_path} as {key} (0." in first.line
  assert " loaded from the compile cache in " in second.line and key in second.line
  assert first.traces == second.traces == 1
  assert first.result == second.result


def test_cache_miss_for_other_settings(tmp_path):
  keys = {Start(tmp_path).program.key}
  other = Start(tmp_path, rows=5)
  assert not other.program.loaded
  with jax.default_matmul_precision("float32"):
    precise = Start(tmp_path)
  assert not precise.program.loaded
  assert len(keys | {other.program.key, precise.program.key}) == 3
  assert Start(tmp_path).program.loaded


@pytest.mark.parametrize("left", [0, 100, -1])
def test_truncated_entry_is_logged_and_replaced(tmp_path, left):
  first = Start(tmp_path)
  (entry,) = entries(tmp_path)
  whole = entry.read_bytes()
  entry.write_bytes(whole[:left])
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
    second = Start(tmp_path)
  assert not second.program.loaded and second.program.damaged
  assert "compiled in" in second.line and "the existing entry could not be read" in second.line
  assert entry.stat().st_size == second.program.size
  assert second.result == first.result
  assert Start(tmp_path).program.loaded


def test_disabled_cache_is_logged(tmp_path):
  start = Start()
  assert start.line.endswith("not cached: config.compile_cache is empty")
  assert not Start().program.loaded


def test_jax_config_is_restored(tmp_path):
  before = dict(jax.config.values)
  Start(tmp_path)
  assert dict(jax.config.values) == before
  jax.clear_caches()
  Start.step(Start(), np.ones([6, 8], np.float32))
  assert len(entries(tmp_path)) == 1


def test_store_serves_another_machine(tmp_path):
  store = tmp_path / "store"
  first = Start(tmp_path / "a", store)
  second = Start(tmp_path / "b", store)
  third = Start(tmp_path / "b", store)
  assert not first.program.loaded and second.program.loaded and third.program.loaded
  assert (
    "no programs for these devices yet" in first.messages[0]
    and "1 programs saved" in first.messages[-1]
  )
  assert "1 of 1 programs copied" in second.messages[0] and "0 already here" in second.messages[0]
  assert "0 of 1 programs copied" in third.messages[0] and "1 already here" in third.messages[0]
  (kept,) = entries(store)
  (fetched,) = entries(tmp_path / "b")
  assert kept.read_bytes() == fetched.read_bytes()
  assert kept.parent == store / f"jax-{jax.__version__}" / f"cpu-{jax.device_count()}"
  assert sorted(p.name for p in kept.parent.iterdir()) == [kept.name]  # and no temporary file


def test_loaded_entries_are_copied_to_new_store(tmp_path):
  Start(tmp_path / "a")
  start = Start(tmp_path / "a", tmp_path / "store")
  assert start.program.loaded and len(entries(tmp_path / "store")) == 1


def test_damaged_store_entry_is_replaced(tmp_path):
  store = tmp_path / "store"
  Start(tmp_path / "a", store)
  (kept,) = entries(store)
  kept.write_bytes(kept.read_bytes()[:100])
  with pytest.warns(UserWarning, match="Error reading"):
    assert Start(tmp_path / "b", store).program.damaged
  assert Start(tmp_path / "c", store).program.loaded


def test_foreign_files_are_not_copied(tmp_path):
  store = tmp_path / "store" / f"jax-{jax.__version__}" / f"cpu-{jax.device_count()}"
  store.mkdir(parents=True)
  (store / "notes.txt").write_text("not an entry")
  (store / "part-0123456789abcdef").write_text("cut")
  Start(tmp_path / "a", tmp_path / "store")
  assert [p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith("jit_")] == []


def test_only_newest_entries_are_copied(tmp_path, monkeypatch):
  store = tmp_path / "store"
  Start(tmp_path / "a", store)
  (entry,) = entries(store)
  monkeypatch.setattr("apps.trainer.compile_store._FETCH_BYTES", entry.stat().st_size - 1)
  start = Start(tmp_path / "b", store)
  assert (
    "0 of 1 programs copied" in start.messages[0] and "1 older ones skipped" in start.messages[0]
  )
  assert not start.program.loaded


def test_unreadable_store(tmp_path, monkeypatch):
  Start(tmp_path / "a", tmp_path / "store")

  def copy(source, folder):
    raise OSError("quota\nexceeded")

  messages = []
  with CompileCache(str(tmp_path / "b"), str(tmp_path / "store"), messages.append) as cache:
    monkeypatch.setattr("apps.trainer.compile_store._copy", copy)
    cache.fetch()
  assert messages == [
    f"compile store {tmp_path}/store cannot be read, programs are compiled: OSError: quota exceeded"
  ]


def test_unwritable_store(tmp_path):
  (tmp_path / "file").write_text("")
  messages = []
  with CompileCache(
    str(tmp_path / "a"), str(tmp_path / "file" / "store"), messages.append
  ) as cache:
    cache.fetch()
    with cache.watch("main: train step"):
      jax.jit(jnp.sin)(np.ones(3, np.float32))
    cache.push()
    assert "cannot be written: " in messages[-1], messages
    with pytest.raises(OSError, match="file/store cannot be written: "):
      cache.push(required=True)


def test_slow_programs_are_logged(tmp_path, monkeypatch):
  monkeypatch.setattr("apps.trainer.compile_cache._LOG_SECONDS", 0.0)
  messages = []
  with CompileCache(str(tmp_path), "", messages.append):
    jax.jit(lambda x: jnp.cos(x) + 3)(np.ones(3, np.float32))
  assert any(line.startswith("jit(<lambda>) compiled in ") for line in messages), messages


@pytest.mark.parametrize(
  "folder, store, messages",
  [
    ("gs://bucket/xla", "", "the cache is a local folder; config.compile_store=gs://"),
    ("/tmp/xla", "s3://bucket/xla", "expected a folder or gs://bucket/folder"),
    ("", "gs://bucket/xla", "set config.compile_cache, too"),
  ],
)
def test_invalid_folder_or_store(folder, store, messages):
  with pytest.raises(ValueError, match=messages):
    CompileCache(folder, store, print)


def test_unusable_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file/xla cannot be used: Not a directory; choose another"):
    CompileCache(str(tmp_path / "file" / "xla"), "", print).__enter__()


@pytest.mark.parametrize("umask", (0o000, 0o002, 0o022, 0o077))
def test_new_folder_is_private(tmp_path, umask):
  before = os.umask(umask)
  try:
    Start(tmp_path / "home" / "xla")
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "home" / "xla").stat().st_mode) == 0o700


def test_world_writable_folder_is_restricted(tmp_path):
  Start(tmp_path / "xla")
  (entry,) = entries(tmp_path / "xla")
  planted = tmp_path / "xla" / "planted-cache"
  planted.write_bytes(b"")
  planted.chmod(0o666)
  (tmp_path / "xla").chmod(0o777)
  second = Start(tmp_path / "xla")
  assert stat.S_IMODE((tmp_path / "xla").stat().st_mode) == 0o700
  assert entry.exists() and not planted.exists()
  (line,) = (line for line in second.messages if "mode 0777" in line)
  assert "1 programs that others could have changed are removed" in line
  assert second.program.loaded
  assert not any("mode 0" in line for line in Start(tmp_path / "xla").messages)  # only once


def test_folder_of_another_user(tmp_path, monkeypatch):
  (tmp_path / "xla").mkdir(mode=0o700)
  real = compile_cache.Path.stat

  def of_another(path, **kwargs):
    status = list(real(path, **kwargs)[:10])
    status[4] = os.geteuid() + 1  # st_uid
    return os.stat_result(status)

  monkeypatch.setattr(compile_cache.Path, "stat", of_another)
  with pytest.raises(UserError, match="compile_cache=.* belongs to another user"):
    Start(tmp_path / "xla")


def test_full_disk_disables_cache(tmp_path, monkeypatch):
  def full(path, *args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

  expected = Start(tmp_path / "first").result
  monkeypatch.setattr(compile_cache.Path, "mkdir", full)
  start = Start(tmp_path / "second")
  assert start.result == expected
  assert "No space left on device; programs are not cached" in "\n".join(start.messages)


def test_unwritable_entries_are_reported_once(tmp_path, recwarn):
  store = CompileCache(str(tmp_path / "xla"), "", (messages := []).append)
  with store as cache:
    for name in ("jit_a", "jit_b"):
      cache._current.key = f"{name}-{'0' * 64}"
      part = cache._path(cache._current.key)
      part.write_bytes(b"part")
      text = (
        f"{compile_cache._NOT_WRITTEN} for '{name}': OSError: [Errno 28] No space left on device"
      )
      warnings.warn(text, stacklevel=1)
      assert not part.exists()
    warnings.warn("another", stacklevel=1)
  (line,) = messages
  assert line.endswith(
    "cannot be written: [Errno 28] No space left on device; programs are not cached"
  )
  assert [str(warning.message) for warning in recwarn] == ["another"]
