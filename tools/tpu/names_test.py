"""Tests of flag validation and topologies."""

import pytest

from tools.tpu import names
from tools.tpu.names import Topology

# Chips, hosts and shapes from the configuration tables of Google Cloud.
_TABLE = [
  ("v4-8", 4, 1, "2x2x1"),
  ("v4-16", 8, 2, "2x2x2"),
  ("v4-512", 256, 64, "4x8x8"),
  ("v5litepod-1", 1, 1, "1x1"),
  ("v5litepod-8", 8, 1, "2x4"),
  ("v5litepod-16", 16, 4, "4x4"),
  ("v5litepod-256", 256, 64, "16x16"),
  ("v5p-128", 64, 16, "4x4x4"),
  ("v5p-12288", 6144, 1536, "16x16x24"),
  ("v6e-8", 8, 1, "2x4"),
  ("v6e-256", 256, 64, "16x16"),
]


@pytest.mark.parametrize("name, chips, hosts, shape", _TABLE)
def test_topologies(name: str, chips: int, hosts: int, shape: str):
  found = Topology.parse(name)
  assert (found.chips, found.hosts, found.shape) == (chips, hosts, shape)
  assert found.chips_per_host * hosts == chips


def test_every_shape_has_its_number_of_chips():
  for kind, generation in names.GENERATIONS.items():
    for chips in generation.shapes:
      found = Topology.parse(f"{kind}-{chips * generation.per_chip}")
      sides = [int(side) for side in found.shape.split("x")]
      product = 1
      for side in sides:
        product *= side
      assert product == found.chips and found.chips % found.hosts == 0


@pytest.mark.parametrize(
  "value, message",
  [
    ("", "expected one of v4-N"),
    ("v4", "expected one of v4-N"),
    ("v7-256", "expected one of v4-N, v5litepod-N"),
    ("v4-2", "sizes 8, 16, 32"),
    ("v4-0512", "sizes 8, 16"),
    ("v4-512 --spot", "expected one of"),
    ("v4-٥١٢", "expected one of"),
    ("v6e-512", "sizes 1, 4, 8, 16, 32, 64, 128, 256"),
  ],
)
def test_invalid_topologies(value: str, message: str):
  with pytest.raises(ValueError, match="--topology=") as error:
    Topology.parse(value)
  assert message in str(error.value)


@pytest.mark.parametrize("name", ["a", "pod", "pod-1", "a" * 63])
def test_names(name: str):
  assert names.check("name", name) == name


@pytest.mark.parametrize(
  "name",
  [
    "", "Pod", "1pod", "pod-", "-pod", "--zone=x", "pod; rm -rf /", "pod\n", "pod$(id)", "pöd",
    "a" * 64, "pod pod", "pod:x",
  ],
)  # fmt: skip
def test_invalid_names(name: str):
  with pytest.raises(ValueError, match="--name") as error:
    names.check("name", name)
  assert "\n" not in str(error.value)


def test_other_values():
  assert names.check("zone", "europe-west4-a") == "europe-west4-a"
  assert names.check("project", "example.com:my-project-1") == "example.com:my-project-1"
  assert names.check("run", "L14_336.2") == "L14_336.2"
  assert names.check("bucket", "gs://my-bucket/a/b") == "gs://my-bucket/a/b"
  for kind, value in [
    ("zone", "us-central2"), ("zone", "us-central2-b;id"), ("project", "p"), ("run", "../x"),
    ("run", ".hidden"), ("version", "a b"),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=f"--{kind}=.*; expected"):
      names.check(kind, value)
  for value in ("s3://bucket", "gs://b", "gs://bucket/$(id)", "gs://bucket/a b"):
    with pytest.raises(ValueError, match="--libtpu="):
      names.check("bucket", value, "libtpu")


def test_local_files_are_not_read_as_flags_or_hosts():
  assert names.local_file("-x", "libtpu").endswith("/-x")
  with pytest.raises(ValueError, match="without a colon"):
    names.local_file("pod:x", "libtpu")


def test_cost():
  topology = Topology.parse("v4-512")
  assert "256 chips" in names.cost(topology, None, None)
  assert names.cost(topology, 57, None).endswith("14,592 chip-hours in 57 hours")
  # 256 chips x 1.50 = 384 per hour, x 10 hours = 3,840.
  assert "384.00 an hour" in names.cost(topology, 10, 1.5)
  assert "3,840.00 for 10 hours" in names.cost(topology, 10, 1.5)
  for bad in (0, -1, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="--price_per_chip_hour"):
      names.cost(topology, None, bad)
