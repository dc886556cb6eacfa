"""Runs of several stages that are killed in the middle of each, and their outputs."""

import dataclasses
import json
from pathlib import Path
import signal
import time

from tests.end_to_end import runner

STEPS = 16  # per stage; every step logs metrics, every second step has a checkpoint
_TIMEOUT = 480  # seconds of a run on a busy machine


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """An app and the flags of a run with stages `names` of STEPS steps each."""

  app: Path
  names: tuple[str, ...]
  flags: tuple[str, ...]

  def run(self, workdir: Path, *flags: str, cache: Path, **more: str) -> str:
    """Run to the end and return the output."""
    every = (*self._all_flags(workdir), *flags)
    code, printed = runner.run(*every, app=self.app, cache=cache, timeout=_TIMEOUT, **more)
    assert code == 0, printed
    return printed

  def kill(self, number: int, workdir: Path, *flags: str, cache: Path, **more: str) -> int:
    """Run until stage `number` has a new checkpoint, then kill the run.

    Returns:
      The step of the newest checkpoint, from which the next run must resume.
    """
    before = max(saved_step(workdir), number * STEPS)
    every = (*self._all_flags(workdir), *flags)
    process = runner.start(*every, app=self.app, cache=cache, **more)
    deadline = time.monotonic() + _TIMEOUT
    while process.poll() is None and saved_step(workdir) <= before and time.monotonic() < deadline:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, printed = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed
    assert f"{self.names[number]}: first step after" in printed, printed
    step = saved_step(workdir)
    assert before < step < (number + 1) * STEPS, "not killed in the middle of the stage"
    return step

  def metadata(self, workdir: Path) -> dict:
    """Return stage and data of the last checkpoint, without the config, which contains paths."""
    folder = workdir / "checkpoints" / str(len(self.names) * STEPS) / "metadata"
    content = json.loads((folder / "metadata").read_text())
    return {name: value for name, value in content.items() if name != "config"}

  def _all_flags(self, workdir: Path) -> tuple[str, ...]:
    return (
      *self.flags,
      f"--config.total_steps={STEPS}",
      "--config.checkpoint.every=2",
      "--config.eval.every=0",  # only at the end of each stage
      f"--workdir={workdir}",
    )


def saved_step(workdir: Path) -> int:
  """Return the step of the newest complete checkpoint, or 0."""
  folders = (workdir / "checkpoints").glob("*")
  return max((int(path.name) for path in folders if path.name.isdigit()), default=0)
