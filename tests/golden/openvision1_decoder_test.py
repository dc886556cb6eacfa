"""Our decoder with learned queries equals the predecessor's: logits, loss and every gradient.

It gets the tokens of the plain towers in openvision1_reference.py, so that what differs is the
decoder's. With OV_PRINT_GOLDEN=1 the largest differences are printed.
"""

import os
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import QueryDecoder, QueryDecoderConfig
from tests.golden import openvision1_reference as reference

DIMS = reference.Dims(
  image_heads=2, text_heads=2, decoder_heads=2, image_depth=2, text_depth=2, decoder_depth=2
)
CONFIG = QueryDecoderConfig(
  width=40, depth=2, mlp_dim=80, num_heads=2, vocab_size=128, num_queries=12
)

# Ours to the predecessor's, where "{}" is the layer.
BLOCK = "Transformer/encoderblock_{}/"
ATTENTION = BLOCK + "MultiHeadDotProductAttention_0/"
NAMES = {
  "queries": "learnable_tokens",
  "image_proj/kernel": "image_projection_layer/kernel",
  "text_proj/kernel": "text_projection_layer/kernel",
  "norm/scale": "decoder_norm/scale",
  "norm/bias": "decoder_norm/bias",
  "head/kernel": "head/kernel",
}
for leaf in ("scale", "bias"):
  NAMES |= {f"blocks/norm{i + 1}/{leaf}": f"{BLOCK}LayerNorm_{i}/{leaf}" for i in range(2)}
for leaf in ("kernel", "bias"):
  NAMES |= {
    f"blocks/attn/{p}/{leaf}": f"{ATTENTION}{p}/{leaf}" for p in ["query", "key", "value", "out"]
  }
  NAMES |= {
    f"blocks/mlp/{p}/{leaf}": f"{BLOCK}MlpBlock_0/Dense_{i}/{leaf}"
    for i, p in enumerate(("up", "down"))
  }


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(pathlib.Path(__file__).parent / "openvision1.npz"))


def ours(golden, prefix):
  """The predecessor's decoder arrays under `prefix` as our tree."""
  tree = {}
  for path, name in NAMES.items():
    *parents, last = path.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    full = f"{prefix}/txt_decoder/{name}"
    layers = [golden[full.format(i)] for i in range(CONFIG.depth)]
    node[last] = jnp.asarray(np.stack(layers) if "{}" in name else layers[0])
  return tree


def show(name, got, expected):
  if os.environ.get("OV_PRINT_GOLDEN"):
    difference = np.abs(np.asarray(got) - expected).max()
    print(f"{name}: largest difference {difference:.3g} of {np.abs(expected).max():.3g}")


@pytest.fixture(scope="module")
def evaluated(golden):
  """((2 x caption loss, logits), gradients) of our decoder over the reference's towers."""
  params = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
  _, image = reference.encode_image(params, golden["image_normalised"], DIMS)
  _, text = reference.encode_text(params, golden["labels1"], DIMS)
  make = lambda: QueryDecoder(CONFIG, image.shape[-1], text.shape[-1], rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(nnx.eval_shape(make))
  labels, mask = golden["autoreg_labels"], golden["cap_loss_mask"]

  @jax.jit
  def run(params):
    def loss(params):
      hidden = nnx.merge(graphdef, params)(image, text)
      logits = hidden @ params["head"]["kernel"]
      nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
      return 2 * (nll * mask).sum() / (mask.sum() + 1e-8), logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  params = ours(golden, "param")
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
  with jax.default_matmul_precision("highest"):
    return run(params)


def test_caption_logits_and_loss(golden, evaluated):
  (loss, logits), _ = evaluated
  for name, got in [("caption_logits", logits), ("caption_loss", loss / 2)]:
    show(name, got, golden[name])
    # Two float32 programs of a few dozen sums of up to 80 terms.
    np.testing.assert_allclose(got, golden[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_every_gradient_of_the_decoder(golden, evaluated):
  grads, expected = evaluated[1], ours(golden, "grad")
  names = [
    jax.tree_util.keystr(p, simple=True, separator="/")
    for p, _ in jax.tree_util.tree_leaves_with_path(expected)
  ]
  # All 22, with the 16 of the second layer stacked onto those of the first.
  assert len(names) == len(NAMES) == sum(k.startswith("grad/txt_decoder") for k in golden) - 16
  leaves = zip(names, jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
  for name, got, want in leaves:
    show(name, got, want)
    # The gradient of a key bias is zero but for rounding: hence the 1e-8.
    atol = 1e-5 * np.abs(want).max() + 1e-8
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol, err_msg=name)
