"""Multi-host initialisation for a single machine, a Slurm or Open MPI job, or a TPU pod.

The coordinator and the number of processes come from the first of these that is set:
  1. the arguments of `initialize`;
  2. OV_COORDINATOR (host:port), OV_NUM_PROCESSES, OV_PROCESS_ID;
  3. Slurm, Open MPI or a TPU host, detected by `detect_cluster` and read by `jax.distributed`.
Otherwise the run has one process, and `initialize` does nothing.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import logging
import os
import pathlib
import socket
import threading
import time

import jax

logger = logging.getLogger(__name__)

_VARIABLES = {
  "coordinator": "OV_COORDINATOR",
  "num_processes": "OV_NUM_PROCESSES",
  "process_id": "OV_PROCESS_ID",
}
# Variables that `jax.distributed` needs to configure itself in a Slurm step or Open MPI job.
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
_OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_seconds: int = 300,
  gone_after_seconds: int = 30,
) -> None:
  """Connect the processes of a run. Call this once, before JAX uses any device.

  Args:
    coordinator: host:port of process 0; the same for all processes.
    num_processes: number of processes in the run.
    process_id: unique index of this process, 0 <= process_id < num_processes.
    timeout_seconds: maximum time to wait for the other processes.
    gone_after_seconds: heartbeat timeout. If a process sends no heartbeat for this long, the JAX
      runtime terminates the others with SIGABRT. Heartbeats come from runtime threads, so a
      process that computes, waits or holds the GIL is not affected.

  Raises:
    ValueError: if only some of the three values are set, or a value is invalid.
    RuntimeError: if devices are already in use, this was called before, or the coordinator cannot
      be reached. If another process never connects, process 0 logs an error with the address of
      the coordinator, and the JAX runtime then terminates it.
  """
  explicit = _explicit_settings(coordinator, num_processes, process_id)
  if explicit is None:
    cluster = detect_cluster()
    if cluster is not None:
      with _log_while_waiting(f"the {cluster} environment", timeout_seconds):
        _prepare()
        jax.distributed.initialize(
          initialization_timeout=timeout_seconds, heartbeat_timeout_seconds=gone_after_seconds
        )
    return

  address, count, index = explicit
  if count == 1:
    return
  if index > 0:
    _wait_for_coordinator(address, count, index, timeout_seconds)
  with _log_while_waiting(f"coordinator {address}, process {index} of {count}", timeout_seconds):
    _prepare()
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=count,
      process_id=index,
      cluster_detection_method="deactivate",
      initialization_timeout=timeout_seconds,
      heartbeat_timeout_seconds=gone_after_seconds,
    )


def detect_cluster(
  env: Mapping[str, str] | None = None, root: pathlib.Path = pathlib.Path("/")
) -> str | None:
  """Return the name of the multi-process environment of this process, or None.

  The check is strict, because `jax.distributed` waits minutes for a cluster that does not exist.

  Args:
    env: environment variables; default: those of this process.
    root: directory that contains dev and sys.
  """
  env = os.environ if env is None else env
  if all(name in env for name in _SLURM) and int(env["SLURM_NTASKS"]) > 1:
    return "Slurm"
  if all(name in env for name in _OPEN_MPI) and int(env["OMPI_COMM_WORLD_SIZE"]) > 1:
    return "Open MPI"
  platforms = env.get("JAX_PLATFORMS") or "tpu"
  if "tpu" in platforms.split(",") and importlib.util.find_spec("libtpu") is not None:
    if "TPU_WORKER_HOSTNAMES" in env or _is_google_tpu_host(root):
      return "TPU"
  return None


def _is_google_tpu_host(root: pathlib.Path) -> bool:
  chips = (root / "dev/accel0").exists() or (root / "dev/vfio/0").exists()
  return chips and is_google_host(root)


def is_google_host(root: pathlib.Path = pathlib.Path("/")) -> bool:
  """Return whether this is a Google Compute Engine VM, from firmware data without the network."""
  product = root / "sys/class/dmi/id/product_name"
  return product.is_file() and "Google" in product.read_text()


def _explicit_settings(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int] | None:
  """Return the validated values from arguments and environment, or None if none is set."""
  values: dict[str, object] = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  for name, variable in _VARIABLES.items():
    if values[name] is None:
      values[name] = os.environ.get(variable)
  known = {name: value for name, value in values.items() if value is not None}
  if not known:
    return None
  if len(known) < len(values):
    missing = ", ".join(f"{n} (or {v})" for n, v in _VARIABLES.items() if n not in known)
    raise ValueError(f"multi-process start-up got only {known}; also set {missing}.")
  address = str(known["coordinator"])
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"coordinator={address!r}; expected host:port, for example 10.0.0.1:8476.")
  try:
    count, index = int(str(known["num_processes"])), int(str(known["process_id"]))
  except ValueError:
    raise ValueError(f"{known}; expected integers for num_processes and process_id.") from None
  if not 0 <= index < count:
    raise ValueError(
      f"process_id={index} with num_processes={count}; expected 0 <= process_id < num_processes."
    )
  return address, count, index


def _prepare() -> None:
  if jax.distributed.is_initialized():
    raise RuntimeError("initialize() was already called in this process; call it once.")
  # CPU backends need this for collectives across processes; other backends ignore it.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")


def _wait_for_coordinator(address: str, count: int, index: int, timeout_seconds: int) -> None:
  """Wait until `address` accepts connections; the JAX client aborts instead of raising."""
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + timeout_seconds
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise RuntimeError(
          f"process {index} of {count}: nothing listens at coordinator {address} after "
          f"{timeout_seconds} s ({error}). Is process 0 running, and can this host reach it?"
        ) from None
    time.sleep(0.2)


@contextlib.contextmanager
def _log_while_waiting(what: str, timeout_seconds: int) -> Iterator[None]:
  """Log while start-up waits for other processes; the JAX runtime is silent until it aborts."""
  done = threading.Event()

  def watch() -> None:
    started = time.monotonic()
    pause = min(30.0, timeout_seconds / 2)
    while not done.wait(pause):
      waited = time.monotonic() - started
      if waited >= timeout_seconds:
        logger.error(
          "Start-up failed: not all processes connected within %d s (%s). Start every process "
          "with the same coordinator and number of processes, and open its port.",
          timeout_seconds,
          what,
        )
        return
      logger.warning("Still waiting for the other processes after %.0f s (%s)", waited, what)
      pause = min(pause, max(timeout_seconds - waited, 0.1))

  logger.info("Connecting: %s", what)
  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  except RuntimeError as error:
    raise RuntimeError(f"multi-process start-up failed ({what}): {error}") from error
  finally:
    done.set()
  logger.info("Connected: %s", what)
