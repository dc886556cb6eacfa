"""OpenVision 1 in plain array arithmetic: two towers, learned-query caption decoder, both losses.

A slow, literal reading of the model for tests: no modules, no scan, no mixed precision. Parameters
are a flat dict under the predecessor's names with 2-D attention kernels, for example
`img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel` [D, D]. Everything is
float32 at the highest matmul precision.

B batch, T tokens, D width, N heads, H head dim, P patch, V vocabulary, Q learned queries.
"""

from collections.abc import Callable
import dataclasses
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp

Params = dict[str, Array]

gelu_erf = partial(jax.nn.gelu, approximate=False)
gelu_tanh = partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class Dims:
  """Heads and depths, which the shapes of the parameters do not tell."""

  image_heads: int
  text_heads: int
  decoder_heads: int
  image_depth: int
  text_depth: int
  decoder_depth: int


def dense(params: Params, name: str, x: Array) -> Array:
  """x @ kernel (+ bias, where there is one)."""
  y = jnp.matmul(x, params[f"{name}/kernel"], precision="highest")
  return y + params[f"{name}/bias"] if f"{name}/bias" in params else y


def layer_norm(params: Params, name: str, x: Array) -> Array:
  mean = x.mean(-1, keepdims=True)
  var = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(var + 1e-6) * params[f"{name}/scale"] + params[f"{name}/bias"]


def attention(params: Params, name: str, x: Array, heads: int, mask: Array | None) -> Array:
  """Self-attention of [B, T, D]; mask [T, T] is True where a query (row) sees a key (column)."""
  b, t, d = x.shape
  q, k, v = (
    dense(params, f"{name}/{part}", x).reshape(b, t, heads, d // heads)
    for part in ("query", "key", "value")
  )
  q = q / jnp.sqrt(d // heads)
  logits = jnp.einsum("BQNH,BKNH->BNQK", q, k, precision="highest")
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits, axis=-1)
  y = jnp.einsum("BNQK,BKNH->BQNH", weights, v, precision="highest")
  return dense(params, f"{name}/out", y.reshape(b, t, d))


def transformer(
  params: Params,
  name: str,
  x: Array,
  heads: int,
  depth: int,
  gelu: Callable[[Array], Array],
  mask: Array | None = None,
) -> Array:
  """Pre-norm blocks without a norm at the end."""
  for i in range(depth):
    block = f"{name}/Transformer/encoderblock_{i}"
    y = layer_norm(params, f"{block}/LayerNorm_0", x)
    x = x + attention(params, f"{block}/MultiHeadDotProductAttention_0", y, heads, mask)
    y = layer_norm(params, f"{block}/LayerNorm_1", x)
    y = gelu(dense(params, f"{block}/MlpBlock_0/Dense_0", y))
    x = x + dense(params, f"{block}/MlpBlock_0/Dense_1", y)
  return x


def sincos2d(rows: int, columns: int, width: int) -> Array:
  """[rows * columns, D]: sin x, cos x, sin y, cos y; D / 4 frequencies 10000^(-k / (D/4 - 1))."""
  k = width // 4
  omega = 10000.0 ** (-jnp.arange(k) / (k - 1))
  y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
  angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
  return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=1)


def encode_image(params: Params, image: Array, dims: Dims) -> tuple[Array, Array]:
  """Normalised image [B, H, W, 3] -> (projected [B, E], pre-norm patch tokens [B, T, D])."""
  kernel = params["img/embedding/kernel"]  # [P, P, 3, D]
  p, width = kernel.shape[0], kernel.shape[-1]
  b, rows, columns = image.shape[0], image.shape[1] // p, image.shape[2] // p
  patches = image[:, : rows * p, : columns * p].reshape(b, rows, p, columns, p, 3)
  x = jnp.einsum("BrPcQC,PQCD->BrcD", patches, kernel, precision="highest")
  x = x.reshape(b, rows * columns, width) + sincos2d(rows, columns, width)
  cls = jnp.broadcast_to(params["img/cls"], (b, 1, width))  # its position is zero
  x = jnp.concatenate([cls, x], axis=1)
  tokens = transformer(params, "img", x, dims.image_heads, dims.image_depth, gelu_erf)[:, 1:]
  pooled = layer_norm(params, "img/encoder_norm", tokens.mean(axis=1))
  return dense(params, "img/head", pooled), tokens


