"""Metric writers: metrics.jsonl always, TensorBoard and Weights & Biases on request.

`metrics.jsonl` has one JSON object per line: `step` and flat names such as `train/loss`. An
interrupted and resumed run writes the same file as an uninterrupted one, except for the values of
TIMING_NAMES. Compare two such files with `python -m apps.trainer.sinks A B`.
"""

from collections.abc import Mapping
import itertools
import json
import math
import os
from pathlib import Path
import sys
from typing import Any, Self
import uuid

from absl import logging
import msgspec

from apps.trainer.errors import UserError
from ov_data import fs

# Timing and throughput values; everything else in metrics.jsonl is reproducible.
TIMING_NAMES = frozenset(
  {
    "train/images_per_second",  # over all devices
    "train/mfu",  # model FLOPs / peak FLOPs of the devices, 0 to 1
    "train/input_wait",  # fraction of the time spent waiting for the next batch, 0 to 1
    "train/seconds",  # since the previous line
    "eval/seconds",  # one evaluation
  }
)


class MetricWriter:
  """Writer of metrics in the order of steps; a context manager.

  `write` returns after the line was passed to the operating system. For exact resumption, all
  metrics up to step s (including evaluations at s) must be written before the checkpoint of step s.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None = None,
    active: bool = True,
    tensorboard: bool = False,
    wandb_project: str | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    """Open the writers.

    Args:
      workdir: existing folder for metrics.jsonl, tensorboard/ and wandb/.
      resume_step: step of the restored checkpoint: later lines of an earlier attempt are removed,
        damaged lines are counted and moved to another file. None starts an empty file.
      active: False on all processes except process 0; disables all output.
      tensorboard: also write event files.
      wandb_project: also report to Weights & Biases; the key is read from WANDB_API_KEY only.
      config: resolved configuration, for Weights & Biases.

    Raises:
      UserError: Weights & Biases is requested but not installed, or has no key.
    """
    self._file = self._events = self._wandb = None
    if not active:
      return
    workdir = Path(workdir)
    if wandb_project:
      self._wandb = _open_wandb(wandb_project, workdir, config)
    path = workdir / "metrics.jsonl"
    _cut(path, resume_step)
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
    if tensorboard:
      from apps.trainer.tensorboard import EventFile

      first = None if resume_step is None else resume_step + 1
      self._events = EventFile(workdir / "tensorboard", first_step=first)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Write one line of scalars (Python, NumPy, or device arrays on the host).

    NaN and Inf are written as null, because JSON cannot represent them.
    """
    if self._file is None:
      return
    scalars = {name: _scalar(name, value) for name, value in values.items()}
    finite = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
    with fs.writing(self._file.name):
      self._file.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
      self._file.flush()
    if self._events is not None:
      self._events.write(step, scalars)
    if self._wandb is not None:
      self._wandb.log(scalars, step=step)

  def flush(self) -> None:
    """Wait until metrics.jsonl is on the disk.

    Raises:
      UserError: the file was removed or replaced, so its metrics are lost.
      OSError: the file cannot be written; the message names it.
    """
    if self._file is not None:
      self._sync()
      self._check_name()
    if self._events is not None:
      self._events.flush()

  def _sync(self) -> None:
    assert self._file is not None
    with fs.writing(self._file.name):
      os.fsync(self._file.fileno())

  def _check_name(self) -> None:
    assert self._file is not None
    try:
      same = os.path.samestat(os.stat(self._file.name), os.fstat(self._file.fileno()))
    except OSError:
      same = False
    if not same:
      raise UserError(
        f"{self._file.name} was removed or replaced while the run writes it, so its metrics are "
        "lost; let one run at a time write a workdir, and give the same command to resume from the "
        "newest checkpoint that is left"
      )

  def close(self) -> None:
    """Close all writers; may be called twice."""
    if self._file is not None:
      self._sync()
      self._file.close()
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._events = self._wandb = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Return the lines of a metrics.jsonl; null becomes NaN.

  An incomplete last line is skipped; so are damaged lines, with a warning that counts them.
  """
  lines, damaged = [], []
  for number, (_, line) in enumerate(_lines(Path(path).read_bytes()), start=1):
    if line is None:
      damaged.append(number)
    else:
      lines.append({name: math.nan if value is None else value for name, value in line.items()})
  if damaged:
    logging.warning("%s: skipped %s", path, _count(damaged))
  return lines


def compare_metrics(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> list[str]:
  """Return the differences of two metrics.jsonl, bit for bit without TIMING_NAMES."""
  first, second = (
    [{k: v for k, v in line.items() if k not in TIMING_NAMES} for line in read_metrics(path)]
    for path in (a, b)
  )
  differences = []
  if len(first) != len(second):
    differences.append(f"{len(first)} lines against {len(second)} lines")
  for number, (one, two) in enumerate(zip(first, second), start=1):
    for name in one.keys() | two.keys():
      values = [json.dumps(line.get(name, "missing")) for line in (one, two)]
      if values[0] != values[1]:
        step = one.get("step")
        differences.append(f"line {number}, step {step}: {name} {values[0]} against {values[1]}")
  return differences


def _cut(path: Path, resume_step: int | None) -> None:
  """Keep the lines up to resume_step, by writing a new file and renaming it.

  Damaged lines are moved to `metrics.jsonl.damaged-N`, and so are lines of later steps that precede
  a kept line, which means that a step was changed. The incomplete line of a killed run is dropped.
  """
  lines: list[tuple[bytes, dict[str, Any] | None]] = []
  if resume_step is not None and path.exists():
    lines = _lines(path.read_bytes())
  steps = [None if line is None else line["step"] for _, line in lines]
  keep = [step is not None and step <= (resume_step or 0) for step in steps]
  last_kept = max((number for number, kept in enumerate(keep) if kept), default=-1)
  damaged = [
    number
    for number, step in enumerate(steps)
    if step is None or (number < last_kept and not keep[number])
  ]
  if damaged:
    aside = next(
      candidate
      for number in itertools.count(1)
      if not (candidate := path.with_name(f"{path.name}.damaged-{number}")).exists()
    )
    fs.write_atomic(str(aside), b"".join(lines[number][0] for number in damaged))
    logging.warning(
      "%s: %s, moved to %s; the lines after them are kept",
      path,
      _count([number + 1 for number in damaged]),
      aside.name,
    )
  partial = path.with_name(path.name + ".partial")
  with fs.writing(str(path)):
    with open(partial, "wb") as file:
      file.writelines(text for (text, _), kept in zip(lines, keep, strict=True) if kept)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)


def _lines(content: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
  """Return all complete lines of a metrics.jsonl with their values; None for a damaged line."""
  lines: list[tuple[bytes, dict[str, Any] | None]] = []
  for text in content.split(b"\n")[:-1]:
    try:
      line = msgspec.json.decode(text, type=dict[str, bool | int | float | None])
    except (msgspec.MsgspecError, UnicodeDecodeError):
      line = {}
    step = line.get("step")
    sound = type(step) is int and step >= 0
    lines.append((text + b"\n", line if sound else None))
  return lines


def _count(damaged: list[int]) -> str:
  """Format a count, such as `2 damaged lines (7, 9)`."""
  shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
  return f"{len(damaged)} damaged line{'s' if len(damaged) > 1 else ''} ({shown})"


def _scalar(name: str, value: Any) -> float | int:
  if isinstance(value, bool | int | float):
    return value
  try:
    return value.item()  # NumPy and JAX scalars of one element
  except (AttributeError, ValueError) as error:
    raise TypeError(f"metric {name!r} is {value!r}; expected one number") from error


def check_wandb() -> None:
  """Check that Weights & Biases can be used.

  Raises:
    UserError: it is not installed or has no key; the message includes the remedy.
  """
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise UserError(
      "Weights & Biases is enabled but is not installed; pip install wandb, or drop the setting"
    ) from error
  offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
  if not offline and not os.environ.get("WANDB_API_KEY"):
    raise UserError(
      "Weights & Biases is enabled but WANDB_API_KEY is not set; "
      "export it, or set WANDB_MODE=offline"
    )


def _open_wandb(project: str, workdir: Path, config: Mapping[str, Any] | None) -> Any:
  """Open a run whose id is stored in the workdir, so that resuming continues it."""
  check_wandb()
  import wandb

  id_file = workdir / "wandb_run_id"
  if not id_file.exists():
    fs.write_atomic(str(id_file), uuid.uuid4().hex.encode())
  return wandb.init(
    project=project,
    id=id_file.read_text(encoding="utf-8"),
    resume="allow",
    dir=str(workdir),
    config=dict(config or {}),
  )


def _main(arguments: list[str]) -> int:
  if len(arguments) != 2:
    print("usage: python -m apps.trainer.sinks A/metrics.jsonl B/metrics.jsonl", file=sys.stderr)
    return 2
  differences = compare_metrics(*arguments)
  print("\n".join(differences) or "equal except for timing")
  return 1 if differences else 0


if __name__ == "__main__":
  sys.exit(_main(sys.argv[1:]))
