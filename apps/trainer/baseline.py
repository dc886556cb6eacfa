"""Warning when training makes a model far worse than it was, as with a too large learning rate."""

from apps.trainer.hooks import Hook
from apps.trainer.report import main_metrics
from apps.trainer.run import Run
from apps.trainer.stages import Stage
from apps.trainer.task import Evaluation
import ov_eval


class Baseline(Hook):
  """Hook that compares each evaluation with that of the initial model.

  It is active with `config.eval.warn_below_initial`, which also evaluates the initial model. A
  resumed run reads that evaluation from its file.
  """

  def __init__(self) -> None:
    self._run: Run
    self._initial: dict[str, float] = {}

  def on_start(self, run: Run) -> None:
    """Read the evaluation of the initial model, if the run resumes."""
    self._run = run
    file = run.workdir.path / "evaluations" / "0.json"
    if run.config.eval.warn_below_initial and file.exists():
      self._initial = {r.name: r.value for r in ov_eval.read_results(file).results}

  def on_eval(self, stage: Stage, step: int, evaluation: Evaluation) -> None:
    """Warn if a main metric is far worse than its initial value."""
    fraction, wanted = stage.config.eval.warn_below_initial, stage.config.optimizer
    results = main_metrics(evaluation.results)
    if step == 0:
      self._initial = {result.name: result.value for result in results}
      return
    for result in results:
      initial = self._initial.get(result.name)
      if fraction and initial is not None and far_worse(result, initial, fraction):
        self._run.terminal.phase(
          f"warning: {result.name} is {result.value:.4f} at step {step:,}, and the initial model "
          f"has {initial:.4f}; if the difference is not chance, lower "
          f"config.optimizer.learning_rate={wanted.learning_rate:g} or weight_decay="
          f"{wanted.weight_decay:g}, or lengthen schedule.warmup_steps="
          f"{wanted.schedule.warmup_steps}"
        )
        return


def far_worse(result: ov_eval.Result, initial: float, fraction: float) -> bool:
  """Return whether a metric is worse than its initial value by the factor `fraction`.

  Args:
    result: metric; one that is neither a fraction nor in nats is never far worse.
    initial: value of the initial model.
    fraction: in (0, 1].
  """
  if result.unit == "share":
    return result.value < fraction * initial
  return result.unit == "nats" and fraction * result.value > initial
