"""Result files of a run: evaluation.json after an evaluation, report.html at the end."""

from collections import Counter
from typing import Any

import jax

from apps.trainer.errors import UserError, user_errors
from apps.trainer.hooks import Hook
from apps.trainer.progress import duration
from apps.trainer.report import ReportData, main_metrics, versions, write_report
from apps.trainer.report import Stage as ReportStage
from apps.trainer.run import Run
from apps.trainer.sinks import read_metrics
from apps.trainer.stages import Stage
from apps.trainer.task import Evaluation
from ov_data import fs
import ov_eval

# Without these a run cannot be resumed, exported or compared.
_FILES = ("config.json", "metrics.jsonl", "tokenizer")


class Report(Hook):
  """Hook that writes evaluations and the report into the workdir, and prints the main metrics."""

  def __init__(self) -> None:
    self._run: Run
    self._evaluation = Evaluation(())
    self._evaluated_step = 0

  def on_start(self, run: Run) -> None:
    """Store the run, which collects most of the report."""
    self._run = run

  def on_eval(self, stage: Stage, step: int, evaluation: Evaluation) -> None:
    """Write evaluation.json and other files, the newest, and evaluations/<step>.json."""
    run = self._run
    self._evaluation, self._evaluated_step = evaluation, step
    if jax.process_index() == 0:
      with user_errors():
        self._write_evaluation(stage, step, evaluation)
    run.workdir.push()
    shown = main_metrics(evaluation.results) or evaluation.results[:4]
    values = [f"{result.name} {result.value:.4f}" for result in shown]
    run.terminal.phase(f"{stage.name}: " + ", ".join(values))

  def on_end(self) -> None:
    """Write report.html, and check that the files of the run exist."""
    run = self._run
    with user_errors():
      if jax.process_index() == 0:
        write_report(run.workdir.path, self._data())
      run.workdir.push()
      check_outputs(run)
    run.terminal.phase(f"done: {run.workdir.uri}/report.html")

  def _write_evaluation(self, stage: Stage, step: int, evaluation: Evaluation) -> None:
    data = stage.config.input
    head: dict[str, Any] = {"split": data.eval_split or data.eval_data_dir}
    if step == 0:  # parameters of another run
      head["init_from"] = self._run.init_from
    folder = self._run.workdir.path
    (folder / "evaluations").mkdir(exist_ok=True)
    for name in ("evaluation", f"evaluations/{step}"):
      ov_eval.write_results(
        folder / f"{name}.json",
        evaluation.results,
        step=step,
        examples_seen=self._run.history.examples(step),
        **head,
      )
    for path, text in evaluation.files.items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      fs.write_atomic(str(folder / path), text.encode())

  def _data(self) -> ReportData:
    run, evaluation = self._run, self._evaluation
    last = run.stages[-1]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    metrics = run.workdir.path / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []  # eval_only may have none
    seconds = sum(line.get("train/seconds", 0) + line.get("eval/seconds", 0) for line in lines)
    skipped: Counter[str] = Counter()
    for stage_data in run.stage_data.values():
      skipped.update(stage_data.skipped)
    return ReportData(
      title=run.workdir.path.name,
      results=evaluation.results,
      summary={
        "model": run.model_name,
        "parameters": f"{run.num_params:,}",
        "image size": f"{last.config.model.image_size} px",
        "steps": f"{run.step:,}",
        "evaluated step": f"{self._evaluated_step:,}",
        "examples seen": f"{run.history.examples(run.step):,}",
        "training and evaluation time": duration(seconds),
        "devices": f"{devices}, mesh {mesh}",
        "compute": last.config.model.dtype,
      },
      stages=tuple(ReportStage(s.name, s.first_step) for s in run.stages),
      samples=evaluation.samples,
      samples_note=f"first held-out images, captions at step {self._evaluated_step:,}",
      attribute_words=evaluation.attribute_words,
      classes=evaluation.classes,
      galleries=evaluation.galleries,
      data={f"Training, stage {name}": data.facts for name, data in run.stage_data.items()},
      skipped=skipped,
      config=run.config.to_dict(),
      versions=versions(),
    )


def check_outputs(run: Run) -> None:
  """Check that the files of a run exist; process 0 only.

  Raises:
    UserError: files or the last checkpoint are missing, for example after the workdir was deleted.
    OSError: the last checkpoint could not be saved.
  """
  if run.config.eval_only:
    return
  run.checkpoints.wait()
  if jax.process_index():
    return
  missing = [name for name in _FILES if not (run.workdir.path / name).exists()]
  if run.checkpoints.finished_step() != run.step:
    missing.append(f"{run.checkpoints.directory}/{run.step}")
  if missing:
    raise UserError(
      f"{run.workdir.uri} lacks {', '.join(missing)}, which the run wrote: something deleted or "
      "replaced them meanwhile, so it is incomplete; restore them from a copy, or train again in "
      "another --workdir"
    )
  run.writer.flush()
