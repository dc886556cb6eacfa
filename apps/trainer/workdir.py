"""The folder of a run: one of this machine, or one of a bucket.

  with open_workdir("gs://bucket/run") as workdir:
    (workdir.path / "evaluation.json").write_text(...)  # a folder of this machine in either case
    workdir.push()  # and now it is in the bucket

For a bucket that folder is a temporary one. A run appends to its files and renames them, which
objects of a bucket cannot do, so it works here and copies: from the bucket when it is opened, to
the bucket before each checkpoint, after each evaluation and at the end. Checkpoints are not copied;
orbax writes and reads them in the bucket.

The folder is a new one each time and goes at the end, so the bucket alone says how far a run has
come: nothing that an attempt before has left on this machine is believed, and a second program on
the same workdir (`--check`, an export) disturbs nothing.

Every process of a multi-host run has a folder of its own and sends only what it wrote itself:
process 0 nearly everything, the others their profiles.
"""

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path, PurePosixPath
import tempfile

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import tensorstore

from apps.trainer import lock
from apps.trainer.errors import Unreachable, UserError

# What a run reads again; a name that ends with / is a folder. Nothing else is fetched, whatever
# may lie beside it.
FETCHED = (
  "config.json", "evaluation.json", "evaluations/", "metrics.jsonl", "tokenizer/", "wandb_run_id",
)  # fmt: skip
# What is not sent: the demo's pictures, which every host draws alike, and what goes to Weights &
# Biases by itself.
KEPT_HERE = ("data", "wandb")

_OPENING = 60  # seconds for the first answer of a bucket; without a network it never comes
_SENDING = 600  # seconds for an upload, repetitions after faults of the network included


class Workdir:
  """A folder of this machine, or one that all machines see.

  Attributes:
    path: where files are read and written.
    place: how the user calls it, for messages.
    checkpoints: where they belong if the configuration names no other place.
    common: whether all processes see the same `path`.
  """

  common = True

  def __init__(self, path: Path):
    self.path, self.place = path, str(path)
    self.checkpoints = str(path / "checkpoints")

  def push(self) -> None:
    """Returns when the files are where the next start looks for them."""

  def share(self, written: str) -> None:
    """Returns when every process can read what process 0 has written.

    Args:
      written: what that is, a name for the barrier; all processes call this with the same.
    """
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(written)


class Mirror(Workdir):
  """A folder of this machine that stands for one in a bucket, `url`.

  Raises:
    UserError: the bucket cannot be read (when opened) or written (by `push`), in one line;
      Unreachable where that may pass.
  """

  common = False

  def __init__(self, path: Path, url: str, store: tensorstore.KvStore):
    """Fetches `FETCHED` from `store` into `path`."""
    super().__init__(path)
    self.place, self.checkpoints, self._store = url, f"{url}/checkpoints", store
    self._stamps: dict[str, tuple[int, int]] = {}  # name -> size and time of what the bucket has
    self._served = False  # whether the bucket has done what was asked of it
    path.mkdir(parents=True, exist_ok=True)
    self._fetch()

  def push(self) -> None:
    """Sends the files that are new or changed since they were fetched or sent."""
    sending = {}
    for path in sorted(self.path.rglob("*")):
      name = path.relative_to(self.path).as_posix()
      unfinished = path.name.endswith(".partial")
      if unfinished or name.split("/")[0] in KEPT_HERE or path.is_symlink() or not path.is_file():
        continue
      stamp = _stamp(path)  # before it is read: what changes meanwhile is sent the next time
      if self._stamps.get(name) != stamp:
        sending[name] = stamp, self._store.write(name, path.read_bytes())
    for name, (stamp, future) in sending.items():
      with self._in_one_line(f"writing {name}"):
        future.result(timeout=_SENDING)
      self._stamps[name] = stamp

  def share(self, written: str) -> None:
    self.push()
    super().share(written)
    if jax.process_index():
      self._fetch()

  def try_writing(self) -> None:
    """Raises UserError where the bucket cannot be written, without leaving anything there."""
    name = f"write_test_{jax.process_index()}"
    with self._in_one_line("writing"):
      for content in (b"can be written", None):  # None deletes
        self._store.write(name, content).result(timeout=_OPENING)
    self._served = True

  def hold_lock(
    self, stack: contextlib.ExitStack, setting: str, say: Callable[[str], None]
  ) -> None:
    """Hold the lock of the folder until `stack` ends, and fetch what its last owner has written."""
    with self._in_one_line("locking"):
      stack.enter_context(lock.bucket(self._store, setting, say))
    self._fetch()

  def try_checkpoints(self) -> None:
    """Raises UserError where the library that makes folders of checkpoints has no access.

    It is another one than ours, TensorFlow where that is installed, and finds its credentials
    itself.
    """
    with self._in_one_line("opening"):
      epath.Path(self.checkpoints).exists()

  def _fetch(self) -> None:
    def names(entry: str) -> list[str]:
      if not entry.endswith("/"):
        return [entry]
      inside = tensorstore.KvStore.KeyRange(entry, entry[:-1] + "0")  # "0" follows "/"
      return [name.decode() for name in self._store.list(inside).result(timeout=_OPENING)]

    with self._in_one_line("reading"):
      wanted = [name for entry in FETCHED for name in names(entry) if not _strange(name)]
      reads = {name: self._store.read(name) for name in wanted}
      found = {name: read.result(timeout=_SENDING) for name, read in reads.items()}
    for name, result in found.items():
      if result.state == "value":
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(result.value)
        self._stamps[name] = _stamp(path)

  def _in_one_line(self, doing: str) -> contextlib.AbstractContextManager[None]:
    return _one_line(doing, self.place, passes=self._served)


