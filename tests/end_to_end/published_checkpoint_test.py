"""`--config.ft_from=CHECKPOINT` starts both apps from a checkpoint of the released code."""

import importlib.util
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apps.trainer.checkpoint import find_checkpoint
from ov_convert import orbax_folder
from tests.end_to_end import runner
from tests.end_to_end.fake_bucket import FakeBucket

GOLDEN = Path(os.environ.get("OV_GOLDEN", "")) / "openvision1_checkpoint"
pytestmark = pytest.mark.skipif(
  not GOLDEN.is_dir(), reason="$OV_GOLDEN names no folder with openvision1_checkpoint"
)
# The sizes of the golden checkpoint. A learning rate of 0 keeps all parameters.
SIZES = (
  "--config.model.encoder=Ti/8",
  "--config.model.encoder_options={'width': 64, 'depth': 2, 'mlp_dim': 128, 'num_heads': 2}",
  "--config.model.vocab_size=128",
  "--config.total_steps=1",
  "--config.optimizer.learning_rate=0.0",
  "--config.optimizer.schedule.warmup_steps=0",
)
CLIP = (
  *runner.tiny_clip(),
  *SIZES,
  "--config.model.text_options={'width': 48, 'depth': 2, 'mlp_dim': 96, 'num_heads': 2}",
  "--config.model.decoder_options={'width': 40, 'depth': 2, 'mlp_dim': 80, 'num_heads': 2}",
  "--config.model.token_len=16",
  "--config.model.caption_len=12",
  "--config.model.embed_dim=24",
)
CAPTION = (*runner.TINY, *SIZES)
NO_EVALUATION = ("--config.eval.caption_examples=0",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def trained_params(workdir):
  return flat(ocp.PyTreeCheckpointer().restore(find_checkpoint(workdir) / "state")["params"])


def test_two_towers_load_all_params(tmp_path, cache):
  workdir = tmp_path / "run"
  flags = (*CLIP, f"--workdir={workdir}", f"--config.ft_from={GOLDEN}")
  code, printed = runner.run(*flags, "--check", app=runner.CLIP_TRAIN, cache=cache)
  assert code == 0, printed
  taken = r"initialised from .*/checkpoint.npz/5/default: 65 arrays copied"
  assert re.search(taken, printed) and "a checkpoint of the published code" in printed
  assert not (workdir / "checkpoints").exists()

  code, printed = runner.run(*flags, app=runner.CLIP_TRAIN, cache=cache)
  assert code == 0 and re.search(taken, printed), printed
  expected = flat(orbax_folder.read(GOLDEN, num_heads=2).params)
  found = trained_params(workdir)
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_a_captioner_loads_the_image_tower(tmp_path, cache):
  workdir = tmp_path / "run"
  # The folder of one step.
  flags = (
    *CAPTION,
    *NO_EVALUATION,
    f"--workdir={workdir}",
    f"--config.init_from.path={GOLDEN / 'checkpoint.npz' / '5'}",
    "--config.init_from.include=('^encoder/',)",
  )
  code, printed = runner.run(*flags, cache=cache)
  assert code == 0 and "20 arrays copied" in printed, printed
  expected = flat(orbax_folder.read(GOLDEN, num_heads=2).params["encoder"])
  found = trained_params(workdir)
  assert len(expected) == 20
  for path, array in expected.items():
    np.testing.assert_array_equal(found[f"encoder/{path}"], array, err_msg=path)


_OPEN = """
import sys
from apps.trainer.init_source import open_source
source = open_source(sys.argv[1])
print(source.name, len(source.arrays))
"""


@pytest.mark.skipif(
  importlib.util.find_spec("tensorflow") is None or shutil.which("openssl") is None,
  reason="a bucket needs TensorFlow, and the fake one a certificate made by openssl",
)
def test_a_checkpoint_in_a_bucket(tmp_path):
  with FakeBucket("bucket", tmp_path) as bucket:
    for file in GOLDEN.rglob("*"):
      if file.is_file():
        bucket.put(f"released/{file.relative_to(GOLDEN).as_posix()}", file.read_bytes())
    done = subprocess.run(
      [sys.executable, "-c", _OPEN, "gs://bucket/released/checkpoint.npz"],
      env=runner.environment(tmp_path / "home", **bucket.environment()),
      capture_output=True,
      text=True,
      timeout=240,
    )
  assert done.stdout.strip() == "gs://bucket/released/checkpoint.npz/5/default 65", done.stderr
