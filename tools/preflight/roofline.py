"""Roofline lower bound of the step time.

The bound is the longest of three times: matmuls at peak FLOP/s, memory traffic at full bandwidth,
and collectives at full link bandwidth. Real steps are slower, because these do not overlap fully
and matmuls do not reach the peak. FLOPs are computed from the model, because XLA's cost analysis
counts loop bodies once.
"""

import dataclasses

from tools.preflight.topology import Chip

# Recomputed forward passes, in units of the model's forward pass.
_RECOMPUTED = {"full": 1.0, "offload": 0.0, "dots": 0.0, "none": 0.0}


@dataclasses.dataclass(frozen=True)
class Bound:
  """Lower bound of the seconds per step, and the resource that limits it."""

  compute: float
  memory: float | None  # None if nothing was compiled, so that the traffic is unknown
  links: float | None

  @property
  def seconds(self) -> float:
    return max(self.compute, self.memory or 0.0, self.links or 0.0)

  @property
  def limit(self) -> str:
    parts = {"matmuls": self.compute, "memory": self.memory or 0.0, "links": self.links or 0.0}
    return max(parts, key=lambda name: parts[name])


def executed_flops(model_flops: float, remat: str) -> float:
  """Return the FLOPs per example including recomputation: one more forward pass for remat="full".

  The model FLOPs cover forward and backward passes; the forward pass is a third. The attention
  matmuls that "dots" and "offload" recompute are not counted.
  """
  return model_flops * (1 + _RECOMPUTED[remat] / 3)


def bound(
  chip: Chip,
  *,
  flops_per_device: float,
  moved: float | None = None,
  sent: float | None = None,
) -> Bound:
  """Return the bound of a step on one chip.

  Args:
    chip: chip with peak FLOP/s and bandwidths.
    flops_per_device: FLOPs per step.
    moved: bytes read from and written to HBM per step.
    sent: bytes a device sends per step, over all of its links in parallel.
  """
  return Bound(
    flops_per_device / chip.peak_flops,
    None if moved is None else moved / chip.hbm_bandwidth,
    None if sent is None else sent / chip.ici_bandwidth,
  )
