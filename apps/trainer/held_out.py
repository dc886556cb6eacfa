"""What every evaluator is made from: the model and how held-out data are opened, shown and told."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from apps.trainer import inputs
from apps.trainer.progress import Terminal
import ov_data
from ov_data import fs
import ov_eval

HostBatch = Mapping[str, Any]


class Examples(NamedTuple):
  """Held-out examples: batches of them, and what their split is called in results."""

  loader: ov_data.Loader
  split: str

  def folders(self, label_key: str) -> tuple[str, ...] | None:
    """What numbers under `label_key` mean, where pictures lie in folders of classes."""
    return self.loader.datasets[0].class_names if label_key == "label" else None


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """What an evaluator gets.

  Attributes:
    config: of the stage.
    task: of the stage; any class with the attributes that the evaluator uses.
    tokenizer: of the run.
    mesh: of the run.
    terminal: shows how far an evaluation is.
    waiting: entered while the next batch is waited for.
  """

  config: ConfigDict
  task: Any
  tokenizer: ov_data.Tokenizer
  mesh: jax.sharding.Mesh
  terminal: Terminal
  waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

  def open(self, section: ConfigDict | None = None, **options: Any) -> Examples:
    """The data of a section of `config.eval` with `dir`; those of `config.input` without.

    Args:
      section: has `dir`, `split`, `image_key` and `examples`.
      **options: of `inputs.eval_loader`.

    Raises:
      ValueError: the data are not there, or not as described.
    """
    data = self.config.input
    if section is not None:
      options = {"image_key": section.image_key, "examples": section.examples} | options
    if section is not None and section.dir:
      return self.open_path(section.dir, section.split, **options)
    return self.open_path(data.eval_data_dir, data.eval_split, **options)

  def open_path(self, path: str, split: str, *, examples: int = 0, **options: Any) -> Examples:
    """The first `examples` (0: all) of the data at `path`; see `open`."""
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

  def batches(self, what: str, examples: Examples) -> Iterator[dict[str, Any]]:
    """The batches of one pass, with a bar."""
    loader = examples.loader
    with self.terminal.count(what, loader.num_batches or 0) as advance:
      batches = iter(loader)
      while True:
        with self.waiting():
          batch = next(batches, None)
        if batch is None:
          return
        yield batch
        advance(1)

  @contextlib.contextmanager
  def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for what `ov_eval` tells of its work: (done, in all)."""
    with self.terminal.count(what, 0) as advance:
      shown = 0

      def tell(done: int, in_all: int) -> None:
        nonlocal shown
        advance(done - shown, in_all)
        shown = done

      yield tell

  def told(
    self, results: Iterable[ov_eval.Result], evaluator: str, examples: Examples, **context: Any
  ) -> list[ov_eval.Result]:
    """The results with what identifies them, and how many examples were left out as broken."""
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
    """One JSON line for each example into NAME.jsonl of `config.eval.per_example`, if that is set.

    Every process must have the records of all; the first writes them.
    """
    if not self.config.eval.per_example or jax.process_index():
      return
    folder = Path(self.config.eval.per_example).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    fs.write_atomic(str(folder / f"{name}.jsonl"), lines.encode())
