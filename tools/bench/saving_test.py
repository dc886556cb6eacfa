from pathlib import Path

import jax
import pytest

from tools.bench import saving
from tools.bench.compiling import load_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> saving.Saved:
  small = {
    "model.vocab_size": 64,
    "model.encoder_options": {"depth": 1},
    "model.decoder_options": {"depth": 1},
  }
  config = load_config("openvision2.py", saving.MODEL.format("Ti")).with_settings(small)
  return saving.Saved(config, tmp_path_factory.mktemp("saved") / "state")


def test_saves_and_restores_everything(saved: saving.Saved):
  for _ in range(2):  # reuses the folder
    found = saved.save()
    assert 0 < found["blocked_s"] <= found["clock_s"]
    # Random mantissa bits do not compress, which gives a lower bound of the size on disk.
    assert 0.8 * found["state_mib"] < found["file_mib"] < 1.1 * found["state_mib"]
  assert saved.restore()["mb_per_s"] > 0


def test_another_state_is_an_error(saved: saving.Saved):
  saved.save()
  saved._state = jax.tree.map(lambda leaf: leaf + 1, saved._state)
  with pytest.raises(RuntimeError, match="the restored state is not the saved one"):
    saved.restore()


def test_cases(tmp_path: Path):
  benchmark = saving.make(tmp_path)
  names = ["save/Ti", "restore/Ti", "save/S", "restore/S"]
  assert [case.name for case in benchmark.cases] == names
  assert not list(tmp_path.iterdir())  # making the cases creates nothing
