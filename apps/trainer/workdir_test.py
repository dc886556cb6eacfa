"""A folder that stands for one in a bucket: what comes, what goes, and when."""

import pytest
import tensorstore

from apps.trainer.errors import AGAIN, UserError, exit_code
from apps.trainer.workdir import Mirror, Workdir, locked, open_workdir

URL = "gs://bucket/runs/one"


@pytest.fixture
def store():
  """Objects by name, as those of a bucket; TensorStore's own, in memory."""
  return tensorstore.KvStore.open({"driver": "memory"}).result()


def names(store):
  return {name.decode() for name in store.list().result()}


def read(store, name):
  return store.read(name).result().value


def generations(store):
  """Changes of a name with every write of it."""
  return {name: store.read(name).result().stamp.generation for name in names(store)}


def files(folder):
  return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_local_folder_is_used_as_it_is(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with open_workdir("~/run") as workdir:
    workdir.push()
    workdir.share("nothing")
  assert workdir.path == tmp_path / "run"
  assert workdir.place == str(workdir.path)
  assert workdir.checkpoints == str(workdir.path / "checkpoints")
  assert isinstance(workdir, Workdir)
  assert workdir.common
  assert not workdir.path.exists()  # who writes there makes it


def test_only_what_a_run_reads_again_is_fetched(tmp_path, store):
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
  mirror = Mirror(tmp_path / "a" / "one", URL, store)
  assert files(tmp_path) == {f"a/one/{name}" for name in wanted}
  assert (mirror.path / "metrics.jsonl").read_text() == "content of metrics.jsonl"
  assert mirror.checkpoints == f"{URL}/checkpoints"
  assert not mirror.common
  before = generations(store)
  mirror.push()  # what was fetched is there already
  assert generations(store) == before


def test_what_is_new_or_changed_is_sent_and_nothing_else(tmp_path, store):
  mirror = Mirror(tmp_path, URL, store)
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


def test_the_bucket_is_believed_and_not_what_this_machine_still_has(tmp_path, store):
  first = Mirror(tmp_path / "first", URL, store)
  (first.path / "metrics.jsonl").write_text("sent")
  first.push()
  (first.path / "metrics.jsonl").write_text("sent, and lost with the machine")
  (first.path / "evaluation.json").write_text("lost")
  second = Mirror(tmp_path / "second", URL, store)
  assert files(second.path) == {"metrics.jsonl"}
  assert (second.path / "metrics.jsonl").read_text() == "sent"


def test_trying_to_write_leaves_nothing(tmp_path, store):
  Mirror(tmp_path, URL, store).try_writing()
  assert names(store) == set()


class Broken:
  """Refuses to write, as TensorStore does where permissions are missing."""

  def __init__(self, store, error=None):
    self.read, self.list = store.read, store.list
    self._error = error or ValueError("PERMISSION_DENIED: no right to create it")

  def write(self, name, content):
    promise, future = tensorstore.Promise.new()
    promise.set_exception(self._error)
    return future


def test_a_fault_says_where_and_what_to_do(tmp_path, store):
  mirror = Mirror(tmp_path, URL, Broken(store))
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=f"{URL}: PERMISSION_DENIED: .* may read, write and delete"):
    mirror.push()
  with pytest.raises(UserError, match="PERMISSION_DENIED") as refused:
    mirror.try_writing()
  assert exit_code(refused.value) == 2


def test_a_fault_that_may_pass_asks_for_another_start(tmp_path, store):
  """No answer at the start, and whatever comes after the bucket did what it was asked."""
  served = Mirror(tmp_path / "served", URL, store)
  served.try_writing()
  served._store = Broken(store)
  (served.path / "config.json").write_text("{}")
  with pytest.raises(UserError, match="PERMISSION_DENIED") as later:
    served.push()
  silent = Broken(store, TimeoutError())
  with pytest.raises(UserError, match="no answer; see that the bucket is there") as away:
    Mirror(tmp_path / "silent", URL, silent).try_writing()
  assert [exit_code(caught.value) for caught in (later, away)] == [AGAIN, AGAIN]


@pytest.mark.parametrize(
  ("place", "said"),
  [
    ("s3://bucket/run", "a folder of this machine or gs://BUCKET/FOLDER; no other store"),
    ("gs://bucket", "expected gs://BUCKET/FOLDER, a folder for each run"),
    ("gs://bucket//", "expected gs://BUCKET/FOLDER"),
    ("gs:///run", "expected gs://BUCKET/FOLDER"),
    ("gs://bucket/../other/run", "without . and .."),
    ("gs://B/run", "Invalid GCS bucket name"),
  ],
)
def test_a_place_that_cannot_be_is_refused(place, said):
  with pytest.raises(UserError, match=said), open_workdir(place):
    pass


def test_an_exclusive_workdir_has_one_run_and_any_number_of_readers(tmp_path):
  place = str(tmp_path / "run")
  with open_workdir(place, exclusive=True):
    with pytest.raises(UserError, match=f"--workdir={place} is in use by process"):
      open_workdir(place, exclusive=True).__enter__()
    with open_workdir(place, writes=False) as reader:
      assert reader.path == tmp_path / "run"
  with open_workdir(place, exclusive=True):
    pass
  assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_of_checkpoints_is_locked_like_a_workdir(tmp_path):
  place, setting = str(tmp_path / "shared"), "config.checkpoint.dir=shared"
  expected = "checkpoint.dir=shared is in use by process"
  with locked(place, setting, print), pytest.raises(UserError, match=expected):
    locked(place, setting, print).__enter__()
  with locked("", setting, print):
    pass
