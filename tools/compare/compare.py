"""Compares the figures of models, or of the checkpoints of one.

  bazel run //tools/compare -- RUN_A RUN_B results/other.json --html=/tmp/compare.html

Arguments are workdirs of runs (their evaluation.json and evaluations/<step>.json) and files that
`ov_eval.write_results` made. Prints a table; --html also writes a page with curves and bars.
"""

from pathlib import Path
import shutil

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

_HTML = flags.DEFINE_string("html", None, "Page to write.")
_METRICS = flags.DEFINE_string("metrics", "", "Regular expression; only figures it is found in.")

# Where the output goes to a file, a line is a row whatever its length.
_NO_TERMINAL = (1_000_000, 24)


def main(paths: list[str]) -> None:
  if not paths:
    raise UserError("give workdirs or files of figures; --helpshort lists the flags")
  with user_errors():
    print(compare(paths))


def compare(paths: list[str]) -> str:
  """The table, and the page where it was asked for.

  Raises:
    ValueError, OSError: a mistake in flags or input, in words for the user.
  """
  # These bring JAX along; mistakes in flags need not wait for it.
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
