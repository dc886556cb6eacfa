"""Throughput of a run: images per second, fraction of time waiting for input, MFU."""

import time

import jax

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
  """Return the peak FLOP/s of all devices of the run; None if unknown (CPUs, other devices)."""
  kind = jax.devices()[0].device_kind
  known = [name for name in _PEAK_FLOPS if kind.startswith(name)]
  return _PEAK_FLOPS[max(known, key=len)] * jax.device_count() if known else None


class Meter:
  """Averages over the steps since the last reading."""

  def __init__(self, *, batch_size: int, flops_per_example: float):
    """Start the clock.

    Args:
      batch_size: number of examples per step over all devices.
      flops_per_example: model FLOPs of one training example.
    """
    self._batch_size = batch_size
    self._flops = flops_per_example
    self._peak = peak_flops()
    self.reset()

  def reset(self) -> None:
    """Restart, so that compilation, evaluation and saving are not counted."""
    self._begin = time.perf_counter()
    self._steps = 0
    self._waited = 0.0

  def step(self, waited: float) -> None:
    """Count one step that waited this many seconds for its input."""
    self._steps += 1
    self._waited += waited

  def read(self) -> dict[str, float]:
    """Return the metrics in `sinks.TIMING_NAMES`; train/mfu only if the peak is known."""
    seconds = max(time.perf_counter() - self._begin, 1e-9)
    images = self._steps * self._batch_size / seconds
    values = {
      "train/images_per_second": images,
      "train/input_wait": self._waited / seconds,
      "train/seconds": seconds,
    }
    if self._peak:
      values["train/mfu"] = images * self._flops / self._peak
    return values
