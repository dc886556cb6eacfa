"""PyTorch trains models of our sizes, in a process that answers as long as it is asked."""

import math
from pathlib import Path

import pytest

import ov_models
from tools.bench.torch_peer import TorchPeer, find_python, sizes_of

_SMALL = {"image_size": 32, "vocab_size": 512}
_SHALLOW = {"depth": 1}
CAPTIONER = ov_models.VisionLanguageConfig.openvision2(
  "Ti/16", "Ti", max_len=7, encoder_options=_SHALLOW, decoder_options=_SHALLOW, **_SMALL
)
PAIR = ov_models.VisionLanguageConfig.from_names(
  "Ti/16", "Ti", "Ti", text_len=6, caption_len=8, encoder_options=_SHALLOW,
  text_options=_SHALLOW, decoder_options=_SHALLOW, preset="openvision_released", **_SMALL,
)  # fmt: skip


def test_models_of_our_sizes_take_steps(tmp_path: Path):
  python = find_python()
  assert python is not None
  peer = TorchPeer(python, tmp_path)
  for name, model in (("caption", CAPTIONER), ("pair", PAIR)):
    params = ov_models.num_params(model)
    peer.build(name, sizes_of(model, 2, "cpu"), params)
    for steps in (1, 3):
      cpu, clock = peer.run(name, steps)
      assert cpu > 0 and clock > 0
  losses = [peer.ask({"run": "caption", "steps": 20})["loss"] for _ in range(2)]
  # It learns the batch, from a guess among 512 words; both losses weigh captions twice.
  assert losses[1] < losses[0] < 2.5 * math.log(512)
  with pytest.raises(RuntimeError, match=f"wrong has .* parameters in PyTorch, ours {2 * params}"):
    peer.build("wrong", sizes_of(PAIR, 2, "cpu"), 2 * params)
  assert (tmp_path / "inductor").is_dir()  # what was compiled goes with the folder


def test_a_process_that_ends_is_told(tmp_path: Path):
  python = find_python()
  assert python is not None
  peer = TorchPeer(python, tmp_path)
  with pytest.raises(RuntimeError, match="PyTorch ended with code 1; see its error above"):
    peer.run("nothing", 1)


def test_an_interpreter_that_is_not_there_is_told(monkeypatch):
  monkeypatch.setenv("OV_CLIENTS_PYTHON", "/nowhere/python")
  with pytest.raises(FileNotFoundError, match="OV_CLIENTS_PYTHON=/nowhere/python: there is no"):
    find_python()
