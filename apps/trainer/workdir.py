"""Workdir of a run: a local folder, or a folder in a bucket.

  with open_workdir("gs://bucket/run") as workdir:
    (workdir.path / "evaluation.json").write_text(...)  # always a local path
    workdir.push()  # upload to the bucket

For a bucket the local folder is temporary. A run appends to files and renames them, which buckets
do not support. It therefore works locally and copies files: from the bucket when it is opened, and
to the bucket before each checkpoint, after each evaluation and at the end. Checkpoints are not
copied; Orbax writes and reads them in the bucket.

Each process uses a fresh temporary folder, deleted on exit, so the bucket is the only source of
truth: files left by an earlier attempt are ignored, and a second program on the same workdir
(`--check`, an export) does not interfere.

Every process of a multi-host run has its own folder and uploads only the files that it wrote:
process 0 nearly all of them, the others their profiles.
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
from apps.trainer.errors import TemporaryError, UserError

# Files that a run reads again; names that end with / are folders. Nothing else is downloaded.
DOWNLOADED = (
  "config.json", "evaluation.json", "evaluations/", "metrics.jsonl", "tokenizer/", "wandb_run_id",
)  # fmt: skip
# Folders that are not uploaded: the demo images, which are identical on every host, and the files
# that Weights & Biases uploads itself.
NOT_UPLOADED = ("data", "wandb")

_OPEN_TIMEOUT = 60  # timeout in seconds of the first request to a bucket
_TRANSFER_TIMEOUT = 600  # timeout in seconds of an upload or a download, including retries


class Workdir:
  """Workdir on this machine or on a shared file system.

  Attributes:
    path: local path for reading and writing files.
    uri: path or gs:// URL of the workdir, for messages.
    checkpoints: default location of the checkpoints.
    is_shared: whether all processes see the same `path`.
  """

  is_shared = True

  def __init__(self, path: Path):
    self.path, self.uri = path, str(path)
    self.checkpoints = str(path / "checkpoints")

  def push(self) -> None:
    """Upload the files to where the next start reads them."""

  def share(self, written: str) -> None:
    """Wait until every process can read the files written by process 0.

    Args:
      written: description of the files, a name for the barrier; the same on all processes.
    """
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(written)


class BucketWorkdir(Workdir):
  """Local copy of a folder in a bucket, `url`.

  Raises:
    UserError: the bucket cannot be read (when opened) or written (by `push`); TemporaryError if the
      error may be temporary. The message is one line.
  """

  is_shared = False

  def __init__(self, path: Path, url: str, store: tensorstore.KvStore):
    """Download `DOWNLOADED` from `store` to `path`."""
    super().__init__(path)
    self.uri, self.checkpoints, self._store = url, f"{url}/checkpoints", store
    self._stamps: dict[str, tuple[int, int]] = {}  # name -> size and time of the uploaded file
    self._served = False  # whether a request to the bucket has succeeded
    path.mkdir(parents=True, exist_ok=True)
    self._fetch()

  def push(self) -> None:
    """Upload the files that are new or changed."""
    sending = {}
    for path in sorted(self.path.rglob("*")):
      name = path.relative_to(self.path).as_posix()
      unfinished = path.name.endswith(".partial")
      if (
        unfinished or name.split("/")[0] in NOT_UPLOADED or path.is_symlink() or not path.is_file()
      ):
        continue
      stamp = _stamp(path)  # taken before reading: later changes are uploaded the next time
      if self._stamps.get(name) != stamp:
        sending[name] = stamp, self._store.write(name, path.read_bytes())
    for name, (stamp, future) in sending.items():
      with self._in_one_line(f"writing {name}"):
        future.result(timeout=_TRANSFER_TIMEOUT)
      self._stamps[name] = stamp

  def share(self, written: str) -> None:
    self.push()
    super().share(written)
    if jax.process_index():
      self._fetch()

  def check_writable(self) -> None:
    """Raise UserError if the bucket cannot be written, without leaving objects."""
    name = f"write_test_{jax.process_index()}"
    with self._in_one_line("writing"):
      for content in (b"can be written", None):  # None deletes
        self._store.write(name, content).result(timeout=_OPEN_TIMEOUT)
    self._served = True

  def hold_lock(
    self, stack: contextlib.ExitStack, setting: str, log: Callable[[str], None]
  ) -> None:
    """Hold the lock until `stack` closes, and download the files of the last owner."""
    with self._in_one_line("locking"):
      stack.enter_context(lock.bucket(self._store, setting, log))
    self._fetch()

  def check_checkpoint_access(self) -> None:
    """Raise UserError if the library that creates checkpoint folders has no access to the bucket.

    That library (TensorFlow, if installed) finds its credentials itself.
    """
    with self._in_one_line("opening"):
      epath.Path(self.checkpoints).exists()

  def _fetch(self) -> None:
    def names(entry: str) -> list[str]:
      if not entry.endswith("/"):
        return [entry]
      inside = tensorstore.KvStore.KeyRange(entry, entry[:-1] + "0")  # "0" follows "/"
      return [name.decode() for name in self._store.list(inside).result(timeout=_OPEN_TIMEOUT)]

    with self._in_one_line("reading"):
      wanted = [name for entry in DOWNLOADED for name in names(entry) if not _is_not_file(name)]
      reads = {name: self._store.read(name) for name in wanted}
      found = {name: read.result(timeout=_TRANSFER_TIMEOUT) for name, read in reads.items()}
    for name, result in found.items():
      if result.state == "value":
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(result.value)
        self._stamps[name] = _stamp(path)

  def _in_one_line(self, action: str) -> contextlib.AbstractContextManager[None]:
    return _one_line(action, self.uri, temporary=self._served)


@contextlib.contextmanager
def _one_line(action: str, uri: str, *, temporary: bool) -> Iterator[None]:
  """Convert errors of any library to a one-line UserError.

  If the bucket does not respond, or has served a request before (`temporary`), the error may be
  temporary: TemporaryError.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    what = str(error) or "no answer"
    raise (TemporaryError if temporary or isinstance(error, TimeoutError) else UserError)(
      f"{action} in {uri}: {what}; check that the bucket exists, that the network reaches "
      "it, and that the credentials of this machine may read, write and delete in it"
    ) from error


