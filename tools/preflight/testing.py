"""The text of a small compiled program, for tests."""

# Written by hand in the form of a TPU's compiler: tables of source lines, layouts with memory
# spaces, a scan of 12 turns whose condition alone says so.
TEXT = """\
HloModule jit_update, is_scheduled=true

FileNames
1 "/src/apps/trainer/step.py"
2 "/src/packages/ov-models/ov_models/blocks.py"

FunctionNames
1 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=169 end_line=169 column=1 end_column=3}
2 {file_name_id=2 function_name_id=1 line=164 end_line=164 column=1 end_column=3}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused (p0: f32[12,8,4], p1: s32[]) -> f32[1,8,4] {
  %p0 = f32[12,8,4]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[1,8,4]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8,4}
}

%body (w: (s32[], f32[12,8,4])) -> (s32[], f32[12,8,4]) {
  %w = (s32[]{:T(128)}, f32[12,8,4]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  %stack = f32[12,8,4]{2,1,0:T(8,128)} get-tuple-element(%w), index=1
  %layer = f32[1,8,4]{2,1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused, \
metadata={op_name="jit(update)/while/body/slice" stack_frame_id=2}
  ROOT %next = (s32[]{:T(128)}, f32[12,8,4]{2,1,0:T(8,128)}) tuple(%i, %stack)
}

%condition (c: (s32[], f32[12,8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[12,8,4]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[12,8,4], b: bf16[2,3]) -> f32[12,8,4] {
  %a = f32[12,8,4]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %sum = f32[12,8,4]{2,1,0:T(8,128)} add(%a, %a), metadata={op_name="jit(update)/add" \
stack_frame_id=1}
  %start = (s32[]{:T(128)}, f32[12,8,4]{2,1,0:T(8,128)}) tuple(%zero, %sum)
  %loop = (s32[]{:T(128)}, f32[12,8,4]{2,1,0:T(8,128)}) while(%start), condition=%condition, \
body=%body
  ROOT %out = f32[12,8,4]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
