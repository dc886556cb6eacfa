"""Compare objectives and optimizers on real icons, with several seeds.

  bazel run //tools/data:icons -- --output=/tmp/icons
  bazel run //tools/bench:objectives -- --data=/tmp/icons --out=/tmp/objectives --steps=1000
  bazel run //tools/bench:objectives -- --data=/tmp/icons --out=/tmp/objectives --cpu_minutes=10

Each run trains and evaluates in separate processes, in the workdir OUT/RUN, and adds one JSON line
to --results. Runs in that file are skipped, and interrupted runs resume. --steps trains every
objective for the same number of steps. --cpu_minutes gives all of them the same processor time; the
number of steps is derived from the cost of the runs with --steps, which must be finished. The last
output is a table. Arguments after `--` are passed to every run.
"""

from collections.abc import Iterable, Sequence
import json
from pathlib import Path
import shutil
import statistics
import sys
from typing import Any, NamedTuple

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.bench.runs import ROOT, Cost, metrics, run_logged

OBJECTIVES = ("clip", "siglip", "coca", "cappa", "openvision", "openvision2")
# Peak learning rates of each optimizer.
RATES = {"adamw": "1e-3", "muon": "4e-3"}
# Columns of the table: title, possible metrics, factor.
_COLUMNS = (
  ("naming top-1 %", ("top1", "zero_shot_top1"), 100),
  ("text-to-image R@1 %", ("txt2img_r1",), 100),
  ("R@10 %", ("txt2img_r10",), 100),
  ("caption NLL", ("nll_per_token",), 1),
)
# Training does not read the held-out data; a second process evaluates.
_NO_EVALUATION = ("--config.input.eval_data_dir=", "--config.eval.zero_shot.classes=")

_DATA = flags.DEFINE_string("data", None, "Folder written by //tools/data:icons.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs.")
_RESULTS = flags.DEFINE_string("results", None, "File of the results; default: OUT/results.jsonl.")
_OBJECTIVES = flags.DEFINE_list("objectives", list(OBJECTIVES), "Objectives to train.")
_OPTIMIZERS = flags.DEFINE_list("optimizers", list(RATES), "Values of optimizer.name.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Values of seed.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of every run.", lower_bound=1)
_CPU = flags.DEFINE_float("cpu_minutes", None, "Processor time of every run.", lower_bound=0.01)


class Run(NamedTuple):
  """One training run.

  Attributes:
    objective, optimizer, seed: as on the command line.
    budget: what the runs have in common: "1000 steps", or "10 CPU min".
  """

  objective: str
  optimizer: str
  seed: str
  budget: str

  def workdir(self, out: Path) -> Path:
    """Return the folder of the run."""
    return out / f"{self.objective}-{self.optimizer}-{self.seed}-{self.budget.replace(' ', '_')}"

  def command(self, out: Path, data: Path, steps: int, arguments: Sequence[str]) -> list[str]:
    """Return the command line of the training app; the user's arguments come last."""
    program, config = "clip_train.py", f"icons_clip.py:data={data},loss={self.objective}"
    if self.objective == "openvision2":
      program, config = "caption_train.py", f"icons_caption.py:data={data}"
    return [
      sys.executable,
      str(ROOT / "apps" / program),
      f"--config={ROOT / 'apps' / 'configs' / config}",
      f"--workdir={self.workdir(out)}",
      f"--config.optimizer.name={self.optimizer}",
      f"--config.optimizer.learning_rate={RATES[self.optimizer]}",
      f"--config.optimizer.schedule.warmup_steps={min(200, steps // 5)}",
      f"--config.total_steps={steps}",
      f"--config.seed={self.seed}",
      *arguments,
    ]


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
  """Return the finished runs of a file of results, which need not exist.

  Raises:
    ValueError: if a line is not a result.
  """
  found = {}
  for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
    try:
      row = json.loads(line)
      found[Run(*(row[name] for name in Run._fields))] = row
    except (ValueError, LookupError, TypeError):
      raise ValueError(
        f"{path}, line {number} is not a result of this program; remove it to repeat its run"
      ) from None
  return found


