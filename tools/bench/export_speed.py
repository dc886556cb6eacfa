"""How fast an image tower runs on this CPU: ours, and as it is exported.

  bazel run //tools/bench:export_speed -- --model=B/16 --batch=8 --out=/tmp/speed.json

Every engine has a process of its own that is kept alive, the same cores and as many threads. They
are asked in turn, round after round, so that what else the machine does hits all alike; the figure
is the ratio to ours within a round. Weights are random: they have no say in the time.
"""

from collections.abc import Callable
import dataclasses
import datetime
import json
import os
from pathlib import Path
import statistics
import subprocess
import tempfile
import time
from typing import IO, Any

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors

ENGINES = ("jax", "onnxruntime", "timm", "timm_compiled", "torch", "torch_compiled")
_FORMATS = {"onnxruntime": "onnx", "timm": "timm", "torch": "safetensors"}

_MODEL = flags.DEFINE_string("model", "B/16", "Image tower, as for ViTConfig.from_name.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels a side.")
_BATCH = flags.DEFINE_integer("batch", 8, "Pictures at a time.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each engine is asked.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores, and threads of each engine.", lower_bound=1)
_ENGINES = flags.DEFINE_list("engines", list(ENGINES), "Which, in the order they are asked.")
_OUT = flags.DEFINE_string("out", None, "File to write the figures to, as JSON.")


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of one run: on the clock, and of all threads together."""

  wall: float
  cpu: float


def main() -> None:
  if unknown := sorted(set(_ENGINES.value) - set(ENGINES)):
    raise UserError(f"--engines={','.join(unknown)}: there are {', '.join(ENGINES)}")
  if _ENGINES.value[:1] != ["jax"]:
    raise UserError("--engines: the first must be jax, which the others are compared with")
  with user_errors():
    _limit_cores(_THREADS.value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
      result = measure(Path(scratch))
    print(table(result))
    if _OUT.value:
      Path(_OUT.value).expanduser().write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _limit_cores(count: int) -> None:
  """To the first ones, also of processes to come. Before jax counts them."""
  allowed = sorted(os.sched_getaffinity(0))
  if len(allowed) < count:
    raise ValueError(f"--threads={count}, but this process may use {len(allowed)} cores")
  os.sched_setaffinity(0, allowed[:count])


def measure(scratch: Path) -> dict[str, Any]:
  """Writes the folders, starts the engines, asks them in turn."""
  import jax
  import numpy as np

  from ov_convert import onnx_export, timm_vit, torch_module
  from ov_convert.release import Preprocess, Release
  import ov_models

  config = ov_models.ViTConfig.from_name(_MODEL.value, _IMAGE_SIZE.value)
  params = jax.tree.map(np.asarray, ov_models.init(config, jax.random.key(0)))
  release = Release(config, params, Preprocess(config.image_size))
  writers = {"onnx": onnx_export.write, "timm": timm_vit.write, "safetensors": torch_module.write}
  for name in {_FORMATS[engine.partition("_")[0]] for engine in _ENGINES.value[1:]}:
    print(f"writing {name} ...", flush=True)
    writers[name](scratch / name, release)
  shape = (_BATCH.value, config.image_size, config.image_size, 3)
  pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  np.save(scratch / "pixels.npy", np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

  model = ov_models.bind(config, jax.device_put(params))
  given = jax.device_put(pixels)
  forward = jax.jit(lambda model, pixels: model(pixels))
  ours = lambda: jax.block_until_ready(forward(model, given))
  reference = np.asarray(ours().pooled)

  timings: dict[str, list[Timing]] = {engine: [] for engine in _ENGINES.value}
  with Clients(_ENGINES.value[1:], scratch, _THREADS.value) as clients:
    differences = {"jax": 0.0}
    for engine in clients.names:
      pooled = clients.pooled(engine)
      differences[engine] = float(np.abs(pooled - reference).max() / np.abs(reference).max())
    for number in range(_ROUNDS.value + 1):  # the first warms up
      print(f"round {number} of {_ROUNDS.value}", flush=True)
      for engine in _ENGINES.value:
        timing = _timed(ours) if engine == "jax" else clients.run(engine)
        if number > 0:
          timings[engine].append(timing)
  return {
    "model": _MODEL.value,
    "image_size": _IMAGE_SIZE.value,
    "batch": _BATCH.value,
    "dtype": "float32",
    "threads": _THREADS.value,
    "rounds": _ROUNDS.value,
    "date": datetime.date.today().isoformat(),
    "engines": {engine: _summary(engine, timings, differences[engine]) for engine in timings},
  }


def _timed(run: Callable[[], Any]) -> Timing:
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _summary(engine: str, timings: dict[str, list[Timing]], difference: float) -> dict[str, Any]:
  """Medians over the rounds; ratios to ours of the same round."""
  own, ours = timings[engine], timings["jax"]
  walls = [a.wall / b.wall for a, b in zip(own, ours)]
  return {
    "wall": statistics.median(t.wall for t in own),
    "cpu": statistics.median(t.cpu for t in own),
    "wall_ratio": statistics.median(walls),
    "wall_ratios": [min(walls), max(walls)],
    "cpu_ratio": statistics.median(a.cpu / b.cpu for a, b in zip(own, ours)),
    "images_per_second": _BATCH.value / statistics.median(t.wall for t in own),
    "difference": difference,
    "rounds": [dataclasses.astuple(timing) for timing in own],
  }


class Clients:
  """Processes of the clients' environment, one an engine, that wait to be asked."""

  def __init__(self, names: list[str], scratch: Path, threads: int) -> None:
    from ov_convert import client_env

    self.names, self.scratch = names, scratch
    self.processes: dict[str, subprocess.Popen[str]] = {}
    python = client_env.find_python() if names else ""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    for name in names:
      print(f"starting {name} ...", flush=True)
      folder = scratch / _FORMATS[name.partition("_")[0]]
      command = [python, client_env.SCRIPTS / "time_engine.py", name, folder]
      self.processes[name] = subprocess.Popen(
        [*map(str, command), str(scratch / "pixels.npy"), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
      )  # fmt: skip
      self._answer(name)  # one after the other: what they compile is not timed, but takes memory

  def run(self, name: str) -> Timing:
    """One run of an engine."""
    return Timing(**self._ask(name, ""))

  def pooled(self, name: str) -> Any:
    """Its pooled output [B, D]."""
    import numpy as np

    file = self.scratch / f"{name}.npy"
    self._ask(name, str(file))
    return np.load(file)

  def _ask(self, name: str, line: str) -> dict[str, Any]:
    stdin: IO[str] = self.processes[name].stdin  # type: ignore[assignment]  # it is a pipe
    stdin.write(line + "\n")
    stdin.flush()
    return self._answer(name)

  def _answer(self, name: str) -> dict[str, Any]:
    stdout: IO[str] = self.processes[name].stdout  # type: ignore[assignment]
    for line in stdout:
      if line.startswith("{"):  # libraries may print, too
        return json.loads(line)
    raise ValueError(f"{name} ended with code {self.processes[name].wait()}; see its error above")

  def __enter__(self) -> "Clients":
    return self

  def __exit__(self, *_: Any) -> None:
    for process in self.processes.values():
      process.terminate()
      process.wait()


def table(result: dict[str, Any]) -> str:
  """The figures as Markdown."""
  lines = [
    f"ViT-{result['model']}@{result['image_size']}, batch {result['batch']}, float32, "
    f"{result['threads']} threads, {result['rounds']} rounds, {result['date']}:",
    "",
    "| engine | s a batch | ratio to ours (range) | CPU s | ratio | pooled differs by |",
    "|---|---|---|---|---|---|",
  ]
  for name, row in result["engines"].items():
    low, high = row["wall_ratios"]
    lines.append(
      f"| {name} | {row['wall']:.3g} | {row['wall_ratio']:.2f} ({low:.2f} to {high:.2f}) | "
      f"{row['cpu']:.3g} | {row['cpu_ratio']:.2f} | {row['difference']:.1e} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  run_app(main)
