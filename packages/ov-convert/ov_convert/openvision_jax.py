"""Parameters of the published JAX training code of OpenVision and OpenVision 2, by name.

Theirs is one tree entry per layer and, on request, attention kernels split by head; ours stacks the
layers and keeps kernels 2-D. All that differs besides names is therefore shape. The map below is
the whole conversion: it is read in both directions and nothing is guessed.

Dimensions: D width, F mlp, N heads, H head dim, P patch, T tokens, V vocab, E width of the tower.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

import ov_models

Params = dict[str, Any]
Config = (
  ov_models.ViTConfig | ov_models.TextConfig | ov_models.CaptionerConfig | ov_models.TwoTowersConfig
)

_Tower = (
  ov_models.ViTConfig
  | ov_models.TextConfig
  | ov_models.DecoderConfig
  | ov_models.QueryDecoderConfig
)

# theirs (below the tower), ours (below the tower), transform: one of `_THEIR_SHAPE`.
_NORM = (("scale", "scale"), ("bias", "bias"))
_BLOCK_MAP = (
  *((f"LayerNorm_0/{a}", f"norm1/{b}", "same") for a, b in _NORM),
  *(
    (f"MultiHeadDotProductAttention_0/{name}/{leaf}", f"attn/{name}/{leaf}", transform)
    for name in ("query", "key", "value")
    for leaf, transform in (("kernel", "split_output"), ("bias", "split_output"))
  ),
  ("MultiHeadDotProductAttention_0/out/kernel", "attn/out/kernel", "split_input"),
  ("MultiHeadDotProductAttention_0/out/bias", "attn/out/bias", "same"),
  *((f"LayerNorm_1/{a}", f"norm2/{b}", "same") for a, b in _NORM),
  *(
    (f"MlpBlock_0/{theirs}/{leaf}", f"mlp/{ours}/{leaf}", "same")
    for theirs, ours in (("Dense_0", "up"), ("Dense_1", "down"))
    for leaf in ("kernel", "bias")
  ),
)
_VIT_MAP = (
  ("embedding/kernel", "patch_embed/kernel", "same"),
  ("cls", "cls", "lead_1_1"),
  ("encoder_norm/scale", "norm/scale", "same"),
  ("encoder_norm/bias", "norm/bias", "same"),
)
_VIT_POSITION = ("pos_embedding", "position_embedding", "lead_1")
_TEXT_MAP = (
  ("Embed_0/embedding", "embed/embedding", "same"),
  ("pos_embedding", "position_embedding", "lead_1"),
  ("encoder_norm/scale", "norm/scale", "same"),
  ("encoder_norm/bias", "norm/bias", "same"),
)
_WRITER_MAP = (  # what both decoders have
  ("image_projection_layer/kernel", "image_proj/kernel", "same"),
  ("decoder_norm/scale", "norm/scale", "same"),
  ("decoder_norm/bias", "norm/bias", "same"),
  ("head/kernel", "head/kernel", "same"),
)
_DECODER_MAP = (("Embed_0/embedding", "embed/embedding", "same"), *_WRITER_MAP)
_QUERY_DECODER_MAP = (("learnable_tokens", "queries", "same"), *_WRITER_MAP)
_QUERY_DECODER_TEXT = ("text_projection_layer/kernel", "text_proj/kernel", "same")
_JOINT_MAP = (
  ("img/head/kernel", "image_head/kernel", "same"),
  ("txt/head/kernel", "text_head/kernel", "same"),
  ("t", "log_scale", "lead_1"),
)

# Shape of their tensor, from the shape of ours and the number of heads.
_THEIR_SHAPE = {
  "same": lambda shape, heads: shape,
  "lead_1": lambda shape, heads: (1, *shape),
  "lead_1_1": lambda shape, heads: (1, 1, *shape),
  "split_output": lambda shape, heads: (*shape[:-1], heads, shape[-1] // heads),
  "split_input": lambda shape, heads: (heads, shape[0] // heads, *shape[1:]),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor in both trees.

  Attributes:
    theirs: their name, parts joined by "/".
    ours: our path, joined by "/".
    layer: index into the leading axis of our stacked tensor, or None.
    transform: how the shapes relate, see `_THEIR_SHAPE`. The two "split_" ones are optional in
      their tree (2-D or 3-D attention kernels).
    num_heads: N of the tower.
  """

  theirs: str
  ours: str
  layer: int | None
  transform: str
  num_heads: int

  def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of theirs for `shape` of ours (of one layer)."""
    return _THEIR_SHAPE[self.transform](shape, self.num_heads)


def name_map(config: Config) -> list[Entry]:
  """Every tensor of `config` in both trees.

  A ViTConfig maps the tower "img" of OpenVision and a TextConfig its tower "txt" (their heads
  belong to the contrastive model), a TwoTowersConfig all of OpenVision: "img", "txt",
  "txt_decoder" and "t". A CaptionerConfig maps the towers "img_encoder" and "txt_decoder" of
  OpenVision 2.

  Raises:
    ValueError: the config has parameters that the published models lack; all are listed.
  """
  if isinstance(config, ov_models.TwoTowersConfig):
    entries = list(_two_towers(config))
  elif isinstance(config, ov_models.CaptionerConfig):
    entries = [
      *_vit(config.encoder, "img_encoder/", "encoder/"),
      *_tower(_DECODER_MAP, config.decoder, "txt_decoder/", "decoder/"),
    ]
  elif isinstance(config, ov_models.TextConfig):
    entries = list(_tower(_TEXT_MAP, config, "txt/", ""))
  else:
    entries = list(_vit(config, "img/", ""))
  extra = sorted(set(_flatten(ov_models.abstract_params(config))) - {e.ours for e in entries})
  if extra:
    raise ValueError(
      f"the published models have no counterpart of {', '.join(extra)}; use pool='gap' or 'tok' "
      "in the image tower and no pool='map' in that of text, position='none' or 'sincos' in the "
      "decoder of OpenVision 2, and in OpenVision a decoder with queries and no bias."
    )
  return entries


def to_ours(flat: Mapping[str, np.ndarray], config: Config, ignore: Iterable[str] = ()) -> Params:
  """Their tensors as parameters of `config`.

  Args:
    flat: tensors by name, e.g. "img/Transformer/encoderblock_0/LayerNorm_0/scale"; attention
      kernels 2-D or 3-D.
    config: which model they are.
    ignore: names that may be left over, e.g. "img/head/kernel".

  Returns:
    Nested dict of numpy arrays as `ov_models.bind` takes it, dtypes unchanged.

  Raises:
    ValueError: tensors missing, left over or of a wrong shape; all are listed.
  """
  entries = name_map(config)
  shapes = _our_shapes(config)
  problems = [f"missing {e.theirs}" for e in entries if e.theirs not in flat]
  known = {e.theirs for e in entries} | set(ignore)
  problems += [f"left over {name} {np.shape(flat[name])}" for name in flat if name not in known]
  for entry in entries:
    if entry.theirs not in flat:
      continue
    wanted, got = _accepted_shapes(entry, shapes[entry.ours]), np.shape(flat[entry.theirs])
    if got not in wanted:
      problems.append(f"{entry.theirs} is {got}, expected {' or '.join(map(str, wanted))}")
  if problems:
    raise ValueError("tensors do not fit the config:\n  " + "\n  ".join(problems))

  layers: dict[str, list[np.ndarray]] = {}
  for entry in entries:
    tensor = np.asarray(flat[entry.theirs]).reshape(shapes[entry.ours])
    layers.setdefault(entry.ours, []).append(tensor)
  stacked = {e.ours for e in entries if e.layer is not None}
  return _unflatten(
    {name: np.stack(parts) if name in stacked else parts[0] for name, parts in layers.items()}
  )


def to_theirs(params: Params, config: Config, *, split_heads: bool = False) -> dict[str, Any]:
  """Our parameters under their names; the inverse of `to_ours`.

  Args:
    params: of `config`.
    config: which model they are.
    split_heads: write the attention kernels of both towers 3-D, [D, N, H] and [N, H, D]. The
      decoder's are 2-D in every published checkpoint.

  Raises:
    ValueError: parameters missing, left over or of a wrong shape; all are listed.
  """
  ov_models.bind(config, params)  # checks names and shapes
  shapes, ours = _our_shapes(config), _flatten(params)
  flat = {}
  for entry in name_map(config):
    tensor = np.asarray(ours[entry.ours])
    tensor = tensor if entry.layer is None else tensor[entry.layer]
    split = split_heads and not entry.theirs.startswith("txt_decoder/")
    if split or not entry.transform.startswith("split_"):
      tensor = tensor.reshape(entry.their_shape(shapes[entry.ours]))
    flat[entry.theirs] = tensor
  return flat


def _vit(config: ov_models.ViTConfig, theirs: str, ours: str) -> Iterator[Entry]:
  position = (_VIT_POSITION,) if config.position == "learned" else ()
  return _tower((*_VIT_MAP, *position), config, theirs, ours)


def _two_towers(config: ov_models.TwoTowersConfig) -> Iterator[Entry]:
  yield from _vit(config.encoder, "img/", "encoder/")
  if config.text is not None:
    yield from _tower(_TEXT_MAP, config.text, "txt/", "text/")
    for theirs, ours, transform in _JOINT_MAP:
      yield Entry(theirs, ours, None, transform, 1)
  if isinstance(decoder := config.decoder, ov_models.QueryDecoderConfig):
    text = (_QUERY_DECODER_TEXT,) if config.text is not None else ()
    yield from _tower((*_QUERY_DECODER_MAP, *text), decoder, "txt_decoder/", "decoder/")


def _tower(
  names: Iterable[tuple[str, str, str]],
  config: _Tower,
  theirs: str,
  ours: str,
) -> Iterator[Entry]:
  for a, b, transform in names:
    yield Entry(theirs + a, ours + b, None, transform, config.num_heads)
  for layer in range(config.depth):
    block = f"{theirs}Transformer/encoderblock_{layer}/"
    for a, b, transform in _BLOCK_MAP:
      yield Entry(block + a, f"{ours}blocks/{b}", layer, transform, config.num_heads)


def _accepted_shapes(entry: Entry, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
  shapes = [entry.their_shape(ours)]
  return [ours, *shapes] if entry.transform.startswith("split_") else shapes


def _our_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Shape of each of our tensors, of one layer where stacked."""
  flat = _flatten(ov_models.abstract_params(config))
  return {n: s.shape[1:] if "blocks" in n.split("/") else s.shape for n, s in flat.items()}


def _flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{name}/")
    else:
      flat[prefix + name] = value
  return flat


def _unflatten(flat: Mapping[str, Any]) -> Params:
  tree: Params = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = value
  return tree
