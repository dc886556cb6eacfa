"""Multi-host start-up: one call that is right on a laptop, a Slurm job and a TPU pod.

Who the other processes are is taken from the first of these that says anything:
  1. the arguments of `initialize`;
  2. OV_COORDINATOR (host:port), OV_NUM_PROCESSES, OV_PROCESS_ID;
  3. Slurm, Open MPI or a TPU pod, recognised here and read by `jax.distributed`.
Otherwise this is a run of one process, and nothing is started.
"""

import importlib.util
import logging
import os
import pathlib
import socket
import time

import jax

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
  "coordinator": "OV_COORDINATOR",
  "num_processes": "OV_NUM_PROCESSES",
  "process_id": "OV_PROCESS_ID",
}


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_seconds: int = 300,
) -> None:
  """Connects the processes of a run; call it once, before anything that touches a device.

  Args:
    coordinator: host:port at which process 0 listens; the same for all processes.
    num_processes: processes in the run.
    process_id: 0 <= process_id < num_processes, different in each.
    timeout_seconds: how long to wait for the others.

  Raises:
    ValueError: when only some of the three values are known, or they make no sense.
    RuntimeError: when the devices are in use already, or a process is missing.
  """
  given = _given(coordinator, num_processes, process_id)
  if given is None:
    cluster = detect_cluster()
    if cluster is None:
      return
    _start(f"the {cluster} environment", timeout_seconds)
    return
  coordinator, num_processes, process_id = given
  if num_processes == 1:
    return
  if process_id > 0:
    _wait_for_coordinator(coordinator, num_processes, process_id, timeout_seconds)
  _start(
    f"coordinator {coordinator}, process {process_id} of {num_processes}",
    timeout_seconds,
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    cluster_detection_method="deactivate",
  )


def detect_cluster() -> str | None:
  """Name of the multi-process environment this process was started in, or None."""
  env = os.environ
  if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
    return "Slurm"
  if "OMPI_MCA_orte_hnp_uri" in env and int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
    return "Open MPI"
  if _is_tpu_worker():
    return "TPU"
  return None


def _is_tpu_worker() -> bool:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms.split(","):
    return False
  if importlib.util.find_spec("libtpu") is None:
    return False
  devices = ("/dev/accel0", "/dev/vfio/0")
  return "TPU_WORKER_HOSTNAMES" in os.environ or any(pathlib.Path(d).exists() for d in devices)


def _given(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int] | None:
  values: dict[str, str | int | None] = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  for name, variable in _ENVIRONMENT.items():
    if values[name] is None:
      values[name] = os.environ.get(variable)
  missing = [name for name, value in values.items() if value is None]
  if len(missing) == len(values):
    return None
  if missing:
    known = {name: value for name, value in values.items() if value is not None}
    remedy = ", ".join(f"{name} ({_ENVIRONMENT[name]})" for name in missing)
    raise ValueError(f"multi-process start-up got {known} only; also needed: {remedy}.")
  address = str(values["coordinator"])
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"coordinator={address!r}; expected host:port, for example 10.0.0.1:8476.")
  count, index = _integer("num_processes", values), _integer("process_id", values)
  if not 0 <= index < count:
    raise ValueError(f"process_id={index} with num_processes={count}; expected 0 <= id < number.")
  return address, count, index


def _integer(name: str, values: dict[str, str | int | None]) -> int:
  try:
    return int(str(values[name]))
  except ValueError:
    raise ValueError(
      f"{name} ({_ENVIRONMENT[name]}) is {values[name]!r}; expected an integer."
    ) from None


def _wait_for_coordinator(
  coordinator: str, num_processes: int, process_id: int, timeout_seconds: int
) -> None:
  """Returns as soon as something listens; jax alone would retry without a word."""
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + timeout_seconds
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise RuntimeError(
          f"process {process_id} of {num_processes}: nothing listens at coordinator {coordinator} "
          f"after {timeout_seconds} s ({error}). Is process 0 running, and can this host reach it?"
        ) from None
    time.sleep(0.2)


def _start(what: str, timeout_seconds: int, **kwargs: str | int) -> None:
  logger.info("Connecting: %s", what)
  # Between processes the CPU backend needs a collectives library; other backends ignore this.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(initialization_timeout=timeout_seconds, **kwargs)
  except RuntimeError as error:
    raise RuntimeError(f"multi-process start-up failed ({what}): {error}") from error
  logger.info("Connected: process %d of %d", jax.process_index(), jax.process_count())
