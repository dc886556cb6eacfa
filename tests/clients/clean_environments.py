"""Loads exports in environments that hold one library and what it needs; prints the table of it.

  bazel run //tests/clients:clean_environments -- [--size=Ti/16@160] [--kind=clip,captioner]

Needs a package index. For each model with random weights and each format: the folder is written,
an environment is made with the pins of requirements-clients.lock and nothing but that library, the
folder is loaded there by the library's documented call, and its outputs are compared with ours.
"""

from pathlib import Path
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging

from apps.exporter import probe
from apps.exporter.source import load_source
from apps.exporter.targets import judge, judge_ours, target
from ov_convert import client_env, parity
from tests.clients.random_models import SIZES, config_of, make_workdir
from tools.python import environment

_SIZE = flags.DEFINE_list("size", list(SIZES), f"Some of {', '.join(SIZES)}.")
_KIND = flags.DEFINE_list("kind", ["clip", "captioner"], "clip, captioner, or both.")
_FORMAT = flags.DEFINE_list("format", [], "Formats; all by default.")
_PICTURES = flags.DEFINE_string("pictures", None, "Folder of pictures; drawn ones by default.")

TOOLS = Path(__file__).parents[2] / "tools/python"
TORCH = ("torch==2.13.0", "filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")
NEEDS = {
  "safetensors": (*TORCH, "numpy", "safetensors", "packaging"),
  "timm": (*TORCH, "numpy", "timm", "torchvision", "pillow", "pyyaml", "huggingface-hub"),
  "open_clip": (
    *TORCH, "numpy", "open-clip-torch", "timm", "torchvision", "pillow", "transformers", "ftfy",
    "regex", "tqdm", "huggingface-hub",
  ),
  "transformers": (*TORCH, "numpy", "transformers", "pillow"),
  "onnx": ("numpy", "onnxruntime"),
  "stablehlo": ("jax", "flatbuffers", "safetensors", "numpy"),
}  # fmt: skip
SHOWN = ("image/pixels", "image/pooled", "image/tokens", "image/embedding", "text/ids",
         "text/embedding", "logits", "caption/ids")  # fmt: skip


def make_environment(folder: Path, needs: tuple[str, ...]) -> Path:
  """A virtual environment with `needs` in the versions of the locks; returns its interpreter."""
  subprocess.run([sys.executable, "-m", "venv", folder], check=True)
  python = folder / "bin" / "python3"
  pins = "\n".join(
    re.sub(r"\s*\\$|^\s+--hash.*$", "", line)
    for lock in ("requirements-clients.lock", "requirements.lock")
    for line in (TOOLS / lock).read_text().splitlines()
    if lock != "requirements.lock" or line.startswith("jax")
  )
  constraints = folder / "constraints.txt"
  constraints.write_text(pins)
  for file in TOOLS.glob("openvision_torchvision.p*"):
    if "torchvision" in needs:
      (next(folder.glob("lib/python*/site-packages")) / file.name).write_text(file.read_text())
  first = [need for need in needs if need.startswith("torch==")]
  alone = [need for need in needs if need == "torchvision"]  # else it would bring CUDA
  rest = [need for need in needs if need not in (*first, *alone)]
  pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
  for wanted in ([*first, "--no-deps"], [*alone, "--no-deps"], rest):
    if wanted[0] != "--no-deps":
      subprocess.run([*pip, "-c", constraints, *wanted], check=True)
  return python


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  formats = _FORMAT.value or list(NEEDS)
  failed = []
  with tempfile.TemporaryDirectory() as scratch:
    pythons = {}
    for name in formats:
      started = time.monotonic()
      pythons[name] = make_environment(Path(scratch) / f"python-{name}", NEEDS[name])
      environment.say(f"{name}: environment made in {time.monotonic() - started:.0f} s")
    for size in _SIZE.value:
      for kind in _KIND.value:
        failed += try_model(Path(scratch), kind, size, pythons)
  if failed:
    sys.exit(f"disagree or do not load: {', '.join(failed)}")


def try_model(scratch: Path, kind: str, size: str, pythons: dict[str, Path]) -> list[str]:
  """One model in all formats: prints a line each, returns those that failed."""
  failed = []
  with tempfile.TemporaryDirectory(dir=scratch) as here:
    folder = Path(here)
    make_workdir(folder / "workdir", config_of(kind, size))
    source = load_source(folder / "workdir")
    pictures = probe.pictures(Path(_PICTURES.value) if _PICTURES.value else None)
    inputs = probe.write_probe(folder / "probe", source, pictures)
    ours = probe.our_outputs(source.release, inputs, source.specials)
    for name, python in pythons.items():
      chosen, started = target(name), time.monotonic()
      (folder / name).mkdir()
      chosen.write(folder / name, source.release)
      try:
        rows, versions = judge(chosen, folder / name, folder / "probe", ours, python)
      except client_env.ClientError as error:
        rows, versions = [parity.Row("loading", 1.0, None, 0.0, 1.0, str(error))], {}
      if name == "safetensors":
        rows += judge_ours(folder / name, source.release)
      failure = parity.first_failure(rows)
      if failure:
        failed.append(f"{kind} {size} {name}: {parity.explain(failure)}")
      shown = {row.name: row for row in rows}
      figures = "  ".join(f"{n} {shown[n].max_abs:.1e}" for n in SHOWN if n in shown)
      libraries = " ".join(f"{library}=={version}" for library, version in versions.items())
      verdict = "FAILS" if failure else "loads, agrees"
      seconds = time.monotonic() - started
      print(
        f"{kind} {size} {name} [{libraries}]: {verdict}  {figures}  ({seconds:.0f} s)", flush=True
      )
  return failed


if __name__ == "__main__":
  app.run(main)
