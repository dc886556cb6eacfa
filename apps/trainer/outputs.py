"""The files that a complete run leaves, checked before it reports success."""

import jax

from apps.trainer.errors import UserError
from apps.trainer.run import Run

# Without these a run cannot be resumed, exported or compared.
_FILES = ("config.json", "metrics.jsonl", "tokenizer")


def check(run: Run) -> None:
  """Check that the files of a run are where it wrote them; on the first process only.

  Raises:
    UserError: files or the last checkpoint are gone, as where the workdir was deleted meanwhile.
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
      f"{run.workdir.place} lacks {', '.join(missing)}, which the run wrote: something deleted or "
      "replaced them meanwhile, so it is incomplete; restore them from a copy, or train again in "
      "another --workdir"
    )
  run.writer.flush()
