"""Flags of XLA that simulate several CPU devices in one process."""


def xla_flags(devices: int) -> str:
  """Return the value of `XLA_FLAGS` that simulates this number of CPU devices.

  XLA's default CPU scheduler lets a device run several collectives at once. Each of them occupies a
  thread of a pool with one thread per device. If none is left for the last device, all wait for it
  until XLA aborts the process after 40 s. Without that scheduler a device runs one operation at a
  time.

  Args:
    devices: number of simulated devices.
  """
  flags = [f"--xla_force_host_platform_device_count={devices}"]
  if devices > 1:
    flags.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
  return " ".join(flags)
