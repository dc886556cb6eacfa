"""Tests of the workdir lock: one live owner; recovery from ended, stale and lost owners."""

import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import pytest
import tensorstore

from apps.trainer import lock
from apps.trainer.errors import UserError
from ov_data import lock_owner

_HOLD = """
import sys, time
from pathlib import Path
from apps.trainer import lock
lock.RENEW_SECONDS = 0.05
if sys.argv[2] == "lease":
  lock._flock_reaches_all = lambda path: False
with lock.folder(Path(sys.argv[1]), "--workdir=run"):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
  monkeypatch.setattr(lock, "STALE_SECONDS", 0.6)
  for name in lock_owner._JOB_VARIABLES:
    monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["flock", "lease"])
def kind(request, monkeypatch):
  if request.param == "lease":
    monkeypatch.setattr(lock, "_flock_reaches_all", lambda path: False)
  return request.param


@pytest.fixture
def store():
  return tensorstore.KvStore.open({"driver": "memory"}).result()


def start(path, kind, **variables):
  """Start a process that holds the lock of a folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(path), kind],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def end(process, number=signal.SIGKILL):
  process.send_signal(number)
  process.communicate()


def owner(path):
  return json.loads((path / lock.FILE).read_text())


def elsewhere(**changes):
  """Return an owner on another machine."""
  values = {"host": "other", "machine": "boot:1", **changes}
  return dataclasses.replace(lock_owner.this_process(), **values)


def test_second_process_fails_with_owner_and_remedy(tmp_path, kind):
  process = start(tmp_path, kind)
  try:
    expected = rf"--workdir=run is in use by process {process.pid} on \S+ \(since .* UTC\); "
    expected += rf".*kill {process.pid}"
    with pytest.raises(UserError, match=expected), lock.folder(tmp_path, "--workdir=run"):
      pass
    assert process.poll() is None
  finally:
    end(process)


def test_lock_of_killed_owner_is_taken_over(tmp_path, kind):
  end(start(tmp_path, kind))
  assert (tmp_path / lock.FILE).exists()
  watched = []
  with lock.folder(tmp_path, "--workdir=run", watched.append):
    assert owner(tmp_path)["pid"] == os.getpid()
  assert not watched
  assert not (tmp_path / lock.FILE).exists()


def test_lock_held_by_child_of_killed_owner(tmp_path):
  file = tmp_path / lock.FILE
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  record = dataclasses.replace(lock_owner.this_process(), pid=gone.pid, started="1")
  file.write_bytes(lock_owner.to_bytes(record))
  child = subprocess.Popen(["flock", str(file), "sleep", "60"])
  try:
    while subprocess.run(["flock", "-n", str(file), "true"]).returncode == 0:
      pass
    with lock.folder(tmp_path, "--workdir=run"):
      assert owner(tmp_path)["pid"] == os.getpid()
  finally:
    end(child)


def test_same_job_on_another_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_flock_reaches_all", lambda path: False)
  monkeypatch.setenv("SLURM_JOB_ID", "41")
  (tmp_path / lock.FILE).write_bytes(lock_owner.to_bytes(elsewhere()))
  watched = []
  with lock.folder(tmp_path, "--workdir=run", watched.append):
    assert owner(tmp_path)["host"] != "other"
  assert not watched


