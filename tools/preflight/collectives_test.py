"""Exchanges in the forms compilers write, what they send, and what must not be there."""

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
import pytest

from tools.preflight import hlo
from tools.preflight.collectives import (
  activation_gathers,
  by_kind,
  collectives,
  replicated_params,
)

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
HEAD = """\
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (q: f32[8,256]) -> f32[2,256] {
  %q = f32[8,256]{1,0} parameter(0)
  ROOT %inner = f32[8,256]{1,0} all-reduce(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (p: f32[8,256]) -> f32[8,256] {
  %p = f32[8,256]{1,0} parameter(0)
"""


def _one(line: str) -> hlo.Program:
  return hlo.parse(f"{HEAD}  ROOT %it = {line}\n}}\n")


@pytest.mark.parametrize(
  "line, kind, axes, group, payload, sent",
  [
    (
      "f32[8,256]{1,0} all-reduce(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add",
      "all-reduce", ("data",), 2, 8192, 8192.0,
    ),
    (
      "f32[8,256]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}",
      "all-gather", ("fsdp",), 4, 8192, 6144.0,
    ),
    (
      "f32[8,256]{1,0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
      "all-gather", ("data",), 2, 8192, 4096.0,
    ),
    (
      "bf16[8,256]{1,0} all-gather(%p), replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], "
      "device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}",
      "all-gather", ("fsdp",), 4, 4096, 3072.0,
    ),
    (
      "f32[8,256]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add",
      "all-reduce", ("data", "fsdp"), 8, 8192, 14336.0,
    ),
    (
      "f32[2,256]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
      "reduce-scatter", ("fsdp",), 4, 8192, 6144.0,
    ),
    (
      "f32[2,256]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
      "reduce-scatter", ("fsdp",), 4, 8192, 6144.0,
    ),
    (
      "(f32[2,256]{1,0}, f32[8,256]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]",
      "all-gather", ("fsdp",), 4, 8192, 6144.0,
    ),
    (
      "f32[8,256]{1,0} collective-permute(%p), source_target_pairs={{0,4},{4,0}}",
      "collective-permute", ("data",), 2, 8192, 8192.0,
    ),
  ],
)  # fmt: skip
def test_forms(line, kind, axes, group, payload, sent):
  [found] = collectives(_one(line), MESH)
  assert (found.kind, found.axes, found.group, found.payload) == (kind, axes, group, payload)
  assert found.sent == sent


def test_an_exchange_with_oneself_is_none():
  line = "f32[8,256]{1,0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"
  assert collectives(_one(line), MESH) == []


def test_sums_by_kind():
  line = "f32[8,256]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}"
  found = collectives(_one(line), MESH)
  assert by_kind([*found, *found]) == [("all-gather", "fsdp", 2, 12288.0)]


def test_gathers_of_activations_stand_out():
  def gathers(rows: int) -> hlo.Program:
    return _one(f"f32[{rows},1024]{{1,0}} all-gather(%p), replica_groups=[2,4]<=[8]")

  params = {"kernel": jax.ShapeDtypeStruct((24, 1024, 1024), "float32")}
  layer = collectives(gathers(1024), MESH)
  assert activation_gathers(layer, params) == []
  other = collectives(gathers(1536), MESH)
  assert activation_gathers(other, params) == other
  # What a loss between rows gathers is meant, and small arrays matter to nobody.
  assert activation_gathers(other, params, compared_bytes=1536 * 1024 * 4) == []
  assert activation_gathers(collectives(gathers(8), MESH), params) == []


def test_replicated_params_stand_out():
  mesh = AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
  params = {
    "a": jax.ShapeDtypeStruct((512, 512), "float32"),
    "b": jax.ShapeDtypeStruct((512, 512), "float32"),
    "bias": jax.ShapeDtypeStruct((512,), "float32"),
  }
  split, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("fsdp",), ()))
  shardings = {"a": split, "b": whole, "bias": whole}
  assert replicated_params(params, shardings, MESH) == ["b"]
  assert replicated_params(params, shardings, {"data": 8, "fsdp": 1, "tensor": 1}) == []
