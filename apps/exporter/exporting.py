"""An export from beginning to end: check, write, compare, describe, and only then hand over."""

from collections.abc import Mapping, Sequence
import contextlib
import datetime
import json
from pathlib import Path
import sys
import tempfile
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from apps.exporter import card, probe
from apps.exporter.formats.format import ExportFormat
from apps.exporter.formats.table import EXPORTS
from apps.exporter.new_folder import new_folder
from apps.exporter.source import Source
from apps.trainer.progress import Terminal
from ov_convert import client_env, parity
import ov_models

EXPORT_FILE = "export.json"  # in the folder of all formats
PARITY_FILE = "parity.json"  # in the folder of each


class _Disagreement(Exception):
  """A library computes something else; ends the block that writes."""


def export(
  source: Source,
  formats: Sequence[str],
  out: Path,
  pictures: Path | None,
  license_name: str,
  terminal: Terminal,
  options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> bool:
  """Writes `out` with a folder for each format, if every library agrees with us.

  Args:
    source: what is exported.
    formats: names in `EXPORTS`.
    out: a folder that does not exist yet.
    pictures: folder of pictures to compare on; drawn ones for None.
    license_name: for the model cards.
    terminal: shows phases and tables.
    options: by format, arguments of its writer, such as {"onnx": {"opset": 18}}.

  Returns:
    Whether all agreed; where not, nothing is left.

  Raises:
    ValueError: formats that cannot hold the model, all told together, before anything is written.
    OSError: `out` cannot be written; nothing is left.
  """
  table = {name: EXPORTS[name] for name in formats}
  problems = []
  for name, chosen in table.items():
    try:
      chosen.check(source.release)
    except ValueError as error:
      problems.append(f"{name}: {error}")
  if problems:
    raise ValueError(" ".join(problems))
  if not all(chosen.here for chosen in table.values()):
    client_env.find_python()  # raises before the work begins
  encoded = probe.pictures(pictures)

  failed: list[str] = []
  with contextlib.suppress(_Disagreement), contextlib.ExitStack() as stack:
    partial = stack.enter_context(new_folder(out))
    inputs_folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "probe"
    terminal.phase(
      f"{ov_models.num_params(source.release.config):,} parameters; computing what "
      f"{len(encoded)} pictures and {len(probe.TEXTS)} texts should give"
    )
    inputs = probe.write_probe(inputs_folder, source, encoded)
    ours = probe.our_outputs(source.release, inputs, source.specials)
    for name, chosen in table.items():
      rows, versions = _one(
        chosen, partial / name, source, inputs_folder, ours, terminal, options.get(name, {})
      )
      facts = _facts(name, source, rows, versions, len(encoded)) | dict(options.get(name, {}))
      (partial / name / PARITY_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
      card.write_card(partial / name, card.facts_of(name, source, facts, license_name))
      if failure := parity.first_failure(rows):
        failed.append(f"{name} disagrees: {parity.explain(failure)}")
    if failed:
      raise _Disagreement
    content = {"formats": list(formats), "dtype": source.release.dtype}
    (partial / EXPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
  if failed:
    terminal.phase("nothing was kept: " + "; ".join(failed))
    return False
  terminal.phase(f"done: {out}")
  return True


def _one(
  chosen: ExportFormat,
  folder: Path,
  source: Source,
  inputs: Path,
  ours: dict[str, np.ndarray],
  terminal: Terminal,
  options: Mapping[str, Any],
) -> tuple[list[parity.Row], dict[str, str]]:
  """Writes one format and compares it; prints the table."""
  name = chosen.name
  terminal.phase(f"{name}: writing")
  folder.mkdir(parents=True)
  chosen.write(folder, source.release, **options)
  rows: list[parity.Row] = []
  versions: dict[str, str] = {}
  if chosen.complete is not None:
    rows += chosen.complete(folder, source)
  terminal.phase(f"{name}: loading it as its library does")
  try:
    judged, versions = judge(chosen, folder, inputs, ours)
    rows += judged
  except client_env.ClientError as error:
    rows.append(parity.Row("loading", np.inf, None, 0.0, np.inf, str(error)))
  libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
  terminal.phase(f"{name}: {libraries}\n{parity.table(rows)}")
  return rows, versions


def judge(
  form: ExportFormat,
  folder: Path,
  inputs: Path,
  ours: dict[str, np.ndarray],
  python: Path | None = None,
) -> tuple[list[parity.Row], dict[str, str]]:
  """Load a written folder in its library and compare.

  Args:
    form: the format.
    folder: as `form.write` wrote it.
    inputs: as `probe.write_probe` wrote it.
    ours: of `probe.our_outputs`.
    python: an interpreter that has the library; by default that of the clients' environment.

  Returns:
    The rows of the comparison, and the versions of the libraries.

  Raises:
    client_env.ClientError: the library did not load or run it.
  """
  with tempfile.TemporaryDirectory() as scratch:
    output = Path(scratch) / "output.npz"
    python = python or (Path(sys.executable) if form.here else None)
    client_env.run_client(form.client, [folder, inputs, output], python=python)
    theirs = parity.Output.load(output)
  pictures = len(ours["image/pixels"])
  exact = len(ours["image/pooled"])  # the models are tried on those
  crops = exact if exact < pictures else None
  return parity.compare(ours, theirs, form.offers, crops), theirs.versions


def _facts(
  name: str,
  source: Source,
  rows: list[parity.Row],
  versions: dict[str, str],
  num_pictures: int,
) -> dict[str, Any]:
  """The content of parity.json."""
  return {
    "format": name,
    "date": datetime.date.today().isoformat(),
    "dtype": source.release.dtype,
    "pictures": num_pictures,
    "texts": list(probe.TEXTS) if source.processor else [],
    "versions": {"jax": jax.__version__, **versions},
    "rows": [_finite(row.to_json()) for row in rows],
  }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
  """JSON has no infinity."""
  return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
