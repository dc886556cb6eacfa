"""Format assessments as text and as JSON."""

from collections.abc import Callable, Sequence
import io
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.preflight.assess import Assessment

_GB = 1e9  # GB of 10^9 bytes, as in data sheets


def _gigabytes(value: float) -> str:
  return f"{value / _GB:,.2f} GB"


def _count(value: float) -> str:
  return f"{value:,.0f}"


# (label, key in `numbers`, format). Unknown values are left out.
_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
  ("model", "model", str),
  ("image, px", "image_size", str),
  ("batch", "batch_size", _count),
  ("images per device", "images_per_device", _count),
  ("micro-batches", "accumulate", _count),
  ("compute dtype", "dtype", str),
  ("rematerialisation", "remat", str),
  ("parameters", "num_params", _count),
  ("per device: params", "params_bytes", _gigabytes),
  ("  optimizer, counters", "optimizer_bytes", _gigabytes),
  ("  batch", "batch_bytes", _gigabytes),
  ("  arguments, as laid out", "argument_bytes", _gigabytes),
  ("  temporaries", "temp_bytes", _gigabytes),
  ("  peak", "peak_bytes_per_device", _gigabytes),
  ("  memory", "hbm_bytes", _gigabytes),
  ("fits", "fits", lambda value: "yes" if value else "NO"),
  ("missing", "missing_bytes", lambda value: _gigabytes(value) if value else "-"),
  ("compile time", "compile_seconds", lambda value: f"{value:,.0f} s"),
  ("  of all cores", "compile_cpu_seconds", lambda value: f"{value:,.0f} s"),
  ("model FLOPs per image", "model_flops_per_image", lambda value: f"{value:.4g}"),
  ("  with recomputation", "executed_flops_per_image", lambda value: f"{value:.4g}"),
  ("memory traffic, at least", "moved_bytes_per_step", _gigabytes),
  ("sent per device and step", "sent_bytes_per_step", _gigabytes),
  ("at best: matmuls", "bound_compute_seconds", lambda value: f"{value * 1e3:,.1f} ms"),
  ("  memory", "bound_memory_seconds", lambda value: f"{value * 1e3:,.1f} ms"),
  ("  links", "bound_links_seconds", lambda value: f"{value * 1e3:,.1f} ms"),
  ("step", "step_seconds", lambda value: f"{value * 1e3:,.1f} ms"),
  ("  fraction of peak (MFU)", "mfu", lambda value: f"{value:.0%}"),
  ("images per second", "images_per_second", _count),
  ("  per host", "images_per_second_per_host", _count),
  (
    "  decoded, per host",
    "input_bytes_per_second_per_host",
    lambda value: f"{value / 1e6:,.0f} MB/s",
  ),
  ("image tokens per step", "image_tokens_per_step", _count),
  ("text tokens per step", "text_tokens_per_step", _count),
  ("steps", "steps", _count),
  ("hours", "hours", lambda value: f"{value:,.1f}"),
  ("chip-hours", "chip_hours", _count),
)


def table(assessments: Sequence[Assessment]) -> str:
  """Format the metrics as text, with a column for each stage of each configuration."""
  shown = Table("", *(one.title for one in assessments), box=None, pad_edge=False)
  for column in shown.columns[1:]:
    column.justify = "right"
  for label, name, write in _ROWS:
    values = [one.numbers.get(name) for one in assessments]
    if any(value is not None for value in values):
      shown.add_row(label, *("-" if value is None else write(value) for value in values))
  text = io.StringIO()
  Console(file=text, width=1000, highlight=False, markup=False).print(shown)
  return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def details(one: Assessment) -> str:
  """Format the mesh, the collectives and the errors of one stage."""
  lines = [f"{one.title}: mesh {' x '.join(f'{a}={n}' for a, n in one.mesh.items())}"]
  if one.compiled_on and one.compiled_on != one.target.name:
    lines[0] += (
      f"; compiled for {one.compiled_on} at the same images per device, where the program of a "
      "device is the same"
    )
  if one.collectives:
    lines.append("  collectives in one step, and the bytes a device sends for them:")
  for kind, axes, times, sent in one.collectives:
    lines.append(f"    {kind:<18} along {axes:<12} {times:>6,} times  {_gigabytes(sent)}")
  if one.unknown_loops:
    lines.append(f"  loops of unknown length, counted once: {', '.join(one.unknown_loops)}")
  lines += [f"  ERROR: {error}" for error in one.errors]
  return "\n".join(lines)


def totals(assessments: Sequence[Assessment]) -> str:
  """Format the total hours of all stages; "" for a single stage or unknown speeds."""
  hours = [one.numbers.get("hours") for one in assessments]
  if len(hours) < 2 or None in hours:
    return ""
  total = sum(hour for hour in hours if hour)
  return (
    f"all stages: {total:,.1f} hours, {total * assessments[0].target.chips:,.0f} chip-hours of "
    f"{assessments[0].target.name}"
  )


def assumptions(one: Assessment, mfu: float | None) -> str:
  """Format the speeds and assumptions behind the metrics."""
  if one.target.chip is None:
    return f"{one.target.name}: no table of its speed, so no times are printed"
  chip = one.target.chip
  facts = (
    f"{one.target.name}: {one.target.chips} chips, {one.target.hosts} hosts; per chip "
    f"{chip.peak_flops / 1e12:g} TFLOP/s in bfloat16, {chip.hbm_bandwidth / 1e9:,.0f} GB/s memory"
  )
  if one.target.slice:
    facts += f", {chip.ici_bandwidth / 1e9:,.0f} GB/s out over all links"
  basis = (
    f"step: model FLOPs at {mfu:.0%} of the peak, as set by --mfu"
    if mfu
    else "step: the longest of matmuls, memory and links, each at its peak and fully overlapped; "
    "memory traffic counts arguments and outputs alone, so no run is faster; --mfu takes a "
    "measured fraction of the peak instead"
  )
  if not one.compiled_on:
    basis += "; nothing was compiled, so only matmuls count"
  return f"{facts}\n{basis}"


def to_json(assessments: Sequence[Assessment]) -> str:
  """Return a list of JSON objects, one for each stage."""
  rows = [
    {
      "title": one.title,
      "topology": one.target.name,
      "compiled_on": one.compiled_on or None,
      "mesh": one.mesh,
      **one.numbers,
      "exchanges": [
        {"kind": kind, "axes": axes, "times": times, "sent_bytes": sent}
        for kind, axes, times, sent in one.collectives
      ],
      "faults": one.errors,
      "unknown_loops": one.unknown_loops,
    }
    for one in assessments
  ]
  return json.dumps(rows, indent=2) + "\n"
