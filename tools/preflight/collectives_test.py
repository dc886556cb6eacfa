"""Tests of the HLO forms of collectives, the bytes they send, and unwanted collectives."""

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
import pytest

from tools.preflight.collectives import (
  Collective,
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


def _one(line: str) -> list[Collective]:
  return collectives(f"{HEAD}  ROOT %it = {line}\n}}\n", MESH)[0]


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
  [found] = _one(line)
  assert (found.kind, found.axes, found.group, found.payload) == (kind, axes, group, payload)
  assert found.sent == sent


def test_a_group_of_one_device_is_not_a_collective():
  line = "f32[8,256]{1,0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"
  assert _one(line) == []


def test_sums_by_kind():
  line = "f32[8,256]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}"
  found = _one(line)
  assert by_kind([*found, *found]) == [("all-gather", "fsdp", 2, 12288.0)]


def test_gathers_of_activations_are_reported():
  def gathers(rows: int) -> list[Collective]:
    return _one(f"f32[{rows},1024]{{1,0}} all-gather(%p), replica_groups=[2,4]<=[8]")

  params = {"kernel": jax.ShapeDtypeStruct((24, 1024, 1024), "float32")}
  layer = gathers(1024)
  assert activation_gathers(layer, params) == []
  other = gathers(1536)
  assert activation_gathers(other, params) == other
  # A loss that compares all rows may gather its embeddings, and small arrays are ignored.
  assert activation_gathers(other, params, compared_bytes=1536 * 1024 * 4) == []
  assert activation_gathers(gathers(8), params) == []


def test_replicated_params_are_reported():
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


# Output of a TPU compiler: layouts have memory spaces, and the length of the scan over 12 layers is
# only in its condition.
LOOP = """\
%body (w: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %w = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  %x = f32[8,256]{1,0:T(8,128)S(1)} get-tuple-element(%w), index=1
  %y = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=[2,4]<=[8], \
metadata={op_name="jit(update)/while/body/gather" stack_frame_id=2}
  ROOT %next = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (c: (s32[], f32[8,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8,256]) -> f32[8,256] {
  %a = f32[8,256]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,256]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_collectives_in_a_loop_count_once_per_layer():
  [found], unknown = collectives(LOOP, MESH)
  assert (found.times, found.payload, found.elements) == (12, 8 * 256 * 2, 8 * 256)
  assert found.name == "jit(update)/while/body/gather" and unknown == []


def test_a_loop_of_unknown_length_counts_once():
  [found], unknown = collectives(LOOP.replace("direction=LT", "direction=NE"), MESH)
  assert found.times == 1 and unknown == ["loop"]


def test_text_without_a_program():
  with pytest.raises(ValueError, match="no entry computation"):
    collectives("HloModule empty\n", MESH)
