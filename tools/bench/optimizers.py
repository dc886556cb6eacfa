"""Compare optimizers on the demos, with several seeds and learning rates.

  bazel run //tools/bench:optimizers -- --out=/tmp/optimizers
  bazel run //tools/bench:optimizers -- --out=/tmp/optimizers -- --config.total_steps=700

Each run is a separate process of the app with the workdir OUT/APP/OPTIMIZER-RATE-SEED. Its final
evaluation is saved as OUT/APP/OPTIMIZER-RATE-SEED.json. Finished runs are skipped and interrupted
runs resume. The last output is a table of the finished runs. Arguments after `--` are passed to
every run; use a separate --out for each set of them.
"""

from collections.abc import Iterable, Sequence
import math
from pathlib import Path
import shutil
import statistics
import sys
from typing import NamedTuple

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.bench.runs import ROOT, metrics, run_logged

# The program, the configuration, and the metric that selects the best rate.
APPS = {
  "caption": ("caption_train.py", "caption_demo.py", "attribute_accuracy"),
  "clip": ("clip_train.py", "clip_demo.py", "img2txt_r1"),
}

_OUT = flags.DEFINE_string("out", None, "Folder of the runs.")
_APPS = flags.DEFINE_list("apps", list(APPS), "Demos to train.")
_OPTIMIZERS = flags.DEFINE_list("optimizers", ["adamw", "muon"], "Values of optimizer.name.")
_RATES = flags.DEFINE_list("rates", ["1e-3", "2e-3", "4e-3"], "Values of optimizer.learning_rate.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of seed.")


class Run(NamedTuple):
  """One training run; `rate` and `seed` are written as on the command line."""

  app: str
  optimizer: str
  rate: str
  seed: str

  def workdir(self, out: Path) -> Path:
    """Return the folder of the run."""
    return out / self.app / f"{self.optimizer}-{self.rate}-{self.seed}"

  def result(self, out: Path) -> Path:
    """Return the file of the final evaluation."""
    return self.workdir(out).parent / f"{self.workdir(out).name}.json"

  def command(self, out: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command line; the user's arguments come last."""
    program, config, _ = APPS[self.app]
    preset, rest = config, list(arguments)
    if rest and rest[0].startswith("--config=:"):  # an argument of the configuration
      preset += rest.pop(0).removeprefix("--config=")
    return [
      sys.executable,
      str(ROOT / "apps" / program),
      f"--config={ROOT / 'apps' / 'configs' / preset}",
      f"--workdir={self.workdir(out)}",
      f"--config.optimizer.name={self.optimizer}",
      f"--config.optimizer.learning_rate={self.rate}",
      f"--config.seed={self.seed}",
      *rest,
    ]


def plan(
  apps: Iterable[str], optimizers: Sequence[str], rates: Sequence[str], seeds: Sequence[str]
) -> list[Run]:
  """Return all runs, ordered by seed."""
  return [
    Run(app, optimizer, rate, seed)
    for app in apps
    for seed in seeds
    for optimizer in optimizers
    for rate in rates
  ]


def train(run: Run, out: Path, arguments: Sequence[str]) -> None:
  """Train unless the run is finished; keep the evaluation, remove data and checkpoints.

  Raises:
    UserError: if the app failed.
  """
  if run.result(out).exists():
    return
  workdir = run.workdir(out)
  run_logged(run.command(out, arguments), workdir)
  unfinished = run.result(out).with_suffix(".tmp")
  shutil.copyfile(workdir / "evaluation.json", unfinished)
  unfinished.rename(run.result(out))
  for folder in ("data", "checkpoints"):
    shutil.rmtree(workdir / folder, ignore_errors=True)


def table(runs: Sequence[Run], out: Path) -> str:
  """Return a Markdown table of the final metric by optimizer and rate, best rate in bold.

  Unfinished runs are left out; `seeds` counts the finished ones.
  """
  lines = [
    "| demo | optimizer | learning rate | metric | mean | least | most | std | seeds |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  groups: dict[tuple[str, str], dict[str, list[float]]] = {}
  for run in runs:
    if run.result(out).exists():
      value = metrics(run.result(out))[APPS[run.app][2]]
      groups.setdefault((run.app, run.optimizer), {}).setdefault(run.rate, []).append(value)
  for (app, optimizer), by_rate in groups.items():
    most = max(len(values) for values in by_rate.values())
    complete = [rate for rate, values in by_rate.items() if len(values) == most]
    best = max(complete, key=lambda rate: statistics.mean(by_rate[rate]))
    for rate, values in by_rate.items():
      spread = statistics.stdev(values) if len(values) > 1 else math.nan
      numbers = statistics.mean(values), min(values), max(values), spread
      cells = " | ".join(f"{number:.4f}" for number in numbers)
      shown = f"**{rate}**" if rate == best else rate
      lines.append(f"| {app} | {optimizer} | {shown} | {APPS[app][2]} | {cells} | {len(values)} |")
  return "\n".join(lines)


def main(arguments: list[str]) -> None:
  if not _OUT.value:
    raise UserError("give --out=FOLDER; --helpshort lists the flags")
  if unknown := [app for app in _APPS.value if app not in APPS]:
    raise UserError(f"--apps={','.join(unknown)}; expected some of {', '.join(APPS)}")
  out = Path(_OUT.value).expanduser().resolve()
  runs = plan(_APPS.value, _OPTIMIZERS.value, _RATES.value, _SEEDS.value)
  for index, run in enumerate(runs):
    print(f"{index + 1}/{len(runs)} {run.workdir(out)}", flush=True)
    train(run, out, arguments)
  with user_errors():
    print(table(runs, out))


if __name__ == "__main__":
  run_app(main, arguments=True)
