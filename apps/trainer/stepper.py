"""Training steps of one stage, with logging, evaluation and checkpoints."""

import contextlib
import dataclasses
import time
from typing import Any

from absl import logging
import jax

from apps.trainer import inputs
from apps.trainer.checkpoint_metadata import StageData, TeacherIdentity
from apps.trainer.config import init_sources
from apps.trainer.errors import UserError, user_errors
from apps.trainer.hooks import COMPILING, EVALUATING, INPUT, SAVING, STEP
from apps.trainer.init_from import interpolate
from apps.trainer.meter import Meter
from apps.trainer.progress import StageProgress
from apps.trainer.run import Run
from apps.trainer.stages import Stage
from apps.trainer.state import TrainState
from apps.trainer.stored_teacher import AddTeacher
from apps.trainer.task import Evaluate, Params, Task
import ov_data
import ov_sharding


class Stepper:
  """Runs steps; logs, evaluates and saves at the configured intervals.

  Metrics are fetched one step late, so that the devices never wait for the host. All metrics of
  step s are written before the checkpoint of step s, so a resumed run neither repeats nor skips
  lines.
  """

  def __init__(
    self,
    run: Run,
    stage: Stage,
    task: Task,
    evaluate: Evaluate | None,
    progress: StageProgress,
    add_teacher: AddTeacher | None = None,
    teacher: TeacherIdentity | None = None,
  ):
    self._run, self._stage, self._config = run, stage, stage.config
    self._evaluate, self._task = evaluate, task
    self._add_teacher, self._teacher = add_teacher, teacher
    self._evaluated = False
    self._progress = progress
    self._meter = Meter(
      batch_size=stage.config.batch_size, flops_per_example=task.flops_per_example
    )
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._tracing = False

  def train(
    self, state: TrainState, train_step: Any, loader: ov_data.Loader
  ) -> tuple[TrainState, str | None]:
    """Run steps until the end of the stage or a request to stop.

    Returns:
      The last state, and the name of the signal that stopped it, if any.
    """
    config, run, stage = self._config, self._run, self._stage
    step = first = int(state["step"])
    batches = iter(loader)
    signal = None
    if step < config.total_steps:
      run.terminal.phase(f"{stage.name}: compiling the train step")
    while step < config.total_steps:
      signal = run.stop.requested(stage.first_step + step)
      if signal:
        break
      self._profile(step)
      began = time.perf_counter()
      self._enter(step, INPUT)
      batch = next(batches)
      waited = time.perf_counter() - began
      self._enter(step, STEP if step > first else COMPILING)
      host = {k: batch[k] for k in self._task.batch_keys}
      batch = ov_sharding.global_batch(host, run.mesh)
      # Tracing may reveal a setting that this machine does not support.
      with user_errors() if step == first else contextlib.nullcontext():
        if self._add_teacher is not None:
          batch = self._add_teacher(batch, host)
        state, metrics = train_step(state, batch)
      step += 1
      self._enter(step, STEP)
      self._finish_previous_step()
      self._pending = (step, metrics)
      if step == first + 1:  # the first step is dominated by compilation
        self._finish_previous_step()
        run.terminal.phase(f"{stage.name}: first step after {time.perf_counter() - began:.1f} s")
      run.hooks.on_step(stage.first_step + step)
      if step == first + 1:
        self._meter.reset()
      else:
        self._meter.step(waited)
      self._run_periodic(step, state, loader)
    self._finish_previous_step()
    self._profile(step)
    if signal and step > first:
      self._save(step, state, loader)
    return state, signal

  def evaluate(self, state: TrainState, *, record: bool = True) -> None:
    """Evaluate, write the metrics, and pass the result to the hooks.

    Args:
      state: train state; its average is used if there is one, interpolated with the initial
        parameters by `config.eval.wise_ft`.
      record: add a line to metrics.jsonl; False for a step that already has one.
    """
    run, done = self._run, int(state["step"])
    step = self._stage.first_step + done
    if self._evaluate is None:
      return
    self._enter(done, EVALUATING)
    run.terminal.phase(f"{self._stage.name}: evaluating at step {step:,}")
    began = time.perf_counter()
    # The first evaluation may reveal a setting that does not fit the data.
    with contextlib.nullcontext() if self._evaluated else user_errors():
      evaluation = self._evaluate(self._evaluated_params(state))
    self._evaluated = True
    values = {f"eval/{result.name}": result.value for result in evaluation.results}
    if record:
      run.writer.write(step, {**values, "eval/seconds": time.perf_counter() - began})
    run.hooks.on_eval(self._stage, step, evaluation)

  def _evaluated_params(self, state: TrainState) -> Params:
    """Return the parameters of the model to evaluate."""
    params = state.get("ema", state["params"])
    merge = self._task.model_params
    params = merge(params) if self._task.lora is None else jax.jit(merge)(params)
    if self._config.eval.wise_ft is not None:
      sources = init_sources(self._run.stages[0].config)
      params = interpolate(sources, params, self._config.eval.wise_ft)
    return params

  def _enter(self, step: int, phase: str) -> None:
    """Enter a phase after `step` steps of the stage."""
    self._run.hooks.on_phase(self._stage.name, self._stage.first_step + step, phase)

  def _run_periodic(self, step: int, state: TrainState, loader: ov_data.Loader) -> None:
    config = self._config
    ends = step == config.total_steps
    logs = ends or step % config.log_every == 0
    evaluates = ends or (config.eval.every and step % config.eval.every == 0)
    saves = ends or step % config.checkpoint.every == 0
    if not (logs or evaluates or saves):
      return
    self._finish_previous_step()
    if evaluates:
      try:
        self.evaluate(state)
      except Exception:
        if jax.process_count() == 1:  # save the progress although the evaluation failed
          try:
            self._save(step, state, loader)
          except UserError as error:  # the error of the evaluation is the one to raise
            logging.error("%s", error)
        raise
    if saves:
      self._save(step, state, loader)
    if evaluates or saves:
      self._meter.reset()

  def _finish_previous_step(self) -> None:
    """Wait for the previous step, show its metrics, and write them at the logging interval."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.pop("nonfinite"):
      self._raise_nonfinite(step, values)
    global_step = self._stage.first_step + step
    speed = self._meter.read()
    self._progress.update(
      global_step,
      loss=values["loss"],
      images_per_second=speed["train/images_per_second"],
      mfu=speed.get("train/mfu"),
      input_wait=speed["train/input_wait"],
    )
    if step % self._config.log_every == 0 or step == self._config.total_steps:
      line = {f"train/{name}": value for name, value in values.items()}
      line["train/examples"] = self._run.history.examples(global_step)
      self._run.writer.write(global_step, {**line, **speed})
      self._meter.reset()

  def _raise_nonfinite(self, step: int, values: dict[str, float]) -> None:
    saved = self._run.checkpoints.latest_step()
    last = self._run.history.position(self._stage.first_step + step)
    names = ("loss", "grad_norm", "update_norm", "learning_rate")
    raise UserError(
      f"step {self._stage.first_step + step} has a NaN or Inf: "
      + ", ".join(f"{name} {values[name]:.4g}" for name in names)
      + f", examples {last - self._config.batch_size} to {last - 1} of stage "
      f"{self._stage.name!r}. "
      f"The checkpoint of step {saved if saved is not None else '(none)'} is untouched; lower "
      "config.optimizer.learning_rate or set config.optimizer.grad_clip_norm=1.0"
    )

  def _save(self, step: int, state: TrainState, loader: ov_data.Loader) -> None:
    run, global_step = self._run, self._stage.first_step + step
    self._enter(step, SAVING)
    run.stage_data[self._stage.name] = StageData(inputs.describe(loader), dict(loader.skipped))
    with user_errors():
      run.writer.flush()
      run.workdir.push()
      run.checkpoints.save(
        global_step,
        state,
        {
          "stage": self._stage.name,
          "loader": loader.state(),
          "fingerprint": loader.fingerprint,
          "tokenizer": run.tokenizer.fingerprint,
          "config": self._config.to_dict(),
          "imported": run.imported,
          "examples": run.history.examples(global_step),
          "history": [dataclasses.asdict(span) for span in run.history.spans],
          "teacher": None if self._teacher is None else dataclasses.asdict(self._teacher),
          "stages": {name: dataclasses.asdict(data) for name, data in run.stage_data.items()},
        },
      )

  def _profile(self, step: int) -> None:
    """Start or stop the trace of the steps in `config.profile`, before `step` runs."""
    start, steps = self._config.profile.start, self._config.profile.steps
    if steps and step == start:
      jax.profiler.start_trace(str(self._run.workdir.path / "profile"))
      self._tracing = True
    elif self._tracing and step >= start + steps:
      self._finish_previous_step()
      jax.profiler.stop_trace()
      self._tracing = False
      self._run.workdir.push()
      uri = self._run.workdir.uri
      self._run.terminal.phase(f"profile of {steps} steps is in {uri}/profile")
