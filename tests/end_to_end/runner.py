"""Starts //apps:caption_train as a user does, on a configuration that trains in seconds."""

import os
from pathlib import Path
import subprocess
import sys

import apps.caption_train

APP = Path(apps.caption_train.__file__)
DEMO = APP.parent / "configs" / "caption_demo.py"

# One tiny block each, 4 image tokens, a few dozen scenes.
TINY = (
  f"--config={DEMO}:runlocal",
  "--config.model.encoder=mu/16",
  "--config.model.encoder_options={}",
  "--config.model.decoder_options={'width': 32, 'depth': 1, 'mlp_dim': 64, 'num_heads': 2}",
  "--config.model.image_size=32",
  "--config.input.demo.image_size=32",
  "--config.input.demo.train_examples=200",
  "--config.input.demo.eval_examples=16",
  "--config.input.demo.zero_shot_examples=8",
  "--config.batch_size=16",
  "--config.total_steps=30",
  "--config.log_every=1",
  "--config.checkpoint.every=4",
  "--config.eval.every=10",
  "--config.eval.batch_size=16",
  "--config.eval.caption_examples=16",
  "--config.tensorboard=False",
)


def environment(cache: Path, **more: str) -> dict[str, str]:
  """Variables of a run; `cache` becomes the home directory, compile cache included."""
  path = os.pathsep.join(p for p in sys.path if p)
  return {**os.environ, "PYTHONPATH": path, "HOME": str(cache), "JAX_PLATFORMS": "cpu", **more}


def start(*args: str, cache: Path, **more: str) -> subprocess.Popen[str]:
  """Starts caption_train with these flags."""
  return subprocess.Popen(
    [sys.executable, str(APP), *args],
    env=environment(cache, **more),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*args: str, cache: Path, timeout: float = 240, **more: str) -> tuple[int, str]:
  """Runs caption_train to its end; returns exit code and everything it printed."""
  process = start(*args, cache=cache, **more)
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  return process.returncode, out + err
