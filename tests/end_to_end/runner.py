"""Start the training apps as a user does, with configurations that train in seconds."""

import contextlib
import os
from pathlib import Path
import re
import subprocess
import sys
import time

import apps.caption_train
import apps.clip_train
from apps.trainer.sinks import read_metrics
from tests.end_to_end import forked

CAPTION_TRAIN = Path(apps.caption_train.__file__)
CLIP_TRAIN = Path(apps.clip_train.__file__)
DEMO = CAPTION_TRAIN.parent / "configs" / "caption_demo.py"
CLIP_DEMO = CLIP_TRAIN.parent / "configs" / "clip_demo.py"

_SMALL = (
  "--config.model.encoder=mu/16",
  "--config.model.encoder_options={}",
  "--config.model.image_size=32",
  "--config.input.demo.image_size=32",
  "--config.input.demo.train_examples=200",
  "--config.input.demo.eval_examples=16",
  "--config.batch_size=16",
  "--config.total_steps=30",
  "--config.log_every=1",
  "--config.checkpoint.every=4",
  "--config.eval.every=10",
  "--config.eval.batch_size=16",
  "--config.eval.caption_examples=16",
  "--config.tensorboard=False",
)
_BLOCK = "{'width': 32, 'depth': 1, 'mlp_dim': 64, 'num_heads': 2}"

# One small block per tower, 4 image tokens, a few dozen scenes.
TINY = (
  f"--config={DEMO}:runlocal",
  *_SMALL,
  f"--config.model.decoder_options={_BLOCK}",
  "--config.input.demo.zero_shot_examples=8",
)

# For several processes. On CPUs, only process 0 finds its programs in a warm cache. The others
# compile them, but Gloo waits for at most 30 s before the first collective operation.
NO_COMPILE_CACHE = "--config.compile_cache="


def tiny_clip(loss: str = "openvision") -> tuple[str, ...]:
  """Return the flags of a small configuration of clip_train with one of its losses."""
  return (
    f"--config={CLIP_DEMO}:runlocal,loss={loss}",
    *_SMALL,
    "--config.input.demo.zero_shot_examples=32",
    "--config.input.demo.probe_examples=200",
    f"--config.model.text_options={_BLOCK}",
    f"--config.model.decoder_options={_BLOCK}",
    "--config.model.embed_dim=32",
  )


def environment(cache: Path, **more: str) -> dict[str, str]:
  """Return the environment variables of a run whose home directory is `cache`.

  Under Bazel, the compile cache in it is the one shared by all tests.
  """
  if shared := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    own = cache / ".cache" / "openvision" / "xla"
    own.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
      own.symlink_to(shared)
  path = os.pathsep.join(p for p in sys.path if p)
  return {**os.environ, "PYTHONPATH": path, "HOME": str(cache), "JAX_PLATFORMS": "cpu", **more}


def start(*args: str, cache: Path, app: Path = CAPTION_TRAIN, **more: str) -> subprocess.Popen[str]:
  """Start an app with these flags."""
  return subprocess.Popen(
    [sys.executable, str(app), *args],
    env=environment(cache, **more),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(
  *args: str, cache: Path, app: Path = CAPTION_TRAIN, timeout: float = 240, **more: str
) -> tuple[int, str]:
  """Run an app to completion in a fork (see `forked`), and return its exit code and output."""
  return forked.run(app, args, environment(cache, **more), timeout)


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
  """Wait until metrics.jsonl has reached `step` or the process has ended."""
  path = workdir / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and (lines := read_metrics(path)) and lines[-1]["step"] >= step:
      return
    time.sleep(0.02)


def expect_one_line(printed: str, code: int, said: str) -> None:
  """Check an error of the user: exit code 2, no traceback, and one line that matches `said`."""
  errors = [line for line in printed.splitlines() if "error:" in line]
  assert code == 2, printed
  assert "Traceback" not in printed, printed
  assert len(errors) == 1, printed
  assert re.search(said, errors[0]), errors[0]
  print(errors[0])