def train(
  run: Run, steps: int, out: Path, data: Path, results: Path, arguments: Sequence[str]
) -> None:
  """Train and evaluate a run, and append its line to the results.

  Raises:
    UserError: if the app failed.
  """
  command, workdir = run.command(out, data, steps, arguments), run.workdir(out)
  spent = workdir / "cost.json"  # of the training, if only the evaluation was interrupted
  if spent.exists():
    cost = Cost(*json.loads(spent.read_text()))
  else:
    cost = run_logged([*command, *_NO_EVALUATION], workdir)
    spent.write_text(json.dumps(cost))
  evaluation = run_logged([*command, "--config.eval_only=True"], workdir)
  row = {
    **run._asdict(),
    "rate": RATES[run.optimizer],
    "steps": steps,
    "train CPU s": round(cost.cpu, 2),
    "train wall s": round(cost.wall, 2),
    "evaluation CPU s": round(evaluation.cpu, 2),
    "arguments": list(arguments),
    "metrics": metrics(workdir / "evaluation.json"),
  }
  with results.open("a") as file:
    file.write(json.dumps(row) + "\n")
  shutil.rmtree(workdir / "checkpoints", ignore_errors=True)


def steps_within(
  cpu_seconds: float, objective: str, optimizer: str, rows: Iterable[dict[str, Any]]
) -> int:
  """Return the number of steps that cost `cpu_seconds`, start and compilation included.

  Raises:
    UserError: if no run with a fixed number of steps is finished.
  """
  costs = [
    row["train CPU s"] / row["steps"]
    for row in rows
    if (row["objective"], row["optimizer"]) == (objective, optimizer)
    and row["budget"].endswith(" steps")
  ]
  if not costs:
    raise UserError(f"no run of {objective} with {optimizer} is finished; run with --steps first")
  return max(1, round(cpu_seconds / statistics.median(costs)))


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Return a Markdown table of means and standard deviations over the seeds."""
  titles = [title for title, _, _ in _COLUMNS]
  head = ["objective", "optimizer", "budget", "seeds", "steps", "CPU s", *titles]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
  for row in rows:
    groups.setdefault((row["objective"], row["optimizer"], row["budget"]), []).append(row)
  for (objective, optimizer, budget), group in groups.items():
    cells = [objective, optimizer, budget, str(len(group))]
    cells.append(f"{statistics.mean(row['steps'] for row in group):,.0f}")
    cells.append(f"{statistics.mean(row['train CPU s'] for row in group):,.0f}")
    for _, names, factor in _COLUMNS:
      values = [row["metrics"][n] * factor for row in group for n in names if n in row["metrics"]]
      spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
      cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def main(arguments: list[str]) -> None:
  if not _OUT.value or not _DATA.value:
    raise UserError("give --data=FOLDER and --out=FOLDER; --helpshort lists the flags")
  if (_STEPS.value is None) == (_CPU.value is None):
    raise UserError("give either --steps or --cpu_minutes")
  for name, given, known in (
    ("objectives", _OBJECTIVES.value, OBJECTIVES),
    ("optimizers", _OPTIMIZERS.value, RATES),
  ):
    if unknown := [one for one in given if one not in known]:
      raise UserError(f"--{name}={','.join(unknown)}; expected some of {', '.join(known)}")
  out = Path(_OUT.value).expanduser().resolve()
  data = Path(_DATA.value).expanduser().resolve()
  out.mkdir(parents=True, exist_ok=True)
  results = Path(_RESULTS.value).expanduser() if _RESULTS.value else out / "results.jsonl"
  minutes = _CPU.value or 0.0
  budget = f"{_STEPS.value} steps" if _STEPS.value else f"{minutes:g} CPU min"
  runs = [
    Run(objective, optimizer, seed, budget)
    for seed in _SEEDS.value
    for optimizer in _OPTIMIZERS.value
    for objective in _OBJECTIVES.value
  ]
  with user_errors():
    for index, run in enumerate(runs):
      done = read_results(results)
      if run in done:
        continue
      print(f"{index + 1}/{len(runs)} {run.workdir(out)}", flush=True)
      steps = _STEPS.value or steps_within(
        minutes * 60, run.objective, run.optimizer, done.values()
      )
      train(run, steps, out, data, results, arguments)
    print(table(list(read_results(results).values())))


if __name__ == "__main__":
  run_app(main, arguments=True)
