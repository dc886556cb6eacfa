"""Model and held-out data for evaluators: opens data, shows progress and annotates results."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from apps.trainer import inputs
from apps.trainer.progress import Terminal
from apps.trainer.run_config import RetrievalSettings, RunConfig, ZeroShotSettings
import ov_data
from ov_data import fs
import ov_eval

HostBatch = Mapping[str, Any]


class Examples(NamedTuple):
  """Batches of held-out examples, and the name of their split in results."""

  loader: ov_data.Loader
  split: str

  def folders(self, label_key: str) -> tuple[str, ...] | None:
    """Return the class names of `label_key` if the images are stored in class folders."""
    return self.loader.datasets[0].class_names if label_key == "label" else None


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Inputs of an evaluator.

  Attributes:
    config: configuration of the stage.
    task: task of the stage; any class with the attributes that the evaluator uses.
    tokenizer: tokenizer of the run.
    mesh: mesh of the run.
    terminal: terminal that shows the progress of the evaluation.
    waiting: context manager entered while waiting for the next batch.
    run: name of the run, for files that identify it.
  """

  config: RunConfig
  task: Any
  tokenizer: ov_data.Tokenizer
  mesh: jax.sharding.Mesh
  terminal: Terminal
  waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
  run: str = ""

  def open(
    self, section: RetrievalSettings | ZeroShotSettings | None = None, **options: Any
  ) -> Examples:
    """Open the data of a section of `config.eval` with `dir`, or those of `config.input`.

    Args:
      section: section with `dir`, `split`, `image_key` and `examples`.
      **options: keyword arguments of `inputs.eval_loader`.

    Raises:
      ValueError: the data do not exist or do not match their description.
    """
    data = self.config.input
    if section is not None:
      options = {"image_key": section.image_key, "examples": section.examples} | options
    if section is not None and section.dir:
      return self.open_path(section.dir, section.split, **options)
    return self.open_path(data.eval_data_dir, data.eval_split, **options)

  def open_path(self, path: str, split: str, *, examples: int = 0, **options: Any) -> Examples:
    """Open the first `examples` (0: all) examples at `path`; see `open`."""
    config = self.config
    loader = inputs.eval_loader(
      config,
      self.task,
      self.tokenizer,
      self.mesh,
      path,
      split,
      batch_size=config.eval.batch_size or config.batch_size,
      examples=examples,
      **options,
    )
    name = split or os.path.basename(path.rstrip("/"))
    return Examples(loader, f"{name}[:{examples}]" if examples else name)

  def batches(self, description: str, examples: Examples) -> Iterator[dict[str, Any]]:
    """Yield the batches of one pass, with a progress bar."""
    loader = examples.loader
    with self.terminal.count(description, loader.num_batches or 0) as advance:
      batches = iter(loader)
      while True:
        with self.waiting():
          batch = next(batches, None)
        if batch is None:
          return
        yield batch
        advance(1)

  @contextlib.contextmanager
  def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback for `ov_eval`: (done, total)."""
    with self.terminal.count(description, 0) as advance:
      shown = 0

      def update(done: int, total: int) -> None:
        nonlocal shown
        advance(done - shown, total)
        shown = done

      yield update

  def annotate(
    self, results: Iterable[ov_eval.Result], evaluator: str, examples: Examples, **context: Any
  ) -> list[ov_eval.Result]:
    """Add the context and the number of invalid examples to results."""
    broken = sum(examples.loader.skipped.values())
    if broken:
      context["broken_examples"] = broken
    fit = "squash" if self.config.input.fit == "squash" else "center"
    return ov_eval.with_context(
      results,
      evaluator=evaluator,
      split=examples.split,
      preprocessing=f"{fit} to {self.task.image_size} px",
      **context,
    )

  def write_predictions(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line per example to NAME.jsonl in `config.eval.per_example`, if set.

    Every process must pass all records; process 0 writes them.
    """
    if not self.config.eval.per_example or jax.process_index():
      return
    folder = Path(self.config.eval.per_example).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    fs.write_atomic(str(folder / f"{name}.jsonl"), lines.encode())
