"""Tests of the checkpoint of the released code that is stored with the golden values."""

import math
import os
import pathlib

import jax
import numpy as np
import pytest

from ov_convert import openvision_jax, orbax_folder
import ov_models

GOLDEN = pathlib.Path(__file__).parents[3] / "tests" / "golden"


def stored_checkpoint():
  places = [pathlib.Path(os.environ["OV_GOLDEN"])] if os.environ.get("OV_GOLDEN") else []
  places += [parent / "shared" / "golden" for parent in pathlib.Path(__file__).absolute().parents]
  for place in places:
    if (folder := place / "openvision1_checkpoint").exists():
      return folder.resolve()
  pytest.skip(
    "SKIPPED: openvision1_checkpoint not found; set OV_GOLDEN to the folder that holds it"
  )


def test_the_stored_checkpoint():
  # Sizes as in tests/golden/dims.json, five updates after the parameters that are stored there.
  found = orbax_folder.read(stored_checkpoint(), image_size=32, num_heads=2)
  golden = dict(np.load(GOLDEN / "openvision1.npz"))
  back = openvision_jax.to_theirs(found.params, found.config)
  after = {n.partition("/")[2]: a for n, a in golden.items() if n.startswith("param_after5/")}
  assert len(after) > 80
  for name, array in after.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)

  model = ov_models.bind(found.config, found.params)
  with jax.default_matmul_precision("highest"):
    image = model.encode_image(golden["image_normalised"])
  expected = by_hand({name: np.float64(array) for name, array in back.items()}, golden)
  # float32 against float64 over two layers; one update later they are no longer the same.
  np.testing.assert_allclose(image.unit, expected, atol=2e-6)
  assert np.abs(golden["zimg"] - expected).max() > 1e-3


def by_hand(p, golden):
  """Embeddings of images by the published formulas, from their tensors, in float64."""
  images, (patch, width, heads) = np.float64(golden["image_normalised"]), (8, 64, 2)
  n, side = len(images), images.shape[1] // patch
  x = images.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(n, side * side, -1) @ p["img/embedding/kernel"].reshape(-1, width)
  omega = 10000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
  rows, columns = np.divmod(np.arange(side * side), side)
  angles = [columns[:, None] * omega, rows[:, None] * omega]
  x = x + np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
  x = np.concatenate([np.broadcast_to(p["img/cls"], (n, 1, width)), x], axis=1)

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]

  def dense(x, name):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

  for layer in range(2):
    block = f"img/Transformer/encoderblock_{layer}"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
    y = norm(x, f"{block}/LayerNorm_0")
    q, k, v = (
      dense(y, f"{attention}/{name}").reshape(n, -1, heads, width // heads)
      for name in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(width // heads))
    y = np.einsum("bnqk,bknh->bqnh", scores / scores.sum(-1, keepdims=True), v)
    x = x + dense(y.reshape(x.shape), f"{attention}/out")
    y = dense(norm(x, f"{block}/LayerNorm_1"), f"{mlp}/Dense_0")
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    x = x + dense(y, f"{mlp}/Dense_1")
  z = norm(x[:, 1:].mean(1), "img/encoder_norm") @ p["img/head/kernel"]
  return z / np.linalg.norm(z, axis=1, keepdims=True)
