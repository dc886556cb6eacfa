"""Exported folders to a hub of models, one repository for each.

What a dry run lists is what is sent, for both go by the same list of files. The token comes from
the environment and leaves it in the Authorization header only.
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
_SECRET_NAMES = (  # of files and of folders, in lower case
  ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.jks", "id_rsa*",
  "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".git",
  ".git-credentials", ".ssh", ".aws", ".gnupg", "credentials", "credentials.*", "token", "*.token",
  "secrets.*",
)  # fmt: skip
_SEARCHED_BYTES = 1 << 20  # files up to this size are searched for the token
_SILENCE = 300.0  # seconds without a byte after which a request is given up
_ADVICE = {
  401: "the token in HF_TOKEN is not accepted; make one with write access and set HF_TOKEN to it",
  403: "the token in HF_TOKEN may not write there; give it write access to that account, or name "
  "another",
  404: "there is no such account, or the token in HF_TOKEN may not see it",
  409: "somebody else is changing it; try again",
  412: "somebody else is changing it; try again",
  413: "a file is larger than it takes",
  429: "too many requests; wait and try again",
}


def check(formats: Sequence[str], repo: str, *, dry_run: bool) -> None:
  """Raises ValueError where `push` could not begin: cheap, for before the export."""
  _targets({name: pathlib.Path(name) for name in formats}, repo)
  if not dry_run:
    _endpoint()
    _token()


def push(
  folders: Mapping[str, pathlib.Path],
  repo: str,
  *,
  dry_run: bool,
  say: Callable[[str], None] = print,
) -> None:
  """Uploads exported folders, each as one commit; new repositories are private.

  Args:
    folders: by format, such as {"timm": Path("out/timm")}.
    repo: "org/name". One folder goes there, of several each to "org/name-<format>".
    dry_run: list what would be sent, and send nothing; needs no token.
    say: takes the lines that tell what is done.

  Raises:
    ValueError: in one line: no folders, a name that is none, a folder that is missing or holds
      links or what looks like a secret, no token, or what the hub answered.
  """
  targets = _targets(folders, repo)
  token = None if dry_run else _token()
  files = {name: _files(folder, token) for name, folder in targets.items()}
  endpoint = _endpoint()
  for name, listed in files.items():
    total = sum(path.stat().st_size for path in listed.values())
    say(f"{name}: {len(listed)} files, {_size(total)}, from {targets[name]}")
    for inside, path in listed.items():
      say(f"  {_size(path.stat().st_size):>10}  {inside}")
  if token is None:
    say(f"dry run: nothing was sent. Private repositories would be made at {endpoint}.")
    return
  api = _api(endpoint, token)
  done: list[str] = []
  for name, listed in files.items():
    try:
      say(f"uploaded {_upload(api, name, listed)}")
    except Exception as error:  # the library's errors have no common base, nor have those below it
      _fail(error, name, endpoint, token, done)
    done.append(name)
  say("New repositories are private: make them public in their settings.")


def _targets(folders: Mapping[str, pathlib.Path], repo: str) -> dict[str, pathlib.Path]:
  """Repository -> folder."""
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
  """Every file of a folder by its name inside, sorted; ValueError for what must not leave."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder; export it first.")
  found: dict[str, pathlib.Path] = {}
  for path in sorted(folder.rglob("*")):
    inside = path.relative_to(folder).as_posix()
    if path.is_symlink():
      raise ValueError(f"{path} is a link, and may lead out of the folder; put a copy there.")
    if any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
      raise ValueError(f"{path} looks like a secret; take it out of the folder before uploading.")
    if path.is_dir():
      continue
    if not path.is_file():
      raise ValueError(f"{path} is no regular file; take it out of the folder.")
    if token and path.stat().st_size <= _SEARCHED_BYTES and token.encode() in path.read_bytes():
      raise ValueError(f"{path} holds the token of HF_TOKEN; take it out before uploading.")
    found[inside] = path
  if not found:
    raise ValueError(f"{folder} holds no files; export it first.")
  return found


def _token() -> str:
  token = os.environ.get("HF_TOKEN", "").strip()
  if not token:
    raise ValueError(
      "no token to upload with: set HF_TOKEN in the environment to one with write access (made in "
      "the settings of your account), or add --dry_run."
    )
  if not re.fullmatch(r"[!-~]+", token):
    raise ValueError("HF_TOKEN holds blanks or characters that no token has; copy it again.")
  return token


def _endpoint() -> str:
  """Where the hub is; ValueError where the token would cross a network unencrypted."""
  endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
  if not re.match(r"https://|http://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?(/|$)", endpoint):
    raise ValueError(f"HF_ENDPOINT={endpoint}: expected https://, for a token is sent there.")
  return endpoint


def _api(endpoint: str, token: str) -> "huggingface_hub.HfApi":
  import huggingface_hub
  from huggingface_hub import utils

  utils.disable_progress_bars()
  huggingface_hub.get_session().timeout = _SILENCE  # without one a request waits for ever
  return huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="openvision")


def _upload(api: "huggingface_hub.HfApi", name: str, files: Mapping[str, pathlib.Path]) -> str:
  """Makes the repository where missing and commits the files; the address of the commit."""
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
  """Raises what the library told at length as one line, without the token."""
  cause: BaseException = error
  while not hasattr(cause, "response") and cause.__cause__ is not None:
    cause = cause.__cause__
  status = getattr(getattr(cause, "response", None), "status_code", None)
  told = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
  reason = f"{status}, {told}" if status else f"{type(cause).__name__}: {told}"
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
