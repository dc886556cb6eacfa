"""What the parts of this repository cost on this machine, and what became slower.

  bazel run //tools/bench -- startup compile --out=bench.json
  bazel run //tools/bench -- --compare old.json new.json

Names what to measure, and without a name says what there is; compile_tpu wants OV_EXTRAS=tpu.
Prints tables, as Markdown; --out writes every round, --page puts tables and plots into
docs/benchmarks.md. --compare ends with exit code 1 where something became slower or larger.
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

_OUT = flags.DEFINE_string("out", None, "File to write the figures to, as JSON.")
_PAGE = flags.DEFINE_string(
  "page", None, "Page whose tables and plots are replaced: docs/benchmarks.md."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each case runs.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "Regular expression; only cases it is found in.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare two files of figures: old, new.")


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
  """Measures all before a file is written."""
  from tools.bench import (
    checkpointing,
    compiling,
    evaluation,
    harness,
    losses,
    memory,
    results,
    startup,
    stepping,
    tables,
  )
  from tools.bench import input as loading

  there = {
    "startup": startup.make,
    "compile": compiling.make_cpu,
    "compile_tpu": compiling.make_tpu,
    "step": stepping.make,
    "loss": losses.make,
    "memory": memory.make,
    "memory_state": memory.make_state,
    "memory_compiled": memory.make_compiled,
    "data": loading.make,
    "data_memory": loading.make_memory,
    "checkpoint": checkpointing.make,
    "eval": evaluation.make,
  }
  if not names:
    raise UserError(f"name what to measure; there are {', '.join(there)}")
  if unknown := [name for name in names if name not in there]:
    raise UserError(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(there)}")
  out = Path(_OUT.value).expanduser() if _OUT.value else None
  page = Path(_PAGE.value).expanduser() if _PAGE.value else None
  if out and (out.is_dir() or not out.parent.is_dir()):  # said before hours of work
    raise UserError(f"--out={_OUT.value}; expected a file in a folder that exists")
  if page:
    with user_errors():
      tables.check_page(page, names)
  try:
    wanted = re.compile(_ONLY.value).search
  except re.error as error:
    raise UserError(f"--only={_ONLY.value} is no regular expression: {error}") from error
  names = list(dict.fromkeys(names))
  with tempfile.TemporaryDirectory() as scratch:
    benchmarks = []
    for name in names:
      folder = Path(scratch) / name
      folder.mkdir()
      with user_errors():
        benchmarks.append(there[name](folder).only(wanted))
    if empty := [benchmark.name for benchmark in benchmarks if not benchmark.cases]:
      raise UserError(f"--only={_ONLY.value} leaves no case of {', '.join(empty)}")
    say = _say if os.isatty(sys.stderr.fileno()) else _say_line
    measured = []
    for one in benchmarks:
      rounds = 1 if one.exact else _ROUNDS.value
      measured.append((one, harness.measure(one, rounds, say), rounds))
  found = results.to_dict(measured, command_of(names))
  if out:
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
  print("\n" * (say is _say) + tables.render(found))
  if page:
    with user_errors():
      tables.put_into(page, found)


def command_of(names: list[str]) -> str:
  """What measures the same again; where the figures went does not matter."""
  environment = ["OV_EXTRAS=tpu"] if "compile_tpu" in names else []
  flags_given = [] if _ROUNDS.value == _ROUNDS.default else [f"--rounds={_ROUNDS.value}"]
  flags_given += [f"--only={_ONLY.value}"] if _ONLY.value else []
  program = ["tools/bazel", "run", "//tools/bench", "--"]
  return shlex.join([*environment, *program, *names, *flags_given])


def _say(text: str) -> None:
  """In place of the line before."""
  print(f"\r\033[K[bench] {text}", end="", file=sys.stderr, flush=True)


def _say_line(text: str) -> None:
  print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
  run_app(main, arguments=True)
