"""Run the app as a user does."""

import functools
from pathlib import Path

import pytest

import ov_eval
from tools.compare import compare
from tools.testing import program

_app = functools.partial(program.run, compare)


def _write(path: Path, value: float, step: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figures = [
    ov_eval.Result("zero_shot_top1", value, 50, value - 0.1, value + 0.1, "share"),
    ov_eval.Result("caption_nll", 4 - value, 50, unit="nats"),
  ]
  ov_eval.write_results(path, figures, split="heldout", step=step, examples_seen=64 * step)


def test_table_and_page(tmp_path: Path):
  for step in (10, 20):
    _write(tmp_path / f"run/evaluations/{step}.json", 0.01 * step, step)
  _write(tmp_path / "run/evaluation.json", 0.2, 20)
  _write(tmp_path / "other.json", 0.3, 5)
  # Flags may follow the arguments; paths are relative to the user's folder.
  done = _app("run", "other.json", "--html=out.html", "--metrics=top1", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  head, run, other, *_, page = done.stdout.splitlines()
  assert "zero_shot_top1" in head and "caption_nll" not in done.stdout
  assert run.split()[:4] == ["run", "20", "1,280", "20.0%"]
  assert other.split()[:4] == ["other.json", "5", "320", "30.0%*"]
  assert page == "out.html" and "samples seen 640: 10.0%" in (tmp_path / page).read_text()


def test_reference(tmp_path: Path):
  context = {"classes": "imagenet", "templates": "openai_80"}
  for name, value in (("a", 0.05), ("b", 0.07)):
    result = ov_eval.Result("zero_shot_top1", value, 50_000, unit="share", context=context)
    target, seen = tmp_path / f"{name}.json", 12_800_000
    ov_eval.write_results(target, [result], split="validation", step=3125, examples_seen=seen)
  done = _app("a.json", "--reference=datacomp_small_clip", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "a.json: 5.0%: inside 4.6% – 5.6%, published 5.1%\n"
  done = _app("a.json", "b.json", "--reference=datacomp_small_clip", cwd=tmp_path)
  assert done.returncode == 3 and "b.json: 7.0%: above" in done.stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "give workdirs or files of metrics"),
    (("broken.json",), "broken.json is not a results file"),
    (("good.json", "--html=no/folder/out.html"), "no/folder/out.html"),
    (("good.json", "--reference=datacomp"), "--reference=datacomp: expected one of datacomp_small"),
    (("good.json", "--htm=x"), "Unknown command line flag 'htm'"),
  ],
)
def test_mistakes_give_one_line_errors(tmp_path: Path, arguments: tuple[str, ...], message: str):
  _write(tmp_path / "good.json", 0.5, 10)
  (tmp_path / "broken.json").write_text("{")
  done = _app(*arguments, cwd=tmp_path)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
