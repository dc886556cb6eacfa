"""What the report of a run says, gathered from the run."""

from collections import Counter

import jax

from apps.trainer.progress import duration
from apps.trainer.report import ReportData, Stage, versions, write_report
from apps.trainer.run import Run
from apps.trainer.sinks import read_metrics


def write(run: Run) -> None:
  """Writes report.html into the workdir; on the first process only."""
  if jax.process_index():
    return
  last = run.stages[-1]
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
  metrics = run.workdir.path / "metrics.jsonl"
  lines = read_metrics(metrics) if metrics.exists() else []  # eval_only may have none
  seconds = sum(line.get("train/seconds", 0) + line.get("eval/seconds", 0) for line in lines)
  evaluation = run.evaluation
  skipped: Counter[str] = Counter()
  for stage_data in run.stage_data.values():
    skipped.update(stage_data.skipped)
  data = ReportData(
    title=run.workdir.path.name,
    results=evaluation.results if evaluation else (),
    summary={
      "model": run.model_name,
      "parameters": f"{run.num_params:,}",
      "image size": f"{last.config.model.image_size} px",
      "steps": f"{run.step:,}",
      "figures of step": f"{run.evaluated_step:,}",
      "examples seen": f"{run.history.examples(run.step):,}",
      "steps and evaluations took": duration(seconds),
      "devices": f"{devices}, mesh {mesh}",
      "compute": last.config.model.dtype,
    },
    stages=tuple(Stage(s.name, s.first_step) for s in run.stages),
    samples=evaluation.samples if evaluation else (),
    samples_note=f"the first held-out pictures, captions after step {run.evaluated_step:,}",
    attribute_words=evaluation.attribute_words if evaluation else (),
    classes=evaluation.classes if evaluation else None,
    galleries=evaluation.galleries if evaluation else (),
    data={f"Training, stage {name}": data.facts for name, data in run.stage_data.items()},
    skipped=skipped,
    config=run.config.to_dict(),
    versions=versions(),
  )
  write_report(run.workdir.path, data)
