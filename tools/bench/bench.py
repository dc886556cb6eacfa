"""Run the benchmarks of this repository, and compare two results.

  bazel run //tools/bench -- startup compile --out=bench.json
  bazel run //tools/bench -- --compare old.json new.json

Arguments are benchmark names; without any, the error lists them. Prints Markdown tables; --out
writes the values of every round, --page updates the tables in docs/benchmarks.md. --compare exits
with code 1 if a metric became worse.
"""

import json
import os
from pathlib import Path
import re
import shlex
import sys
import tempfile

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

NAMES = ("startup", "compile", "step", "memory", "input", "checkpoint", "eval", "learning")

_OUT = flags.DEFINE_string("out", None, "JSON file to write every round to.")
_PAGE = flags.DEFINE_string("page", None, "Page whose tables are replaced: docs/benchmarks.md.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of runs of each case.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Regular expression; run only cases that match.")
_RUNS = flags.DEFINE_string("runs", None, "Folder that keeps the trainings of `learning`.")
_FIGURES = flags.DEFINE_string("figures", None, "Folder for the charts of `learning`.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare two files of --out: old, new.")


def main(arguments: list[str]) -> None:
  if _COMPARE.value:
    if len(arguments) != 2:
      raise UserError(f"--compare takes two files, old and new; got {len(arguments)}")
    from tools.bench import changes

    with user_errors():
      text, worse = changes.compare(*arguments)
    print(text)
    sys.exit(1 if worse else 0)
  _measure(arguments)


def _measure(names: list[str]) -> None:
  """Run benchmarks, then write the requested files."""
  from tools.bench import harness, results, tables

  if not names:
    raise UserError(f"no benchmark is named; expected some of {', '.join(NAMES)}")
  if unknown := [name for name in names if name not in NAMES]:
    raise UserError(f"unknown {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
  out = Path(_OUT.value).expanduser() if _OUT.value else None
  page = Path(_PAGE.value).expanduser() if _PAGE.value else None
  if out and (out.is_dir() or not out.parent.is_dir()):  # fail before hours of work
    raise UserError(f"--out={_OUT.value}; expected a file in a folder that exists")
  if page:
    with user_errors():
      tables.check_page(page, names)
  if "learning" in names and len(names) > 1:
    raise UserError("learning trains on simulated devices; run it without other benchmarks")
  kept = Path(_RUNS.value).expanduser() if _RUNS.value else None
  drawn = Path(_FIGURES.value).expanduser() if _FIGURES.value else None
  if (kept or drawn) and names != ["learning"]:
    raise UserError("--runs and --figures belong to learning; leave them out")
  if drawn and not drawn.is_dir():
    raise UserError(f"--figures={_FIGURES.value}; expected a folder that exists")
  try:
    wanted = re.compile(_ONLY.value).search
  except re.error as error:
    raise UserError(f"--only={_ONLY.value} is not a regular expression: {error}") from error
  # Import heavy modules only after the arguments have been validated.
  from tools.bench import compiling, evaluation, learning, memory, saving, startup, stepping
  from tools.bench import input as loading

  benchmarks = {
    "startup": startup.make,
    "compile": compiling.make,
    "step": stepping.make,
    "memory": memory.make,
    "input": loading.make,
    "checkpoint": saving.make,
    "eval": evaluation.make,
    "learning": learning.make,
  }
  names = list(dict.fromkeys(names))
  with tempfile.TemporaryDirectory() as scratch:
    chosen = []
    for name in names:
      folder = kept or Path(scratch) / name
      folder.mkdir(parents=True, exist_ok=True)
      with user_errors():
        chosen.append(benchmarks[name](folder).only(wanted))
    if empty := [benchmark.name for benchmark in chosen if not benchmark.cases]:
      raise UserError(f"--only={_ONLY.value} leaves no case of {', '.join(empty)}")
    say = _say if os.isatty(sys.stderr.fileno()) else _say_line
    measured = []
    for one in chosen:
      rounds = 1 if one.exact else _ROUNDS.value
      measured.append((one, harness.measure(one, rounds, say), rounds))
    if drawn:
      learning.draw(chosen[0], folder, drawn)
  found = results.to_dict(measured, command_of(names))
  if out:
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
  print("\n" * (say is _say) + tables.render(found))
  if page:
    with user_errors():
      tables.put_into(page, found)


def command_of(names: list[str]) -> str:
  """Return the command that repeats the measurement, without --out and --page."""
  flags_given = [] if _ROUNDS.value == _ROUNDS.default else [f"--rounds={_ROUNDS.value}"]
  flags_given += [f"--only={_ONLY.value}"] if _ONLY.value else []
  program = ["tools/bazel", "run", "//tools/bench", "--"]
  return shlex.join([*program, *names, *flags_given])


def _say(text: str) -> None:
  """Print a progress line in place of the previous one."""
  print(f"\r\033[K[bench] {text}", end="", file=sys.stderr, flush=True)


def _say_line(text: str) -> None:
  print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
  run_app(main, arguments=True)
