"""Export of a model: checks, writes and compares all formats, and writes model cards."""

from collections.abc import Mapping, Sequence
import contextlib
import datetime
import functools
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
from ov_convert import accuracy, client_env, parity
import ov_models

EXPORT_FILE = "export.json"  # in the output folder
PARITY_FILE = "parity.json"  # in the folder of each format


class _Disagreement(Exception):
  """Raised to discard an export whose outputs differ from ours, or are too inaccurate."""


def export(
  source: Source,
  formats: Sequence[str],
  out: Path,
  pictures: Path | None,
  license_name: str,
  terminal: Terminal,
  options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> bool:
  """Write `out` with a folder per format, if the outputs of all libraries equal ours.

  Args:
    source: model to export.
    formats: names in `EXPORTS`.
    out: output folder, which must not exist.
    pictures: folder of images to compare on; None for generated ones.
    license_name: license for the model cards.
    terminal: prints phases and tables.
    options: arguments of the writers by format, such as {"onnx": {"opset": 18}}.

  Returns:
    Whether all outputs agree and are accurate enough; otherwise `out` is not created.

  Raises:
    ValueError: if some formats do not support the model; lists all of them.
    OSError: if `out` cannot be written.
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
    client_env.find_python()  # fail early
  encoded = probe.pictures(pictures)

  failed: list[str] = []
  with contextlib.suppress(_Disagreement), contextlib.ExitStack() as stack:
    partial = stack.enter_context(new_folder(out))
    inputs_folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "probe"
    terminal.phase(
      f"{ov_models.num_params(source.release.config):,} parameters; computing "
      f"reference outputs for {len(encoded)} images and {len(probe.TEXTS)} texts"
    )
    inputs = probe.write_probe(inputs_folder, source, encoded)

    @functools.cache
    def large_probe() -> Path:
      folder = inputs_folder.with_name("large_probe")
      probe.write_probe(folder, source, probe.pictures(pictures, probe.MANY), probe.many_texts())
      return folder

    ours = probe.our_outputs(source.release, inputs, source.specials)
    for name, chosen in table.items():
      chosen_options = options.get(name, {})
      rows, versions = _one(
        chosen, partial / name, source, inputs_folder, ours, terminal, chosen_options
      )
      paths = {option.name for option in chosen.options if option.is_path}
      recorded = {key: value for key, value in chosen_options.items() if key not in paths}
      facts = _facts(name, source, rows, versions, len(encoded)) | recorded
      if chosen.finish is not None and parity.first_failure(rows) is None:
        terminal.phase(f"{name}: finishing the folder")
        found = chosen.finish(partial / name, source, large_probe, **chosen_options)
        if found is not None:
          facts["accuracy"] = found.to_json()
          terminal.phase(f"{name}: {accuracy.summary(found)}")
          if not found.ok:
            failed.append(
              f"{name}: {accuracy.explain(found)}; choose a larger type with --{name}_weights, or "
              f"lower --{name}_{found.failed}"
            )
      (partial / name / PARITY_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
      card.write_card(partial / name, card.facts_of(name, source, facts, license_name))
      if failure := parity.first_failure(rows):
        failed.append(f"{name} does not match: {parity.explain(failure)}")
    if failed:
      raise _Disagreement
    content = {"formats": list(formats), "dtype": source.release.dtype}
    (partial / EXPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
  if failed:
    terminal.phase("no folder was kept: " + "; ".join(failed))
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
  """Write one format, compare its outputs and print the table."""
  name = chosen.name
  terminal.phase(f"{name}: writing")
  folder.mkdir(parents=True)
  chosen.write(folder, source.release, **options)
  rows: list[parity.Row] = []
  versions: dict[str, str] = {}
  if chosen.complete is not None:
    rows += chosen.complete(folder, source)
  terminal.phase(f"{name}: loading it with its library")
  try:
    judged, versions = judge(
      chosen, folder, inputs, ours, settings=parity.settings_of(source.release.config)
    )
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
  settings: Mapping[tuple[str, str], Any] | None = None,
) -> tuple[list[parity.Row], dict[str, str]]:
  """Load an exported folder in its library and compare the outputs.

  Args:
    form: format.
    folder: folder written by `form.write`.
    inputs: folder written by `probe.write_probe`.
    ours: outputs returned by `probe.our_outputs`.
    python: interpreter with the library; that of the clients' environment by default.
    settings: settings returned by `parity.settings_of`; those of OpenVision by default.

  Returns:
    The rows of the comparison, and the versions of the libraries.

  Raises:
    client_env.ClientError: if the library fails to load or run the model.
  """
  with tempfile.TemporaryDirectory() as scratch:
    output = Path(scratch) / "output.npz"
    python = python or (Path(sys.executable) if form.here else None)
    client_env.run_client(form.client, [folder, inputs, output], python=python)
    theirs = parity.Output.load(output)
  pictures = len(ours["image/pixels"])
  exact = len(ours["image/pooled"])  # models run on images with exact crops
  crops = exact if exact < pictures else None
  return parity.compare(ours, theirs, form.offers, crops, settings), theirs.versions


def _facts(
  name: str,
  source: Source,
  rows: list[parity.Row],
  versions: dict[str, str],
  num_pictures: int,
) -> dict[str, Any]:
  """Return the content of parity.json."""
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
  """Return a row with None for NaN and Inf, which JSON lacks."""
  return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