@contextlib.contextmanager
def _one_line(doing: str, place: str, *, passes: bool) -> Iterator[None]:
  """Errors of whichever library as UserError.

  A bucket that does not answer, or did what was asked of it before (`passes`), will again:
  Unreachable.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    what = str(error) or "no answer"
    raise (Unreachable if passes or isinstance(error, TimeoutError) else UserError)(
      f"{doing} in {place}: {what}; see that the bucket is there, that the network reaches "
      "it, and that the credentials of this machine may read, write and delete in it"
    ) from error


@contextlib.contextmanager
def open_workdir(
  place: str,
  *,
  writes: bool = True,
  exclusive: bool = False,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[Workdir]:
  """The folder of a run; every process opens the same.

  Args:
    place: a path, where ~ is the home directory, or gs://BUCKET/FOLDER.
    writes: whether files will be written there; otherwise nothing is sent to a bucket.
    exclusive: whether process 0 holds the lock of the folder meanwhile, see `lock`.
    say: prints a line, where the lock has to wait.

  Raises:
    UserError: the place cannot be used, or another run uses it; in one line, before anything else
      is done.
  """
  setting, exclusive = f"--workdir={place}", exclusive and jax.process_index() == 0
  if "://" not in place:
    path = Path(place).expanduser()
    with lock.folder(path, setting, say) if exclusive else contextlib.nullcontext():
      yield Workdir(path)
    return
  url, store = _open_store(place)
  with (
    tempfile.TemporaryDirectory(prefix="openvision-") as scratch,
    contextlib.ExitStack() as stack,
  ):
    mirror = Mirror(Path(scratch) / PurePosixPath(url).name, url, store)
    mirror.try_checkpoints()
    if writes:
      mirror.try_writing()
    if exclusive:
      mirror.hold_lock(stack, setting, say)
    try:
      yield mirror
    except Exception:
      if writes:
        _send_what_there_is(mirror)
      raise
    if writes:
      mirror.push()


@contextlib.contextmanager
def locked(place: str, setting: str, say: Callable[[str], None]) -> Iterator[None]:
  """Hold the lock of a folder other than the workdir on process 0, such as one of checkpoints.

  Args:
    place: a path, or gs://BUCKET/FOLDER; "" locks nothing.
    setting: the setting and its value, for messages.
    say: prints a line, where the lock has to wait.

  Raises:
    UserError: another run uses it, or it cannot be used.
  """
  if not place or jax.process_index():
    yield
  elif "://" in place:
    url, store = _open_store(place)
    with contextlib.ExitStack() as stack:
      with _one_line("locking", url, passes=False):
        stack.enter_context(lock.bucket(store, setting, say))
      yield
  else:
    with lock.folder(Path(place).expanduser(), setting, say):
      yield


def _open_store(place: str) -> tuple[str, tensorstore.KvStore]:
  """The address of a folder in a bucket, in its usual form, and the folder."""
  bucket, folder = _split(place)
  spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
  try:
    return f"gs://{bucket}/{folder}", tensorstore.KvStore.open(spec).result(timeout=_OPENING)
  except ValueError as error:
    raise UserError(f"{place}: {error}") from error


def _send_what_there_is(mirror: Mirror) -> None:
  """For who looks why a run ended; the error that ended it counts more than one of sending."""
  try:
    mirror.push()
  except UserError as error:
    logging.warning("%s", error)


def _split(place: str) -> tuple[str, str]:
  """Bucket and folder of gs://BUCKET/FOLDER."""
  scheme, _, rest = place.partition("://")
  bucket, *parts = rest.split("/")
  parts = [part for part in parts if part]
  if scheme != "gs":
    raise UserError(
      f"{place}: expected a folder of this machine or gs://BUCKET/FOLDER; no other store "
      "is known, so mount it as a folder, or copy it"
    )
  if not bucket or not parts or {".", ".."} & set(parts):
    raise UserError(
      f"{place}: expected gs://BUCKET/FOLDER, a folder for each run, without . and .. in its path"
    )
  return bucket, "/".join(parts)


def _strange(name: str) -> bool:
  """Whether a name is none of a file below the folder: of a placeholder, or one that leads out."""
  return name.endswith("/") or ".." in name.split("/")


def _stamp(path: Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns
