"""Name map of the published OpenVision and OpenVision 2 JAX training code.

Their tree has one entry per layer and optionally splits attention kernels by head; ours stacks the
layers and keeps kernels 2-D. Conversion therefore changes only names and shapes, and the name map
below defines it in both directions.

Dimensions: D width, F mlp, N heads, H head dim, P patch, T tokens, V vocab, E width of the tower.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ov_convert.name_map import (
  LEAD_1,
  LEAD_1_1,
  SAME,
  Entry,
  NameMap,
  Params,
  Transform,
)
import ov_models

Config = ov_models.ViTConfig | ov_models.TextConfig | ov_models.VisionLanguageConfig

_Tower = (
  ov_models.ViTConfig
  | ov_models.TextConfig
  | ov_models.DecoderConfig
  | ov_models.QueryDecoderConfig
)

# theirs (below the tower), ours (below the tower), transform; a string is a key of `_by_heads`.
_NORM = (("scale", "scale"), ("bias", "bias"))
_BLOCK_MAP: tuple[tuple[str, str, Transform | str], ...] = (
  *((f"LayerNorm_0/{a}", f"norm1/{b}", SAME) for a, b in _NORM),
  *(
    (f"MultiHeadDotProductAttention_0/{name}/{leaf}", f"attn/{name}/{leaf}", "split output")
    for name in ("query", "key", "value")
    for leaf in ("kernel", "bias")
  ),
  ("MultiHeadDotProductAttention_0/out/kernel", "attn/out/kernel", "split input"),
  ("MultiHeadDotProductAttention_0/out/bias", "attn/out/bias", SAME),
  *((f"LayerNorm_1/{a}", f"norm2/{b}", SAME) for a, b in _NORM),
  *(
    (f"MlpBlock_0/{theirs}/{leaf}", f"mlp/{ours}/{leaf}", SAME)
    for theirs, ours in (("Dense_0", "up"), ("Dense_1", "down"))
    for leaf in ("kernel", "bias")
  ),
)
_VIT_MAP = (
  ("embedding/kernel", "patch_embed/kernel", SAME),
  ("cls", "cls", LEAD_1_1),
  ("encoder_norm/scale", "norm/scale", SAME),
  ("encoder_norm/bias", "norm/bias", SAME),
)
_VIT_POSITION = ("pos_embedding", "position_embedding", LEAD_1)
_TEXT_MAP = (
  ("Embed_0/embedding", "embed/embedding", SAME),
  ("pos_embedding", "position_embedding", LEAD_1),
  ("encoder_norm/scale", "norm/scale", SAME),
  ("encoder_norm/bias", "norm/bias", SAME),
)
_COMMON_DECODER_MAP = (  # common to both decoders
  ("image_projection_layer/kernel", "image_proj/kernel", SAME),
  ("decoder_norm/scale", "norm/scale", SAME),
  ("decoder_norm/bias", "norm/bias", SAME),
  ("head/kernel", "head/kernel", SAME),
)
_DECODER_MAP = (("Embed_0/embedding", "embed/embedding", SAME), *_COMMON_DECODER_MAP)
_QUERY_DECODER_MAP = (("learnable_tokens", "queries", SAME), *_COMMON_DECODER_MAP)
_QUERY_DECODER_TEXT = ("text_projection_layer/kernel", "text_proj/kernel", SAME)
_JOINT_MAP = (
  ("img/head/kernel", "image_head/kernel", SAME),
  ("txt/head/kernel", "text_head/kernel", SAME),
  ("t", "log_scale", LEAD_1),
)


def name_map(config: Config, *, split_heads: bool = False) -> NameMap:
  """Return the name map of a config.

  A ViTConfig maps the tower "img" of OpenVision and a TextConfig its tower "txt" (without heads,
  which belong to the contrastive model). A VisionLanguageConfig maps all of OpenVision: "img",
  "txt", "txt_decoder" and "t"; with a teacher-forced decoder and no text tower, it maps the towers
  "img_encoder" and "txt_decoder" of OpenVision 2.

  Args:
    config: configuration of the model.
    split_heads: whether to write the attention kernels of both towers 3-D, as [D, N, H] and
      [N, H, D]. Both forms can be read. Decoder kernels are 2-D in all published checkpoints.

  Raises:
    ValueError: if the published models lack some of the parameters; lists all of them.
  """
  if isinstance(config, ov_models.VisionLanguageConfig):
    entries = list(_vision_language(config, split_heads))
  elif isinstance(config, ov_models.TextConfig):
    entries = list(_tower(_TEXT_MAP, config, "txt/", "", split_heads))
  else:
    entries = list(_vit(config, "img/", "", split_heads))
  found = NameMap("the published models", tuple(entries))
  try:
    found.check_complete(config)
  except ValueError as error:
    raise ValueError(
      f"{str(error).rstrip('.')}; use pool='gap' or 'tok' "
      "in the image tower and no pool='map' in that of text, position='none' or 'sincos' in the "
      "decoder of OpenVision 2, and in OpenVision a decoder with queries and no bias."
    ) from None
  return found


def to_ours(flat: Mapping[str, np.ndarray], config: Config, ignore: Iterable[str] = ()) -> Params:
  """Convert their tensors to parameters of `config`.

  Args:
    flat: tensors by name, e.g. "img/Transformer/encoderblock_0/LayerNorm_0/scale"; attention
      kernels 2-D or 3-D.
    config: configuration of the model.
    ignore: names of tensors that may be unused, e.g. "img/head/kernel".

  Returns:
    Nested dict of numpy arrays for `ov_models.bind`; dtypes are kept.

  Raises:
    ValueError: if tensors are missing, unexpected or of a wrong shape; lists all of them.
  """
  return name_map(config).to_ours(flat, config, ignore)


def to_theirs(params: Params, config: Config, *, split_heads: bool = False) -> dict[str, Any]:
  """Convert our parameters to their tensors; the inverse of `to_ours`.

  Args:
    params: parameters of `config`.
    config: configuration of the model.
    split_heads: see `name_map`.

  Raises:
    ValueError: if parameters are missing, unexpected or of a wrong shape; lists all of them.
  """
  return name_map(config, split_heads=split_heads).to_theirs(params, config)


def _vit(config: ov_models.ViTConfig, theirs: str, ours: str, split_heads: bool) -> Iterator[Entry]:
  position = (_VIT_POSITION,) if config.position == "learned" else ()
  return _tower((*_VIT_MAP, *position), config, theirs, ours, split_heads)


def _vision_language(config: ov_models.VisionLanguageConfig, split_heads: bool) -> Iterator[Entry]:
  if config.text is None and isinstance(config.decoder, ov_models.DecoderConfig):
    yield from _vit(config.encoder, "img_encoder/", "encoder/", split_heads)
    yield from _tower(_DECODER_MAP, config.decoder, "txt_decoder/", "decoder/", False)
    return
  yield from _vit(config.encoder, "img/", "encoder/", split_heads)
  if config.text is not None:
    yield from _tower(_TEXT_MAP, config.text, "txt/", "text/", split_heads)
    for theirs, ours, transform in _JOINT_MAP:
      yield Entry(theirs, (ours,), transform)
  if isinstance(decoder := config.decoder, ov_models.QueryDecoderConfig):
    text = (_QUERY_DECODER_TEXT,) if config.text is not None else ()
    names = (*_QUERY_DECODER_MAP, *text)
    yield from _tower(names, decoder, "txt_decoder/", "decoder/", False)


def _tower(
  names: Iterable[tuple[str, str, Transform]],
  config: _Tower,
  theirs: str,
  ours: str,
  split_heads: bool,
) -> Iterator[Entry]:
  for a, b, reshape in names:
    yield Entry(theirs + a, (ours + b,), reshape)
  by_heads = _by_heads(config.num_heads)
  for layer in range(config.depth):
    block = f"{theirs}Transformer/encoderblock_{layer}/"
    for a, b, transform in _BLOCK_MAP:
      path = (f"{ours}blocks/{b}",)
      if isinstance(transform, Transform):
        yield Entry(block + a, path, transform, layer)
      else:
        forms = (by_heads[transform], SAME) if split_heads else (SAME, by_heads[transform])
        yield Entry(block + a, path, forms[0], layer, also=forms[1:])


def _by_heads(heads: int) -> dict[str, Transform]:
  """Return the transforms that split heads into a separate axis."""
  return {
    "split output": Transform("split output", shape=lambda s: (*s[:-1], heads, s[-1] // heads)),
    "split input": Transform("split input", shape=lambda s: (heads, s[0] // heads, *s[1:])),
  }