def encode_text(params: Params, ids: Array, dims: Dims) -> tuple[Array, Array]:
  """ids int32 [B, T] -> (projected [B, E], tokens [B, T - 1, D] before the norm, last one cut)."""
  x = params["txt/Embed_0/embedding"][ids] + params["txt/pos_embedding"]
  x = transformer(params, "txt", x, dims.text_heads, dims.text_depth, gelu_tanh)
  last = layer_norm(params, "txt/encoder_norm", x)[:, -1]
  return dense(params, "txt/head", last), x[:, :-1]


def decode(params: Params, image_tokens: Array, text_tokens: Array, dims: Dims) -> Array:
  """Caption logits [B, Q, V] of learned queries that see image, text and the queries before."""
  queries = params["txt_decoder/learnable_tokens"]
  image = dense(params, "txt_decoder/image_projection_layer", image_tokens)
  text = dense(params, "txt_decoder/text_projection_layer", text_tokens)
  queries = jnp.broadcast_to(queries, (len(image), *queries.shape))
  x = jnp.concatenate([image, text, queries], axis=1)
  prefix = image.shape[1] + text.shape[1]
  position = jnp.arange(x.shape[1])
  mask = position[None, :] <= jnp.maximum(position[:, None], prefix - 1)
  x = transformer(params, "txt_decoder", x, dims.decoder_heads, dims.decoder_depth, gelu_tanh, mask)
  x = layer_norm(params, "txt_decoder/decoder_norm", x[:, prefix:])
  return dense(params, "txt_decoder/head", x)


def unit(z: Array) -> Array:
  return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


def contrastive_loss(image: Array, text: Array, scale: Array) -> Array:
  """Mean of the cross entropies over rows and columns of scale * image @ text.T."""
  logits = scale * jnp.matmul(image, text.T, precision="highest")
  rows = jnp.diagonal(jax.nn.log_softmax(logits, axis=1)).mean()
  columns = jnp.diagonal(jax.nn.log_softmax(logits, axis=0)).mean()
  return -0.5 * (rows + columns)


def loss(params: Params, batch: dict[str, Array], dims: Dims) -> tuple[Array, dict[str, Array]]:
  """1 x contrastive + 2 x caption loss, and what it is made of.

  Args:
    batch: image_normalised [B, H, W, 3]; labels1, labels2 int32 [B, T]; autoreg_labels and
      cap_loss_mask int32 [B, Q].
  """
  z_image, image_tokens = encode_image(params, batch["image_normalised"], dims)
  labels = jnp.concatenate([batch["labels1"], batch["labels2"]])
  z_text, text_tokens = encode_text(params, labels, dims)
  b = len(z_image)
  logits = decode(params, image_tokens, text_tokens[:b], dims)  # the first text only

  z_image, z_text = unit(z_image), unit(z_text)
  scale = jnp.exp(params["t"][0])
  contrastive = 0.5 * sum(contrastive_loss(z_image, z, scale) for z in (z_text[:b], z_text[b:]))
  nll = -jnp.take_along_axis(
    jax.nn.log_softmax(logits), batch["autoreg_labels"][..., None], axis=-1
  )[..., 0]
  mask = batch["cap_loss_mask"]
  caption = (nll * mask).sum() / (mask.sum() + 1e-8)
  parts = {
    "image_tokens": image_tokens,
    "zimg": z_image,
    "ztxt": z_text,
    "caption_logits": logits,
    "contrastive_loss": contrastive,
    "caption_loss": caption,
  }
  return contrastive + 2.0 * caption, parts
