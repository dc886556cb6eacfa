"""Steps of the same models in PyTorch, by a process of the clients' environment that stays alive.

One process has all models and runs while it is asked; what torch.compile makes is made once.
"""

from collections.abc import Mapping
import json
import os
from pathlib import Path
import subprocess
from typing import Any

from ov_convert import client_env
from ov_models.config import TransformerConfig

CLOSE = 0.01  # by how much the number of parameters may differ from ours, as a share


def find_python() -> Path | None:
  """The interpreter of the clients' environment; None where nothing names one.

  Raises:
    FileNotFoundError: the one that is named is not there.
  """
  try:
    return client_env.find_python()
  except FileNotFoundError:
    if os.environ.get("OV_CLIENTS_PYTHON"):
      raise
    return None


class TorchPeer:
  """Builds models and runs steps of them; starts when it is first asked, ends with this process."""

  def __init__(self, python: Path, scratch: Path) -> None:
    """`scratch` gets what is compiled."""
    self._python, self._scratch = python, scratch
    self._process: subprocess.Popen[str] | None = None

  def build(self, name: str, sizes: Mapping[str, Any], params: int) -> None:
    """Makes and compiles a model of `sizes`, from `sizes_of`, under a name.

    Raises:
      RuntimeError: it has another number of parameters than ours, which are `params`.
    """
    found = self.ask({"build": name, "model": sizes})["params"]
    if abs(found - params) > CLOSE * params:
      raise RuntimeError(f"{name} has {found:.0f} parameters in PyTorch, ours {params}")

  def run(self, name: str, steps: int) -> tuple[float, float]:
    """CPU and clock seconds of so many steps."""
    answer = self.ask({"run": name, "steps": steps})
    return answer["cpu"], answer["clock"]

  def ask(self, question: Mapping[str, Any]) -> dict[str, float]:
    """The answer to a line of clients/time_training.py; RuntimeError where there is none."""
    if self._process is None:
      self._process = self._start()
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin is not None and stdout is not None  # they are pipes
    stdin.write(json.dumps(question) + "\n")
    stdin.flush()
    for line in stdout:
      if line.startswith("{"):  # libraries may print, too
        return json.loads(line)
    raise RuntimeError(f"PyTorch ended with code {self._process.wait()}; see its error above")

  def _start(self) -> subprocess.Popen[str]:
    threads = str(len(os.sched_getaffinity(0)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    own["TORCHINDUCTOR_CACHE_DIR"] = str(self._scratch / "inductor")
    return subprocess.Popen(
      [str(self._python), str(client_env.SCRIPTS / "time_training.py"), threads],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | own,
    )  # fmt: skip


def sizes_of(model: Any, batch: int, device: str) -> dict[str, Any]:
  """What clients/time_training.py builds a model from.

  Args:
    model: with a teacher-forced decoder, or with a text tower and a decoder of learned queries.
    batch: B.
    device: as PyTorch calls it.
  """
  vit, decoder = model.encoder, model.decoder
  shared = {
    "device": device,
    "dtype": vit.dtype,
    "batch": batch,
    "vocab": decoder.vocab_size,
    "image": {"size": vit.image_size, "patch": vit.patch_size, **_blocks(vit)},
    "decoder": _blocks(decoder),
  }
  if model.text is None:
    return shared | {"caption_len": decoder.max_len, "kept": model.num_kept}
  return shared | {
    "caption_len": decoder.num_queries,
    "embed_dim": model.embed_dim,
    "text": {"length": model.text.max_len, **_blocks(model.text)},
  }


def _blocks(config: TransformerConfig) -> dict[str, int]:
  return {
    "width": config.width,
    "depth": config.depth,
    "mlp": config.mlp_dim,
    "heads": config.num_heads,
  }
