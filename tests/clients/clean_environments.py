"""Run the programs of model cards in new environments made by the pip lines of the cards.

  bazel run //tests/clients:clean_environments -- --size=Ti/16@160 [--format=timm,onnx]
    [--kind=clip,captioner,image] [--versions=newest,oldest]

Exports models with random weights to each format and writes their cards. Each pip line of a card is
installed twice: unchanged, and with the oldest versions that it allows. In both environments, every
program of the card runs, and the outputs of the library are compared with those of this repository.
Prints one line for each; the exit code is 1 if any failed.

Requires a package index, and up to 6 GB of disk for each environment with PyTorch, because PyPI's
build for Linux includes CUDA libraries. With uv on PATH, environments share files and take seconds.
"""

from collections.abc import Iterator, Sequence
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import numpy as np

from apps.exporter import card, libraries, probe, snippets
from apps.exporter.exporting import judge
from apps.exporter.formats.safetensors import add_tokenizer, compare_loaded
from apps.exporter.formats.table import EXPORTS
from apps.exporter.source import Source, load_source
from ov_convert import client_env, parity
from tests.clients.random_models import KINDS, SIZES, config_of, make_workdir

_SIZE = flags.DEFINE_list("size", list(SIZES), f"Some of {', '.join(SIZES)}.")
_KIND = flags.DEFINE_list("kind", list(KINDS), f"Some of {', '.join(KINDS)}.")
_FORMAT = flags.DEFINE_list("format", list(EXPORTS), f"Some of {', '.join(EXPORTS)}.")
_VERSIONS = flags.DEFINE_list("versions", ["newest", "oldest"], "newest, oldest, or both.")
_PICTURES = flags.DEFINE_string("pictures", None, "Folder of images; drawn ones by default.")

_PROGRAM_SECONDS = 600
SHOWN = ("image/pixels", "image/pooled", "image/tokens", "image/embedding", "text/ids",
         "text/embedding", "logits", "caption/ids")  # fmt: skip


