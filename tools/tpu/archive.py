"""The checkout as one file: what git tracks, and what is new and not ignored."""

import dataclasses
import hashlib
from pathlib import Path
import subprocess
import tarfile


@dataclasses.dataclass(frozen=True)
class Archive:
  """A gzipped tar file and what is in it."""

  path: Path
  sha256: str
  files: int
  bytes: int


def root(start: Path) -> Path:
  """The checkout that a folder is in; raises ValueError where it is in none."""
  return Path(_git(start, "rev-parse", "--show-toplevel").strip())


def write(checkout: Path, path: Path) -> Archive:
  """Packs a checkout. Ignored files and git's own stay here; so do tracked files that are gone."""
  listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
  names = sorted({name for name in listed.split("\0") if name})
  present = [
    name for name in names if (checkout / name).is_symlink() or (checkout / name).is_file()
  ]
  if not present:
    raise ValueError(f"{checkout}: git lists no file there; run this in a checkout")
  with tarfile.open(path, "w:gz", compresslevel=6) as tar:
    for name in present:
      tar.add(checkout / name, arcname=name, recursive=False)
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return Archive(path, digest, len(present), path.stat().st_size)


def _git(folder: Path, *arguments: str) -> str:
  try:
    done = subprocess.run(
      ["git", "-C", str(folder), *arguments], capture_output=True, check=False, encoding="utf-8",
      errors="surrogateescape",
    )  # fmt: skip
  except FileNotFoundError:
    raise ValueError("git was not found on PATH; the checkout is copied by what it lists") from None
  if done.returncode:
    raise ValueError(f"{folder}: {done.stderr.strip().splitlines()[-1]}; run this in a checkout")
  return done.stdout
