"""Tests of low-rank adapters: values and gradients against a naive formula, and axes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ov_models
from ov_models import LoraConfig

TINY = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2}
MODEL = ov_models.ViTConfig(**TINY, patch_size=4, image_size=8, mlp="gated")
KERNELS = ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/gate", "mlp/up", "mlp/down")
LORA = LoraConfig(rank=2, alpha=6.0)


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
  return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


@pytest.fixture(scope="module")
def params():
  return ov_models.init(MODEL, jax.random.key(0))


def random_adapters(params):
  """Return parameters whose adapters are all non-zero."""
  adapted = ov_models.add_adapters(LORA, params, jax.random.key(1))
  rng = np.random.default_rng(0)
  fill = lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), jnp.float32)
  return adapted | {"lora": jax.tree.map(fill, adapted["lora"])}


def test_fresh_adapters_change_no_bit(params):
  adapted = ov_models.add_adapters(LORA, params, jax.random.key(1))
  chex.assert_trees_all_equal(ov_models.merge_adapters(LORA, adapted), params)
  chex.assert_trees_all_equal(ov_models.merge_adapters(LORA, params), params)
  kernels = {path for path in paths(params) if "blocks/" in path and path.endswith("/kernel")}
  assert kernels == {f"blocks/{name}/kernel" for name in KERNELS}
  assert {path[:-2] for path in paths(adapted["lora"])} == kernels
  a = adapted["lora"]["blocks"]["mlp"]["down"]["kernel"]["a"]
  chex.assert_shape(a, (3, 24, 2))
  assert not np.array_equal(a[0], a[1])


def test_merged_kernels_and_gradients_equal_the_naive_formula(params):
  adapted = random_adapters(params)
  images = jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
  direction = jnp.sin(jnp.arange(16))

  def loss(adapted):
    model = ov_models.bind(MODEL, ov_models.merge_adapters(LORA, adapted))
    return (model(images).pooled * direction).sum()

  def naive(adapted):
    merged = jax.tree.map(lambda x: x, {k: v for k, v in adapted.items() if k != "lora"})
    for name in KERNELS:
      kind, name = name.split("/")
      kernel = merged["blocks"][kind][name]["kernel"]
      low = adapted["lora"]["blocks"][kind][name]["kernel"]
      layers = [
        kernel[i] + (6.0 / 2) * sum(jnp.outer(low["a"][i, :, r], low["b"][i, r]) for r in (0, 1))
        for i in range(3)
      ]
      merged["blocks"][kind][name]["kernel"] = jnp.stack(layers)
    return (ov_models.bind(MODEL, merged)(images).pooled * direction).sum()

  ours, theirs = (jax.jit(jax.value_and_grad(f))(adapted) for f in (loss, naive))
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  for path, got in paths(ours[1]).items():
    want = paths(theirs[1])[path]
    # Float32 sums in another order, through three blocks; measured: 2e-6 of the largest entry.
    limit = 2e-5 * np.abs(want).max() + 1e-7
    np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=path)
  assert all(np.abs(g).max() > 0 for path, g in paths(ours[1]).items() if path.startswith("lora/"))


def test_axes_have_the_tree_and_dimensions_of_the_parameters(params):
  adapted = paths(ov_models.add_adapters(LORA, params, jax.random.key(1)))
  axes = paths(ov_models.adapter_axes(LORA, ov_models.logical_axes(MODEL)))
  assert axes.keys() == adapted.keys()
  assert all(len(axes[path]) == leaf.ndim for path, leaf in adapted.items())
  kernel = axes["blocks/mlp/up/kernel"]
  assert axes["lora/blocks/mlp/up/kernel/a"] == (*kernel[:2], None)
  assert axes["lora/blocks/mlp/up/kernel/b"] == (kernel[0], None, kernel[2])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rank": 0}, "rank=0 must be a positive integer"),
    ({"alpha": -1.0}, "alpha=-1.0; expected a number"),
    ({"include": ("^nothing",)}, "matches no kernel"),
    ({"include": ("bias$",)}, "only kernels have adapters"),
  ],
)
def test_invalid_adapters(params, fields, message):
  with pytest.raises(ValueError, match=message):
    config = LoraConfig(**{"rank": 2, "alpha": 1.0} | fields)
    ov_models.add_adapters(config, params, jax.random.key(0))
