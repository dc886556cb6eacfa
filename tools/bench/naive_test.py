"""The predecessor's form computes what ours does: else it would be no yardstick."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apps.trainer.augment import normalise
from tools.bench import naive
from tools.bench.compiling import load_config, plan_of
from tools.bench.stepping import made_batch, made_state

_TINY = (
  "img=mu/16,txt_decoder_name=Ti,res=48,vocab_size=512,batch_size=4,remat=none,color_jitter=false"
)
RECIPES = {
  "caption": ("openvision2.py", f"{_TINY},token_len=16"),
  "released caption": ("openvision2.py", f"{_TINY},token_len=16,preset=openvision2_released"),
  "clip": ("openvision.py", f"{_TINY},txt_name=Ti,token_len=8,output_token_len=16"),
}


def _plan(name: str):
  config = load_config(*RECIPES[name])
  shallow = {"model.decoder_options": {"depth": 2}}
  if name == "clip":
    shallow["model.text_options"] = {"depth": 2}
  for path, options in shallow.items():
    config.model[path.removeprefix("model.")].update(options)
  return plan_of(config, "cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradients_are_ours(name):
  plan = _plan(name)
  task, params = plan.parts.task, made_state(plan)["params"]
  batch = made_batch(plan)
  # Some padding: what both leave out.
  for text in {"ids", "caption_ids"} & set(batch):
    batch[text] = batch[text].at[1:, 9:].set(task.pad_id)
  batch["image"] = normalise(batch["image"])
  key = jax.random.fold_in(jax.random.key(0), 0)

  def ours(params):
    return task.loss(params, batch, key).loss

  loss, grads = jax.jit(jax.value_and_grad(ours))(params)
  of_naive = naive.loss_of(task)
  other, other_grads = jax.jit(jax.value_and_grad(of_naive))(naive.unstack(params), batch, key)
  # Float32 sums of a few thousand terms, in another order: 1e-6 of the largest.
  np.testing.assert_allclose(other, loss, rtol=2e-6)
  grads = naive.unstack(grads)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
  assert jax.tree.structure(grads) == jax.tree.structure(other_grads)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True
  ):
    atol = 2e-5 * float(jnp.abs(a).max()) + 1e-7 * scale
    np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_updates_are_ours():
  plan = _plan("caption")
  params = made_state(plan)["params"]
  grads = jax.tree.map(lambda p: p + 0.01, params)
  ours, theirs = plan.parts.optimizer, naive.unstack(params)
  tx = naive.make_optimizer(ours.learning_rate)

  def updates(tx: optax.GradientTransformation, grads, params):
    opt = tx.init(params)
    for _ in range(2):  # the first is all zeros: the rate warms up
      update, opt = tx.update(grads, opt, params)
    return update

  found = jax.jit(lambda: updates(tx, naive.unstack(grads), theirs))()
  expected = naive.unstack(jax.jit(lambda: updates(ours.tx, grads, params))())
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    # The first moment is rounded to bfloat16, or not, as the compiler likes.
    np.testing.assert_allclose(b, a, rtol=2**-7)