def test_stale_owner_on_another_machine(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(lock, "_flock_reaches_all", lambda path: False)
  (tmp_path / lock.FILE).write_bytes(lock_owner.to_bytes(elsewhere(job="SLURM_JOB_ID=40")))
  watched = []
  with lock.folder(tmp_path, "--workdir=run", watched.append):
    assert owner(tmp_path)["host"] != "other"
  assert len(watched) == 1 and "on other" in watched[0]


def test_live_owner_on_another_machine(tmp_path, kind, monkeypatch):
  process = start(tmp_path, kind)
  monkeypatch.setattr(lock_owner, "_machine", lambda: "boot:1")  # another machine
  try:
    expected = f"in use by process {process.pid}"
    with pytest.raises(UserError, match=expected), lock.folder(tmp_path, "--workdir=run"):
      pass
  finally:
    end(process)


def test_owner_exits_after_losing_lock(tmp_path, kind):
  process = start(tmp_path, kind)
  new = tmp_path / "new"
  new.write_bytes(lock_owner.to_bytes(elsewhere()))
  while process.poll() is None:  # a renewal may replace it once
    if not new.exists():
      new.write_bytes(lock_owner.to_bytes(elsewhere()))
    os.replace(new, tmp_path / lock.FILE)
    try:
      process.wait(0.5)
    except subprocess.TimeoutExpired:
      continue
  _, err = process.communicate()
  assert process.returncode == 2
  assert len(err.splitlines()) == 1 and "was taken over by process" in err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_incomplete_or_foreign_record_is_ignored(tmp_path, kind, content):
  (tmp_path / lock.FILE).write_bytes(content)
  with lock.folder(tmp_path, "--workdir=run"):
    assert owner(tmp_path)["pid"] == os.getpid()


def test_symlink_is_not_followed(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / lock.FILE).symlink_to(tmp_path / "precious")
  with pytest.raises(OSError), lock.folder(tmp_path / "run", "--workdir=run"):
    pass
  assert not (tmp_path / "precious").exists()


def test_bucket_lease_lifecycle(store):
  with lock.bucket(store, "--workdir=gs://b/r"):
    expected = f"in use by process {os.getpid()}"
    with pytest.raises(UserError, match=expected), lock.bucket(store, "--workdir=gs://b/r"):
      pass
    first = store.read(lock.FILE).result().value
    while store.read(lock.FILE).result().value == first:
      pass
    assert json.loads(store.read(lock.FILE).result().value)["renewals"] > 0
  assert store.read(lock.FILE).result().state == "missing"


def test_bucket_lease_that_was_deleted_is_written_again(store):
  lease = lock._Lease(lock._BucketRecord(store), lock_owner.this_process())
  lease.acquire("--workdir=gs://b/r", print)
  store.write(lock.FILE, None).result()
  assert lease.renew() is None and lease.renew() is None
  assert store.read(lock.FILE).result().state == "value"


def test_bucket_lease_of_two_new_owners_goes_to_one(store):
  records = [lock._BucketRecord(store) for _ in range(2)]
  reads = [record.read() for record in records]
  won = [record.write(b"x", read[1]) for record, read in zip(records, reads)]
  assert won[0] is not None and won[1] is None


def test_bucket_lease_taken_over_is_noticed(store):
  lease = lock._Lease(lock._BucketRecord(store), lock_owner.this_process())
  lease.acquire("--workdir=gs://b/r", print)
  store.write(lock.FILE, lock_owner.to_bytes(elsewhere())).result()
  assert lease.renew().host == "other"
  lease.release()  # keeps the lease of the other owner
  assert json.loads(store.read(lock.FILE).result().value)["host"] == "other"


def test_reused_process_id():
  me = lock_owner.this_process()
  assert lock_owner.has_ended(me, me) is False
  assert lock_owner.has_ended(dataclasses.replace(me, started="1"), me) is True
  assert lock_owner.has_ended(elsewhere(), me) is None


def test_lock_with_deleted_folder(tmp_path):
  folder = tmp_path / "run"
  with lock.folder(folder, "--workdir=run"):
    (folder / lock.FILE).unlink()
    folder.rmdir()
  assert not folder.exists()


def test_network_file_systems_without_flock_are_known(monkeypatch):
  mounts = "a / ext4 rw 0 0\nb /mnt/gcs fuse.gcsfuse rw 0 0\nc /mnt/gcs/nfs nfs4 rw 0 0\n"
  real = Path.read_text

  def read_text(path, *args):
    return mounts if str(path) == "/proc/self/mounts" else real(path, *args)

  monkeypatch.setattr(Path, "read_text", read_text)
  reached = [lock._flock_reaches_all(Path(p)) for p in ("/x", "/mnt/gcs/x", "/mnt/gcs/nfs/x")]
  assert reached == [True, False, True]
