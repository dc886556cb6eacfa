"""Tensors of the blocks and of the text tower of open_clip."""

from collections.abc import Iterator

from ov_convert.name_map import SAME, TRANSPOSE, Entry
import ov_models

_QKV = ("query", "key", "value")
BLOCK = (  # theirs, ours, transform
  ("ln_1.weight", ("norm1/scale",), SAME),
  ("ln_1.bias", ("norm1/bias",), SAME),
  ("attn.in_proj_weight", tuple(f"attn/{name}/kernel" for name in _QKV), TRANSPOSE),
  ("attn.in_proj_bias", tuple(f"attn/{name}/bias" for name in _QKV), SAME),
  ("attn.out_proj.weight", ("attn/out/kernel",), TRANSPOSE),
  ("attn.out_proj.bias", ("attn/out/bias",), SAME),
  ("ln_2.weight", ("norm2/scale",), SAME),
  ("ln_2.bias", ("norm2/bias",), SAME),
  ("mlp.c_fc.weight", ("mlp/up/kernel",), TRANSPOSE),
  ("mlp.c_fc.bias", ("mlp/up/bias",), SAME),
  ("mlp.c_proj.weight", ("mlp/down/kernel",), TRANSPOSE),
  ("mlp.c_proj.bias", ("mlp/down/bias",), SAME),
)
_SCALES = (("ls_1.gamma", ("scale1",), SAME), ("ls_2.gamma", ("scale2",), SAME))


def entries(config: ov_models.TextConfig) -> Iterator[Entry]:
  """Yield the entries of a text tower with its projection."""
  yield Entry("token_embedding.weight", ("text/embed/embedding",))
  yield Entry("positional_embedding", ("text/position_embedding",))
  yield Entry("ln_final.weight", ("text/norm/scale",))
  yield Entry("ln_final.bias", ("text/norm/bias",))
  yield Entry("text_projection", ("text_head/kernel",))
  yield from blocks("", "text/", config)


def blocks(
  theirs: str, ours: str, config: ov_models.ViTConfig | ov_models.TextConfig
) -> Iterator[Entry]:
  """Yield the entries of the blocks of a tower; `theirs` and `ours` are prefixes."""
  lines = BLOCK if config.layer_scale is None else (*BLOCK, *_SCALES)
  for layer in range(config.depth):
    for name, paths, transform in lines:
      path = tuple(f"{ours}blocks/{path}" for path in paths)
      yield Entry(f"{theirs}transformer.resblocks.{layer}.{name}", path, transform, layer)
