from pathlib import Path

import numpy as np
import pytest

from tools.bench import checkpointing, saving
from tools.bench.compiling import load_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> saving.Saved:
  config = load_config("openvision2.py", checkpointing.MODEL.format("Ti"))
  config.model.vocab_size = 64
  config.model.encoder_options = config.model.decoder_options = {"depth": 1}
  return saving.Saved(config, tmp_path_factory.mktemp("saved") / "state")


@pytest.mark.parametrize("form", [checkpointing.OURS, *checkpointing.FILES])
def test_every_form_saves_and_gives_back_all(saved: saving.Saved, form: str):
  for _ in range(2):  # ours into the same folder, the others in place of their file
    found = saved.save(form)
    assert 0 < found["blocked_s"] <= found["clock_s"]
    # Random bits of a mantissa do not compress: at least those are on the disk.
    assert 0.8 * found["state_mib"] < found["file_mib"] < 1.1 * found["state_mib"]
  assert saved.restore(form)["mb_per_s"] > 0


def test_another_state_is_told(saved: saving.Saved, monkeypatch: pytest.MonkeyPatch):
  write, read = saving.FILES["npz"]
  spoil = lambda path: {name: np.zeros_like(array) for name, array in read(path).items()}
  monkeypatch.setitem(saving.FILES, "npz", (write, spoil))
  with pytest.raises(RuntimeError, match="npz gave back another state than was saved"):
    saved.restore("npz")


def test_cases_and_ratios(tmp_path: Path):
  benchmark = checkpointing.make(tmp_path)
  names = {case.name for case in benchmark.cases}
  assert len(names) == len(benchmark.cases) == 12
  assert len(benchmark.ratios) == 8
  assert all({ratio.case, ratio.base} <= names for ratio in benchmark.ratios)
  assert not list(tmp_path.iterdir())  # nothing is made before a case runs