@contextlib.contextmanager
def open_workdir(
  uri: str,
  *,
  writable: bool = True,
  exclusive: bool = False,
  log: Callable[[str], None] = lambda text: None,
) -> Iterator[Workdir]:
  """Open the workdir of a run; every process opens the same.

  Args:
    uri: path, where ~ is the home directory, or gs://BUCKET/FOLDER.
    writable: whether files will be written; otherwise nothing is uploaded to a bucket.
    exclusive: whether process 0 holds the lock of the folder, see `lock`.
    log: function that prints a line while waiting for the lock.

  Raises:
    UserError: the uri is invalid, or another run uses it; the message is one line.
  """
  setting, exclusive = f"--workdir={uri}", exclusive and jax.process_index() == 0
  if "://" not in uri:
    path = Path(uri).expanduser()
    with lock.folder(path, setting, log) if exclusive else contextlib.nullcontext():
      yield Workdir(path)
    return
  url, store = _open_store(uri)
  with (
    tempfile.TemporaryDirectory(prefix="openvision-") as scratch,
    contextlib.ExitStack() as stack,
  ):
    bucket_workdir = BucketWorkdir(Path(scratch) / PurePosixPath(url).name, url, store)
    bucket_workdir.check_checkpoint_access()
    if writable:
      bucket_workdir.check_writable()
    if exclusive:
      bucket_workdir.hold_lock(stack, setting, log)
    try:
      yield bucket_workdir
    except Exception:
      if writable:
        _upload_best_effort(bucket_workdir)
      raise
    if writable:
      bucket_workdir.push()


@contextlib.contextmanager
def locked(uri: str, setting: str, log: Callable[[str], None]) -> Iterator[None]:
  """Hold the lock of another folder than the workdir on process 0, such as one of checkpoints.

  Args:
    uri: path, or gs://BUCKET/FOLDER; "" locks nothing.
    setting: name and value of the setting, for messages.
    log: function that prints a line while waiting for the lock.

  Raises:
    UserError: another run uses the folder, or it is invalid.
  """
  if not uri or jax.process_index():
    yield
  elif "://" in uri:
    url, store = _open_store(uri)
    with contextlib.ExitStack() as stack:
      with _one_line("locking", url, temporary=False):
        stack.enter_context(lock.bucket(store, setting, log))
      yield
  else:
    with lock.folder(Path(uri).expanduser(), setting, log):
      yield


def _open_store(uri: str) -> tuple[str, tensorstore.KvStore]:
  """Return the normalized URL of a folder in a bucket, and its key-value store."""
  bucket, folder = _split(uri)
  spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
  try:
    return f"gs://{bucket}/{folder}", tensorstore.KvStore.open(spec).result(timeout=_OPEN_TIMEOUT)
  except ValueError as error:
    raise UserError(f"{uri}: {error}") from error


def _upload_best_effort(bucket_workdir: BucketWorkdir) -> None:
  """Upload files after a failure, best effort.

  Errors of reading or uploading a file are logged, so they cannot hide the original error.
  """
  try:
    bucket_workdir.push()
  except (UserError, OSError) as error:
    logging.warning("%s", error)


def _split(uri: str) -> tuple[str, str]:
  """Return bucket and folder of gs://BUCKET/FOLDER."""
  scheme, _, rest = uri.partition("://")
  bucket, *parts = rest.split("/")
  parts = [part for part in parts if part]
  if scheme != "gs":
    raise UserError(
      f"{uri}: expected a folder of this machine or gs://BUCKET/FOLDER; no other store "
      "is supported, so mount it as a folder, or copy it"
    )
  if not bucket or not parts or {".", ".."} & set(parts):
    raise UserError(
      f"{uri}: expected gs://BUCKET/FOLDER, a folder for each run, without . and .. in its path"
    )
  return bucket, "/".join(parts)


def _is_not_file(name: str) -> bool:
  """Return whether an object is not a file in the folder: a placeholder, or a name with ".."."""
  return name.endswith("/") or ".." in name.split("/")


def _stamp(path: Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns
