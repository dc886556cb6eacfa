"""The files that show a run: evaluation.json after an evaluation, report.html at the end."""

from collections import Counter
from typing import Any

import jax

from apps.trainer import outputs
from apps.trainer.errors import user_errors
from apps.trainer.hooks import Hook
from apps.trainer.progress import duration
from apps.trainer.report import ReportData, key_figures, versions, write_report
from apps.trainer.report import Stage as ReportStage
from apps.trainer.run import Run
from apps.trainer.sinks import read_metrics
from apps.trainer.stages import Stage
from apps.trainer.task import Evaluation
import ov_eval


class Report(Hook):
  """Writes evaluations and the report into the workdir; prints the key figures."""

  def __init__(self) -> None:
    self._run: Run
    self._evaluation = Evaluation(())
    self._evaluated_step = 0

  def on_start(self, run: Run) -> None:
    """Keep the run, which collects most of what the report shows."""
    self._run = run

  def on_eval(self, stage: Stage, step: int, evaluation: Evaluation) -> None:
    """Write evaluation.json, the last, and evaluations/<step>.json, one of each step."""
    run = self._run
    self._evaluation, self._evaluated_step = evaluation, step
    if jax.process_index() == 0:
      with user_errors():
        self._write_evaluation(stage, step, evaluation)
    run.workdir.push()
    shown = key_figures(evaluation.results) or evaluation.results[:4]
    figures = [f"{result.name} {result.value:.4f}" for result in shown]
    run.terminal.phase(f"{stage.name}: " + ", ".join(figures))

  def on_end(self) -> None:
    """Write report.html, and check that the files of the run are there."""
    run = self._run
    with user_errors():
      if jax.process_index() == 0:
        write_report(run.workdir.path, self._data())
      run.workdir.push()
      outputs.check(run)
    run.terminal.phase(f"done: {run.workdir.place}/report.html")

  def _write_evaluation(self, stage: Stage, step: int, evaluation: Evaluation) -> None:
    data = stage.config.input
    head: dict[str, Any] = {"split": data.eval_split or data.eval_data_dir}
    if step == 0:  # the params are not of this run
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
        "figures of step": f"{self._evaluated_step:,}",
        "examples seen": f"{run.history.examples(run.step):,}",
        "steps and evaluations took": duration(seconds),
        "devices": f"{devices}, mesh {mesh}",
        "compute": last.config.model.dtype,
      },
      stages=tuple(ReportStage(s.name, s.first_step) for s in run.stages),
      samples=evaluation.samples,
      samples_note=f"the first held-out pictures, captions after step {self._evaluated_step:,}",
      attribute_words=evaluation.attribute_words,
      classes=evaluation.classes,
      galleries=evaluation.galleries,
      data={f"Training, stage {name}": data.facts for name, data in run.stage_data.items()},
      skipped=skipped,
      config=run.config.to_dict(),
      versions=versions(),
    )
