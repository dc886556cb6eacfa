"""Compare evaluation metrics of several models, or of several checkpoints of one model.

  bazel run //tools/compare -- RUN_A RUN_B results/other.json --html=/tmp/compare.html

Arguments are workdirs of runs (evaluation.json and evaluations/<step>.json are read) and files
written by `ov_eval.write_results`. Prints a table; --html also writes a page with charts.
--reference=NAME prints instead whether each run reproduces a published result, and exits with 3 if
one does not; docs/references.md lists the names.
"""

from pathlib import Path
import shutil
import sys

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

_HTML = flags.DEFINE_string("html", None, "Page to write.")
_METRICS = flags.DEFINE_string("metrics", "", "Regular expression; show only metrics that match.")
_REFERENCE = flags.DEFINE_string("reference", None, "Published result to compare the runs with.")

_NOT_REPRODUCED = 3  # exit code
# In a file, every row is one line of any length.
_NO_TERMINAL = (1_000_000, 24)


def main(paths: list[str]) -> None:
  if not paths:
    raise UserError("give workdirs or files of metrics; --helpshort lists the flags")
  with user_errors():
    if _REFERENCE.value is None:
      print(compare(paths))
    elif not reproduce(paths, _REFERENCE.value):
      sys.exit(_NOT_REPRODUCED)


def reproduce(paths: list[str], name: str) -> bool:
  """Print for each run whether it reproduces a published result, and return whether all do.

  Raises:
    ValueError, OSError: if the name or an input is invalid; the messages address the user.
  """
  from tools.compare import evaluations, references

  reference = references.find(name)
  runs = evaluations.read(paths)
  verdicts = [references.judge(run, reference) for run in runs.rows]
  for label, (_, text) in zip(evaluations.labels(runs.rows), verdicts, strict=True):
    print(f"{label}: {text}")
  return all(inside for inside, _ in verdicts)


def compare(paths: list[str]) -> str:
  """Print the table, and write the HTML page if requested.

  Raises:
    ValueError, OSError: if flags or input are invalid; the messages address the user.
  """
  # These import JAX; errors in flags are reported before.
  from apps.trainer.report import HEADLINE
  from tools.compare import evaluations, page, text_table

  runs = evaluations.read(paths)
  columns = evaluations.columns(runs.rows, _METRICS.value or "", HEADLINE)
  width = shutil.get_terminal_size(_NO_TERMINAL).columns
  text = text_table.render(runs.rows, columns, width)
  if not _HTML.value:
    return text
  target = Path(_HTML.value).expanduser()
  drawn = evaluations.columns(runs.all, _METRICS.value or "", HEADLINE)
  target.write_text(page.render(runs.rows, columns, runs.all, drawn), encoding="utf-8")
  return f"{text}\n\n{target}"


if __name__ == "__main__":
  run_app(main, arguments=True)
