"""Upload exported folders to a model hub, one repository per folder.

A dry run lists exactly the files that would be sent. The token is read from the environment and
sent only in the Authorization header.
"""

from collections.abc import Callable, Mapping, Sequence
import fnmatch
import os
import pathlib
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
  import huggingface_hub

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_LONGEST_REPO = 96
_SECRET_NAMES = (  # patterns of lowercase file and folder names
  ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.jks", "id_rsa*",
  "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".git",
  ".git-credentials", ".ssh", ".aws", ".gnupg", "credentials", "credentials.*", "token", "*.token",
  "secrets.*",
)  # fmt: skip
_SEARCHED_BYTES = 1 << 20  # files up to this size are searched for the token
_SILENCE = 300.0  # timeout of a request in seconds without data
_ADVICE = {
  401: "the token in HF_TOKEN was rejected; create one with write access and set HF_TOKEN to it",
  403: "the token in HF_TOKEN has no write access there; grant it, or choose another account",
  404: "the account does not exist, or is not visible to the token in HF_TOKEN",
  409: "the repository is being modified; try again",
  412: "the repository is being modified; try again",
  413: "a file exceeds the size limit",
  429: "too many requests; wait and try again",
}


def check(formats: Sequence[str], repo: str, *, dry_run: bool) -> None:
  """Raise ValueError if `push` could not start; a cheap check before the export."""
  _targets({name: pathlib.Path(name) for name in formats}, repo)
  if not dry_run:
    _endpoint()
    _token()


def push(
  folders: Mapping[str, pathlib.Path],
  repo: str,
  *,
  dry_run: bool,
  log: Callable[[str], None] = print,
) -> None:
  """Upload exported folders, each as one commit; new repositories are private.

  Args:
    folders: folders by format, such as {"timm": Path("out/timm")}.
    repo: "org/name". A single folder is uploaded there, several to "org/name-<format>".
    dry_run: list the files without sending them; needs no token.
    log: called with each line of progress.

  Raises:
    ValueError: if there are no folders, a name is invalid, a folder is missing or contains links or
      possible secrets, there is no token, or the hub returns an error; the message is one line.
  """
  targets = _targets(folders, repo)
  token = None if dry_run else _token()
  files = {name: _files(folder, token) for name, folder in targets.items()}
  endpoint = _endpoint()
  for name, listed in files.items():
    total = sum(path.stat().st_size for path in listed.values())
    log(f"{name}: {len(listed)} files, {_size(total)}, from {targets[name]}")
    for inside, path in listed.items():
      log(f"  {_size(path.stat().st_size):>10}  {inside}")
  if token is None:
    log(f"dry run: nothing was uploaded. Private repositories would be created at {endpoint}.")
    return
  api = _api(endpoint, token)
  done: list[str] = []
  for name, listed in files.items():
    try:
      log(f"uploaded {_upload(api, name, listed)}")
    except Exception as error:  # errors of the library have no common base class
      _fail(error, name, endpoint, token, done)
    done.append(name)
  log("New repositories are private; change this in their settings.")


def _targets(folders: Mapping[str, pathlib.Path], repo: str) -> dict[str, pathlib.Path]:
  """Return folders by repository."""
  if not folders:
    raise ValueError("no exported folders to upload.")
  alone = len(folders) == 1
  targets = {repo if alone else f"{repo}-{name}": folder for name, folder in folders.items()}
  for name in (repo, *targets):
    fits = _REPO.fullmatch(name) and len(name) <= _LONGEST_REPO
    if not fits or "--" in name or ".." in name or name.endswith(".git"):
      raise ValueError(
        f"repository {name!r}: expected org/name of letters, digits, '-', '_' and '.', at most "
        f"{_LONGEST_REPO} characters, such as my-org/vit-b16-openvision."
      )
  return targets


def _files(folder: pathlib.Path, token: str | None) -> dict[str, pathlib.Path]:
  """Return all files of a folder by relative path; raise ValueError for files not to upload."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder; export the model first.")
  found: dict[str, pathlib.Path] = {}
  for path in sorted(folder.rglob("*")):
    inside = path.relative_to(folder).as_posix()
    if path.is_symlink():
      raise ValueError(
        f"{path} is a link, which could point outside the folder; replace it with a copy."
      )
    if any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
      raise ValueError(
        f"{path} could contain a secret; remove it from the folder before the upload."
      )
    if path.is_dir():
      continue
    if not path.is_file():
      raise ValueError(f"{path} is not a regular file; remove it from the folder.")
    if token and path.stat().st_size <= _SEARCHED_BYTES and token.encode() in path.read_bytes():
      raise ValueError(f"{path} contains the token of HF_TOKEN; remove it before the upload.")
    found[inside] = path
  if not found:
    raise ValueError(f"{folder} contains no files; export the model first.")
  return found


def _token() -> str:
  token = os.environ.get("HF_TOKEN", "").strip()
  if not token:
    raise ValueError(
      "HF_TOKEN is not set; set it to a token with write access (created in the settings of your "
      "account), or add --dry_run."
    )
  if not re.fullmatch(r"[!-~]+", token):
    raise ValueError("HF_TOKEN contains blanks or invalid characters; copy it again.")
  return token


def _endpoint() -> str:
  """Return the URL of the hub; raise ValueError if the token would be sent unencrypted."""
  endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
  if not re.match(r"https://|http://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?(/|$)", endpoint):
    raise ValueError(f"HF_ENDPOINT={endpoint}: expected https://, because a token is sent there.")
  return endpoint


def _api(endpoint: str, token: str) -> "huggingface_hub.HfApi":
  import huggingface_hub
  from huggingface_hub import utils

  utils.disable_progress_bars()
  huggingface_hub.get_session().timeout = _SILENCE  # the default is no timeout
  return huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="openvision")


def _upload(api: "huggingface_hub.HfApi", name: str, files: Mapping[str, pathlib.Path]) -> str:
  """Create the repository if missing, commit the files, and return the URL of the commit."""
  import huggingface_hub

  api.create_repo(name, repo_type="model", private=True, exist_ok=True)
  commit = api.create_commit(
    name,
    [
      huggingface_hub.CommitOperationAdd(path_in_repo=inside, path_or_fileobj=path)
      for inside, path in files.items()
    ],
    commit_message="Upload the exported model",
  )
  return commit.commit_url


def _fail(error: Exception, name: str, endpoint: str, token: str, done: list[str]) -> NoReturn:
  """Raise the error of the library as one line, without the token."""
  cause: BaseException = error
  while not hasattr(cause, "response") and cause.__cause__ is not None:
    cause = cause.__cause__
  status = getattr(getattr(cause, "response", None), "status_code", None)
  message = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
  reason = f"{status}, {message}" if status else f"{type(cause).__name__}: {message}"
  advice = f"; {_ADVICE[status]}" if status in _ADVICE else ""
  before = f" Uploaded before: {', '.join(done)}." if done else ""
  line = f"{name} was not uploaded to {endpoint} ({reason}){advice}.{before}"
  raise ValueError(" ".join(line.replace(token, "(token)").split())) from None


def _size(count: float) -> str:
  for unit in ("B", "kB", "MB"):
    if count < 1000:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1000
  return f"{count:.1f} GB"
