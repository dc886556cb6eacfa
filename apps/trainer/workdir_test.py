"""Tests of workdirs in a bucket: downloads, uploads and errors."""

import pytest
import tensorstore

from apps.trainer import workdir as workdir_module
from apps.trainer.errors import TEMPORARY_FAILURE, UserError, exit_code
from apps.trainer.workdir import BucketWorkdir, Workdir, locked, open_workdir

URL = "gs://bucket/runs/one"


@pytest.fixture
def store():
  """Return an in-memory key-value store that acts as a bucket."""
  return tensorstore.KvStore.open({"driver": "memory"}).result()


def names(store):
  return {name.decode() for name in store.list().result()}


def read(store, name):
  return store.read(name).result().value


def generations(store):
  """Return the generation of every object, which changes with every write."""
  return {name: store.read(name).result().stamp.generation for name in names(store)}


def files(folder):
  return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_local_folder_is_used_directly(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with open_workdir("~/run") as workdir:
    workdir.push()
    workdir.share("nothing")
  assert workdir.path == tmp_path / "run"
  assert workdir.uri == str(workdir.path)
  assert workdir.checkpoints == str(workdir.path / "checkpoints")
  assert isinstance(workdir, Workdir)
  assert workdir.is_shared
  assert not workdir.path.exists()  # created by its first writer


def test_only_required_files_are_downloaded(tmp_path, store):
  wanted = {
    "metrics.jsonl", "config.json", "evaluation.json", "tokenizer/tokenizer.json",
    "tokenizer/packing.json", "evaluations/8.json", "wandb_run_id",
  }  # fmt: skip
  others = {
    "checkpoints/8/state/d/1", "shards/train-00000", "tokenizer/", "tokenizers", "evaluations/",
    "report.html", "tokenizer/../../outside", "metrics.jsonl.partial",
  }  # fmt: skip
  for name in wanted | others:
    store.write(name, f"content of {name}").result()
  mirror = BucketWorkdir(tmp_path / "a" / "one", URL, store)
  assert files(tmp_path) == {f"a/one/{name}" for name in wanted}
  assert (mirror.path / "metrics.jsonl").read_text() == "content of metrics.jsonl"
  assert mirror.checkpoints == f"{URL}/checkpoints"
  assert not mirror.is_shared
  before = generations(store)
  mirror.push()  # downloaded files are unchanged
  assert generations(store) == before


def test_only_new_or_changed_files_are_uploaded(tmp_path, store):
  mirror = BucketWorkdir(tmp_path, URL, store)
  for name in ("metrics.jsonl", "evaluations/4.json", "tensorboard/events", "profile/x/y.pb"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("first")
  for name in ("data/train", "wandb/run", "report.html.partial"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("stays here")
  (tmp_path / "latest").symlink_to(tmp_path / "metrics.jsonl")
  mirror.push()
  assert names(store) == {
    "metrics.jsonl", "evaluations/4.json", "tensorboard/events", "profile/x/y.pb"
  }  # fmt: skip
  before = generations(store)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write(", second")
  mirror.push()
  after = generations(store)
  assert {name for name in after if after[name] != before[name]} == {"metrics.jsonl"}
  assert read(store, "metrics.jsonl") == b"first, second"


def test_bucket_is_the_source_of_truth(tmp_path, store):
  first = BucketWorkdir(tmp_path / "first", URL, store)
  (first.path / "metrics.jsonl").write_text("sent")
  first.push()
  (first.path / "metrics.jsonl").write_text("sent, and lost with the machine")
  (first.path / "evaluation.json").write_text("lost")
  second = BucketWorkdir(tmp_path / "second", URL, store)
  assert files(second.path) == {"metrics.jsonl"}
  assert (second.path / "metrics.jsonl").read_text() == "sent"


def test_write_check_leaves_no_objects(tmp_path, store):
  BucketWorkdir(tmp_path, URL, store).check_writable()
  assert names(store) == set()


class Broken:
  """Store that rejects writes, as TensorStore does without permissions."""

  def __init__(self, store, error=None):
    self.read, self.list = store.read, store.list
    self._error = error or ValueError("PERMISSION_DENIED: no right to create it")

  def write(self, name, content):
    promise, future = tensorstore.Promise.new()
    promise.set_exception(self._error)
    return future


def test_bucket_error_message(tmp_path, store):
  mirror = BucketWorkdir(tmp_path, URL, Broken(store))
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=f"{URL}: PERMISSION_DENIED: .* may read, write and delete"):
    mirror.push()
  with pytest.raises(UserError, match="PERMISSION_DENIED") as refused:
    mirror.check_writable()
  assert exit_code(refused.value) == 2


def test_temporary_bucket_error(tmp_path, store):
  """Covers timeouts at the start, and any error after a successful request."""
  served = BucketWorkdir(tmp_path / "served", URL, store)
  served.check_writable()
  served._store = Broken(store)
  (served.path / "config.json").write_text("{}")
  with pytest.raises(UserError, match="PERMISSION_DENIED") as later:
    served.push()
  silent = Broken(store, TimeoutError())
  with pytest.raises(UserError, match="no answer; check that the bucket exists") as away:
    BucketWorkdir(tmp_path / "silent", URL, silent).check_writable()
  assert [exit_code(caught.value) for caught in (later, away)] == [
    TEMPORARY_FAILURE,
    TEMPORARY_FAILURE,
  ]


@pytest.mark.parametrize("error", [UserError("no answer"), OSError("the disk failed")])
def test_failed_upload_does_not_hide_the_error_of_the_run(store, monkeypatch, error):
  def fail(self):
    raise error

  monkeypatch.setattr(workdir_module, "_open_store", lambda uri: (URL, store))
  monkeypatch.setattr(BucketWorkdir, "check_checkpoint_access", lambda self: None)
  monkeypatch.setattr(BucketWorkdir, "push", fail)
  with pytest.raises(ZeroDivisionError), open_workdir(URL):
    raise ZeroDivisionError


@pytest.mark.parametrize(
  ("place", "message"),
  [
    ("s3://bucket/run", "a folder of this machine or gs://BUCKET/FOLDER; no other store"),
    ("gs://bucket", "expected gs://BUCKET/FOLDER, a folder for each run"),
    ("gs://bucket//", "expected gs://BUCKET/FOLDER"),
    ("gs:///run", "expected gs://BUCKET/FOLDER"),
    ("gs://bucket/../other/run", "without . and .."),
    ("gs://B/run", "Invalid GCS bucket name"),
  ],
)
def test_invalid_workdir(place, message):
  with pytest.raises(UserError, match=message), open_workdir(place):
    pass


def test_exclusive_workdir_allows_readers(tmp_path):
  place = str(tmp_path / "run")
  with open_workdir(place, exclusive=True):
    with pytest.raises(UserError, match=f"--workdir={place} is in use by process"):
      open_workdir(place, exclusive=True).__enter__()
    with open_workdir(place, writable=False) as reader:
      assert reader.path == tmp_path / "run"
  with open_workdir(place, exclusive=True):
    pass
  assert list((tmp_path / "run").iterdir()) == []


def test_checkpoint_folder_is_locked(tmp_path):
  place, setting = str(tmp_path / "shared"), "config.checkpoint.dir=shared"
  expected = "checkpoint.dir=shared is in use by process"
  with locked(place, setting, print), pytest.raises(UserError, match=expected):
    locked(place, setting, print).__enter__()
  with locked("", setting, print):
    pass
