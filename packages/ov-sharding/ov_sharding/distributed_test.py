"""Tests of `initialize` in one process; //tests/multiprocess starts several."""

import importlib.util
import socket

import jax
import pytest

from ov_sharding import distributed, initialize, is_google_host

VARIABLES = ("OV_COORDINATOR", "OV_NUM_PROCESSES", "OV_PROCESS_ID")
SLURM = {
  "SLURM_JOB_ID": "1",
  "SLURM_STEP_NODELIST": "n[1-2]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "0",
}


@pytest.fixture(autouse=True)
def jax_distributed(monkeypatch):
  """Remove cluster variables and record calls of `jax.distributed.initialize`."""
  calls = []
  for name in (*VARIABLES, *SLURM, *OPEN_MPI, "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
  return calls


def test_one_process_starts_nothing(jax_distributed):
  initialize()
  initialize("127.0.0.1:1", 1, 0, timeout_seconds=1)
  assert jax_distributed == []


@pytest.mark.parametrize("source", ["arguments", "environment", "both"])
def test_explicit_values(source, jax_distributed, monkeypatch):
  values = ("10.0.0.1:8476", 2, 0)
  if source == "arguments":
    initialize(*values, timeout_seconds=7, gone_after_seconds=11)
  else:
    for name, value in zip(VARIABLES, values, strict=True):
      monkeypatch.setenv(name, str(value))
    if source == "both":  # an argument wins over its variable
      monkeypatch.setenv("OV_NUM_PROCESSES", "9")
      initialize(num_processes=2, timeout_seconds=7)
    else:
      initialize(timeout_seconds=7)
  assert jax_distributed == [
    dict(
      coordinator_address="10.0.0.1:8476",
      num_processes=2,
      process_id=0,
      cluster_detection_method="deactivate",
      initialization_timeout=7,
      heartbeat_timeout_seconds=11 if source == "arguments" else 30,
    )
  ]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(coordinator="h:1"), r"num_processes \(or OV_NUM_PROCESSES\), process_id \(or OV_PROC"),
    (dict(num_processes=2, process_id=0), r"also set coordinator \(or OV_COORDINATOR\)"),
    (dict(coordinator="host", num_processes=2, process_id=0), "'host'; expected host:port"),
    (dict(coordinator="h:x", num_processes=2, process_id=0), "'h:x'; expected host:port"),
    (dict(coordinator="h:1", num_processes=2, process_id=2), "process_id=2 with num_processes=2"),
    (dict(coordinator="h:1", num_processes=2, process_id=-1), "process_id=-1 with num_processes=2"),
  ],
)
def test_invalid_values(arguments, message):
  with pytest.raises(ValueError, match=message):
    initialize(**arguments)


def test_variables_must_be_integers(monkeypatch):
  for name, value in zip(VARIABLES, ("h:1", "two", "0"), strict=True):
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match="'num_processes': 'two'.*expected integers"):
    initialize()


def test_missing_coordinator():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))  # bound but not listening, so connections are refused
    address = f"127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=f"process 1 of 2: nothing listens at .*{address} after"):
      initialize(address, 2, 1, timeout_seconds=1)


def test_jax_errors_include_the_context(monkeypatch):
  def fail(**kwargs):
    raise RuntimeError("must be called before any JAX calls")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  message = r"start-up failed \(coordinator h:1, process 0 of 2\): must be called before"
  with pytest.raises(RuntimeError, match=message):
    initialize("h:1", 2, 0)


@pytest.mark.parametrize(
  "env, expected",
  [
    ({}, None),
    (SLURM, "Slurm"),
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # a batch script
    (OPEN_MPI, "Open MPI"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
  ],
)
def test_detects_slurm_and_open_mpi(env, expected, tmp_path):
  assert distributed.detect_cluster(env, tmp_path) == expected


@pytest.mark.parametrize(
  "env, files, libtpu, expected",
  [
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, False, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, {}, True, None),
    ({}, {"name": "Google Compute Engine", "dev/accel0": ""}, True, "TPU"),
    ({"JAX_PLATFORMS": "tpu,cpu"}, {"name": "Google", "dev/vfio/0": ""}, True, "TPU"),
    ({}, {"name": "Google Compute Engine"}, True, None),  # a virtual machine without TPU
    ({}, {"name": "ThinkPad", "dev/vfio/0": ""}, True, None),
    ({}, {"dev/accel0": ""}, True, None),
  ],
)
def test_detects_tpu_hosts(env, files, libtpu, expected, tmp_path, monkeypatch):
  found = importlib.util.find_spec("jax") if libtpu else None
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
  for name, text in files.items():
    path = tmp_path / ("sys/class/dmi/id/product_name" if name == "name" else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert distributed.detect_cluster(env, tmp_path) == expected


def test_jax_configures_a_detected_cluster(jax_distributed, monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  initialize(timeout_seconds=9)
  assert jax_distributed == [dict(initialization_timeout=9, heartbeat_timeout_seconds=30)]


@pytest.mark.parametrize(
  "product, expected", [("Google Compute Engine", True), ("ThinkPad", False), (None, False)]
)
def test_is_google_host(product, expected, tmp_path):
  if product:
    path = tmp_path / "sys/class/dmi/id/product_name"
    path.parent.mkdir(parents=True)
    path.write_text(product)
  assert is_google_host(tmp_path) == expected