class Environments:
  """Virtual environments, one for each set of requirements, created on first use.

  Attributes:
    scratch: folder of the environments.
  """

  def __init__(self, scratch: Path) -> None:
    self.scratch = scratch
    self._pythons: dict[tuple[str, ...], Path] = {}
    checkout = Path(os.environ.get("BUILD_WORKSPACE_DIRECTORY") or Path(__file__).parents[2])
    for name in libraries.OWN:  # build copies, because a build leaves files next to the sources
      shutil.copytree(checkout / name, scratch / name)

  def python(self, requirements: Sequence[str]) -> Path:
    """Return the interpreter of an environment with `requirements`.

    Raises:
      subprocess.CalledProcessError: if the installation fails.
    """
    key = tuple(requirements)
    if key not in self._pythons:
      folder = self.scratch / f"python-{len(self._pythons)}"
      subprocess.run([sys.executable, "-m", "venv", folder], check=True)
      python = folder / "bin" / "python3"
      uv = shutil.which("uv")
      pip: list[str | Path] = (
        [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
      )
      subprocess.run([*pip, "--quiet", *requirements], check=True, cwd=self.scratch)
      self._pythons[key] = python
    return self._pythons[key]


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  failed = 0
  with tempfile.TemporaryDirectory() as folder:
    scratch = Path(folder)
    environments = Environments(scratch)
    for size in _SIZE.value:
      for kind in _KIND.value:
        place = scratch / "models" / kind / size.replace("/", "-")
        for line, good in try_model(place, kind, size, environments):
          print(f"{kind} {size} {line}", flush=True)
          failed += not good
  if failed:
    sys.exit(f"{failed} lines above do not load, run or agree")


def try_model(
  place: Path, kind: str, size: str, environments: Environments
) -> Iterator[tuple[str, bool]]:
  """Yield a result line and success for each format, pip line and choice of versions."""
  make_workdir(place / "workdir", config_of(kind, size))
  source = load_source(place / "workdir")
  pictures = probe.pictures(Path(_PICTURES.value) if _PICTURES.value else None)
  (place / snippets.PICTURE).write_bytes(pictures[0])
  inputs = probe.write_probe(place / "probe", source, pictures)
  ours = probe.our_outputs(source.release, inputs, source.specials)
  for name in _FORMAT.value:
    write_format(place / name, name, source)
    found = programs_of((place / name / "README.md").read_text("utf-8"))
    for line, codes in found.items():
      for versions in _VERSIONS.value:
        started = time.monotonic()
        requirements = libraries.requirements(line, versions)
        try:
          python = environments.python(requirements)
        except subprocess.CalledProcessError as error:
          yield f"{name} {versions} [{' '.join(requirements)}]: not installed: {error}", False
          continue
        problems = [p for code in codes if (p := run_program(python, code, place / name))]
        rows, installed = compare(name, line, place, source, ours, python)
        if failure := parity.first_failure(rows):
          problems.append(parity.explain(failure))
        shown = {row.name: row for row in rows}
        numbers = "  ".join(f"{n} {shown[n].max_abs:.1e}" for n in SHOWN if n in shown)
        verdict = "; ".join(problems) or f"{len(codes)} of {len(codes)} programs run, agrees"
        stated = {
          library: installed.get(library.replace("-", "_"), "?")
          for library in libraries.ranges(libraries.names(line))
        }
        held = " ".join(f"{library}=={version}" for library, version in stated.items())
        seconds = f"({time.monotonic() - started:.0f} s)"
        yield f"{name} {versions} [{held}]: {verdict}  {numbers}  {seconds}", not problems


def programs_of(page: str) -> dict[str, list[str]]:
  """Return the programs of a card, grouped by the preceding pip line.

  Raises:
    ValueError: if a program has no pip line, or there is no program.
  """
  found: dict[str, list[str]] = {}
  for text in re.split(r"^(?=### )", page, flags=re.MULTILINE)[1:]:
    line = re.search(r"^`(pip install .*)`$", text, re.MULTILINE)
    codes = [code for _, _, code in snippets.extract(text)]
    if line is None or len(codes) != 1:
      raise ValueError(f"expected one pip line and one program below {text.splitlines()[0]!r}")
    found.setdefault(line[1], []).extend(codes)
  if not found:
    raise ValueError("the card shows no program")
  return found


def write_format(folder: Path, name: str, source: Source) -> None:
  """Write an export and its card."""
  folder.mkdir()
  EXPORTS[name].write(folder, source.release)
  if name == "safetensors":
    add_tokenizer(folder, source)
  card.write_card(folder, card.facts_of(name, source, {}, "mit"))


def run_program(python: Path, code: str, folder: Path) -> str:
  """Run a program of a card offline; return "" or, if it fails, the last lines of its output."""
  code = code.replace(snippets.FOLDER, str(folder))
  code = code.replace(snippets.PICTURE, str(folder.parent / snippets.PICTURE))
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  done = subprocess.run(
    [python, "-c", code], env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    timeout=_PROGRAM_SECONDS, check=False,
  )  # fmt: skip
  if not done.returncode:
    return "" if done.stdout.strip() else "a program printed nothing"
  return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def compare(
  name: str,
  line: str,
  place: Path,
  source: Source,
  ours: dict[str, np.ndarray],
  python: Path,
) -> tuple[list[parity.Row], dict[str, str]]:
  """Return a comparison of the library's outputs with ours, and the installed versions."""
  listed = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.name.replace('-', '_').lower(): d.version for d in m.distributions()}))"
  )
  printed = subprocess.run([python, "-c", listed], capture_output=True, text=True, check=True)
  installed = json.loads(printed.stdout)
  if any(library in libraries.OWN for library in libraries.names(line)):
    return compare_loaded(place / name, source.release), installed
  try:
    rows, _ = judge(EXPORTS[name], place / name, place / "probe", ours, python)
  except client_env.ClientError as error:
    rows = [parity.Row("loading", 1.0, None, 0.0, 1.0, str(error).splitlines()[-1])]
  return rows, installed


if __name__ == "__main__":
  app.run(main)
