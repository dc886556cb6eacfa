"""Tests that every loss equals its naive reference in all JAX contexts, such as shard_map.

Runs on two devices and with any supported jax; `tests/standalone/jax_versions_check.py` runs it
with the oldest and the newest.
"""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import ov_losses
from ov_losses.testing.naive import naive_loss

ROWS, LENGTH, WIDTH, VOCAB, TEXTS = 4, 5, 8, 11, 2
AXIS = "d"


class Case(NamedTuple):
  """A loss, its naive reference, and the batch dimension `axes` of each argument."""

  loss: Any
  naive: Any
  args: tuple[np.ndarray, ...]
  axes: tuple[int | None, ...]
  differentiable: int  # the first arguments


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def caption(hidden, head, ids):
  targets, mask = ov_losses.shift_left(ids, pad_id=0)
  return ov_losses.caption_cross_entropy(
    hidden, head, targets, mask, label_smoothing=0.1, z_loss=0.01, tile=2
  ).loss


def naive_caption(hidden, head, ids):
  targets = jnp.concatenate([ids[:, 1:], jnp.zeros_like(ids[:, :1])], axis=1)
  return naive_loss(hidden, head, targets, targets != 0, label_smoothing=0.1, z_loss=0.01)


def likelihood(hidden, head, ids):
  return jnp.sum(ov_losses.sequence_log_likelihood(hidden, head, ids, ids != 0))


def naive_likelihood(hidden, head, ids):
  logp = jax.nn.log_softmax((hidden @ head.astype(hidden.dtype)).astype(jnp.float32))
  return jnp.sum(jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0] * (ids != 0))


def contrastive(kind, form, image, texts, scale, ids):
  groups = ov_losses.text_groups(ids)
  bias = () if kind == "softmax" else (scale - 12.0,)
  loss = {"softmax": ov_losses.contrastive_softmax, "sigmoid": ov_losses.contrastive_sigmoid}[kind]
  out = loss(unit(image), unit(texts), scale, *bias, text_groups=groups, form=form, chunk=2)
  return out.loss


def naive_contrastive(kind, image, texts, scale, ids):
  """Compute the loss by its formula in float32, without blocks."""
  image, texts = unit(image).astype(jnp.float32), unit(texts).astype(jnp.float32)
  same = jnp.all(ids[:, None, :] == ids[None, :, :], axis=-1) & ~np.eye(len(ids), dtype=bool)
  total = 0.0
  for text in texts:
    logits = scale * image @ text.T
    own = jnp.sum(logits * np.eye(len(ids), dtype=np.float32), axis=1)
    if kind == "softmax":
      masked = jnp.where(same, -1e30, logits)
      total += jnp.mean(jax.nn.logsumexp(masked, 1) + jax.nn.logsumexp(masked, 0) - 2 * own) / 2
    else:
      logits, own = logits + scale - 12.0, own + scale - 12.0
      other = jnp.where(same | np.eye(len(ids), dtype=bool), 0.0, jax.nn.softplus(logits))
      total += jnp.mean(jax.nn.softplus(-own) + other.sum(1))
  return total / len(texts)


def accumulated(kind, image, texts, scale, ids):
  """Compute loss and gradients by gradient_cache with two microbatches."""
  rows = {"image": image, "text": jnp.swapaxes(texts, 0, 1), "ids": ids}
  batches = jax.tree.map(lambda x: jnp.stack([x[0::2], x[1::2]]), rows)

  def embed(params, batch, key):
    del key
    embedded = {"image": params["image"] * batch["image"], "text": batch["text"]}
    own = jnp.mean(batch["image"] ** 2) * params["scale"]
    return embedded | {"ids": batch["ids"]}, (own, jnp.float32(len(batch["ids"])), {})

  def combine(params, rows):
    texts = jnp.swapaxes(rows["text"], 0, 1)
    loss = contrastive(kind, "gathered", rows["image"], texts, params["scale"], rows["ids"])
    return loss, jnp.float32(1), {"twice": 2 * loss}

  params = {"image": jnp.ones(WIDTH, jnp.float32), "scale": scale}
  return ov_losses.gradient_cache(embed, combine, params, batches, jax.random.key(0))


def arrays(dtype=np.float32):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(dtype)
  ids = rng.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  ids[:, -1] = 0
  ids[1] = ids[0]  # equal texts
  return normal, ids


def cases(dtype=np.float32):
  normal, ids = arrays(dtype)
  hidden, head = normal(ROWS, LENGTH, WIDTH), normal(WIDTH, VOCAB).astype(np.float32)
  image, texts = normal(ROWS, WIDTH), normal(TEXTS, ROWS, WIDTH)
  scale = np.float32(7.0)
  found = {
    "caption": Case(caption, naive_caption, (hidden, head, ids), (0, None, 0), 2),
    "likelihood": Case(likelihood, naive_likelihood, (hidden, head, ids), (0, None, 0), 2),
  }
  for kind in ("softmax", "sigmoid"):
    for form in ("gathered", "ring", "naive"):
      found[f"{kind} {form}"] = Case(
        functools.partial(contrastive, kind, form),
        functools.partial(naive_contrastive, kind),
        (image, texts, scale, ids),
        (0, 1, None, 0),
        3,
      )
  return found


CASES = cases()


def mesh_of(kind):
  assert jax.device_count() >= 2, "run with --xla_force_host_platform_device_count=2"
  return jax.make_mesh((2,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:2])


def spec(axis):
  return P() if axis is None else P(*[None] * axis, AXIS)


def value_and_grad(function, case):
  return jax.value_and_grad(function, argnums=tuple(range(case.differentiable)))


# name -> (function of a case and of its loss or formula -> tree of results)
def plain(case, function):
  return value_and_grad(function, case)(*case.args)


def jitted(case, function):
  return jax.jit(value_and_grad(function, case))(*case.args)


def checkpointed(case, function):
  return jax.jit(value_and_grad(jax.checkpoint(function), case))(*case.args)


def vmapped(case, function):
  stacked = [np.stack([arg, arg[..., ::-1]]) if np.ndim(arg) else np.stack([arg, arg])
             for arg in case.args]  # fmt: skip
  return jax.jit(jax.vmap(value_and_grad(function, case)))(*stacked)


def placed(mesh, case, split=True):
  return [
    jax.device_put(arg, NamedSharding(mesh, spec(axis if split else None)))
    for arg, axis in zip(case.args, case.axes, strict=True)
  ]


def on_mesh(kind, context, case, function):
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh) if context else contextlib.nullcontext():
    return jax.jit(value_and_grad(function, case))(*placed(mesh, case))


def eagerly_on_mesh(kind, case, function):
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    return value_and_grad(function, case)(*placed(mesh, case))


def mapped(check_vma, inside, case, function):
  """Compute the loss of each device, differentiated inside or outside the map."""
  specs = tuple(map(spec, case.axes))
  mean = lambda x: jax.lax.pmean(x, AXIS)
  options = {"mesh": mesh_of(AxisType.Auto), "in_specs": specs, "check_vma": check_vma}
  if inside:

    def local(*args):
      value, grads = value_and_grad(function, case)(*args)
      split = zip(grads, case.axes, strict=False)
      return mean(value), tuple(g if a is not None else mean(g) for g, a in split)

    out_specs = (P(), specs[: case.differentiable])
    return jax.jit(jax.shard_map(local, out_specs=out_specs, **options))(*case.args)
  outside = jax.shard_map(lambda *args: mean(function(*args)), out_specs=P(), **options)
  return jax.jit(value_and_grad(outside, case))(*case.args)


def pmapped(case, function):
  args = [
    arg if axis is None else np.stack(np.split(arg, 2, axis))
    for arg, axis in zip(case.args, case.axes, strict=True)
  ]
  axes = tuple(None if axis is None else 0 for axis in case.axes)
  return jax.pmap(value_and_grad(function, case), in_axes=axes, devices=jax.devices()[:2])(*args)


CONTEXTS = {
  "eager": plain,
  "jit": jitted,
  "checkpoint": checkpointed,
  "vmap": vmapped,
  "auto mesh": functools.partial(on_mesh, AxisType.Auto, True),
  "explicit mesh": functools.partial(on_mesh, AxisType.Explicit, True),
  "explicit arrays": functools.partial(on_mesh, AxisType.Explicit, False),
  "explicit eager": functools.partial(eagerly_on_mesh, AxisType.Explicit),
  "shard_map": functools.partial(mapped, True, True),
  "grad of shard_map": functools.partial(mapped, True, False),
  "shard_map unchecked": functools.partial(mapped, False, True),
  "grad of shard_map unchecked": functools.partial(mapped, False, False),
  "pmap": pmapped,
}


def close(found, expected, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.fixture
def x64():
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


# All pairs take minutes. Without OV_ALL_CONTEXTS=1, all losses run in the contexts with stricter
# array types, and two losses in all contexts.
STRICT = ("explicit mesh", "shard_map", "grad of shard_map")
PAIRS = [
  (name, context)
  for name in CASES
  for context in CONTEXTS
  if os.environ.get("OV_ALL_CONTEXTS") == "1"
  or context in STRICT
  or name in ("caption", "softmax gathered")
]


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_value_and_gradient_are_those_of_the_naive_formula(name, context):
  case, run = CASES[name], CONTEXTS[context]
  # The naive references use indexing that Explicit axes do not support.
  expected = (jitted if "explicit" in context or "mesh" in context else run)(case, case.naive)
  close(run(case, case.loss), expected)


@pytest.mark.parametrize("context", ["explicit mesh", "shard_map"])
@pytest.mark.parametrize("name", ["caption", "likelihood", "softmax gathered", "sigmoid ring"])
def test_bfloat16(name, context):
  case = cases(jnp.bfloat16)[name]
  run = CONTEXTS[context]
  expected = (jitted if "explicit" in context else run)(case, case.naive)
  close(run(case, case.loss), expected, tolerance=0.03)  # bfloat16 has 8 bits


@pytest.mark.parametrize("context", ["jit", "explicit mesh", "shard_map"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "sigmoid gathered"])
def test_x64_keeps_float32(x64, name, context):
  case = CASES[name]
  args = tuple(a.astype(np.int64) if a.dtype == np.int32 else a for a in case.args)
  value, grads = CONTEXTS[context](case._replace(args=args), case.loss)
  assert {x.dtype for x in jax.tree.leaves((value, grads))} == {jnp.dtype("float32")}
  jax.config.update("jax_enable_x64", False)
  close((value, grads), CONTEXTS[context](case, case.loss))


@pytest.mark.parametrize("name", CASES)
def test_float64_raises_a_one_line_error(x64, name):
  case = CASES[name]
  args = [a.astype(np.float64) if a.dtype == np.float32 else a for a in case.args]
  with pytest.raises(ValueError, match=r"float64.*expected .*float32 or .*bfloat16; cast") as e:
    case.loss(*args)
  assert "\n" not in str(e.value)


def test_float64_of_numpy_becomes_float32_as_everywhere_in_jax():
  case = CASES["softmax gathered"]
  args = [a.astype(np.float64) if a.dtype == np.float32 else a for a in case.args]
  close(case.loss(*args), case.loss(*case.args))


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name, differentiated):
  case = CASES[name]
  args = [
    a if axis is None else a[(slice(None),) * axis + (slice(0, 0),)]
    for a, axis in zip(case.args, case.axes, strict=True)
  ]
  if not differentiated:
    assert case.loss(*args) == 0.0
    return
  value, grads = jitted(case._replace(args=tuple(args)), case.loss)
  assert value == 0.0
  for grad, arg in zip(grads, args, strict=False):
    assert grad.shape == arg.shape and not np.any(grad)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one(name):
  case = CASES[name]
  args = [
    a if axis is None else a[(slice(None),) * axis + (slice(0, 1),)]
    for a, axis in zip(case.args, case.axes, strict=True)
  ]
  case = case._replace(args=tuple(args))
  close(jitted(case, case.loss), jitted(case, case.naive))


def test_texts_without_tokens():
  hidden, head = np.ones((2, 0, 3), np.float32), np.ones((3, 4), np.float32)
  ids = np.zeros((2, 0), np.int32)
  targets, mask = ov_losses.shift_left(ids, 0)
  out = ov_losses.caption_cross_entropy(hidden, head, targets, mask)
  assert out.loss == 0 and out.num_tokens == 0
  found = ov_losses.sequence_log_likelihood(hidden, head, ids, mask)
  np.testing.assert_array_equal(found, [0.0, 0.0])
  assert ov_losses.text_groups(ids).shape == (2,)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("context", ["jit", "explicit", "shard_map", "shard_map unchecked", "pmap"])
def test_gradient_cache(kind, context):
  image, texts, scale, ids = CASES[f"{kind} gathered"].args
  axes = (0, 1, None, 0)

  def direct(params, image, texts, ids):
    own = jnp.mean(image**2) * params["scale"]
    loss = naive_contrastive(kind, params["image"] * image, texts, params["scale"], ids)
    return own + loss

  def expected(image, texts, scale, ids):
    params = {"image": jnp.ones(WIDTH), "scale": jnp.asarray(scale)}
    return jax.value_and_grad(direct)(params, image, texts, ids)

  def found(*args):
    grads, out = accumulated(kind, *args)
    return out.loss, grads

  halves = [(image[i : i + 2], texts[:, i : i + 2], scale, ids[i : i + 2]) for i in (0, 2)]
  if context == "jit":
    close(jax.jit(found)(image, texts, scale, ids), expected(image, texts, scale, ids))
  elif context == "explicit":
    mesh = mesh_of(AxisType.Explicit)
    case = Case(found, None, (image, texts, scale, ids), axes, 3)

    def spread(x, axis):  # microbatch j of the rows of each device
      return x if axis is None else jnp.concatenate([x], axis)

    args = [spread(x, a) for x, a in zip(placed(mesh, case, split=False), axes, strict=True)]
    with jax.set_mesh(mesh):
      close(jax.jit(found)(*args), expected(image, texts, scale, ids))
  elif context == "pmap":
    stacked = [None if a is None else np.stack(np.split(x, 2, a))
               for x, a in zip((image, texts, scale, ids), axes, strict=True)]  # fmt: skip
    stacked[2] = np.stack([scale, scale])
    results = jax.pmap(found, devices=jax.devices()[:2])(*stacked)
    for i in (0, 1):
      close(jax.tree.map(lambda x: x[i], results), expected(*halves[i]))  # noqa: B023
  else:
    checked = context == "shard_map"
    shard = lambda f: jax.jit(jax.shard_map(
      lambda *args: jax.lax.pmean(f(*args), AXIS), mesh=mesh_of(AxisType.Auto), out_specs=P(),
      in_specs=tuple(map(spec, axes)), check_vma=checked,
    ))  # fmt: skip
    got, want = shard(found)(image, texts, scale, ids), shard(expected)(image, texts, scale, ids)
    close(got, want)


def test_gradient_cache_with_split_rows_and_params_on_explicit_axes():
  mesh = mesh_of(AxisType.Explicit)
  rows = NamedSharding(mesh, P(None, AXIS))
  normal, _ = arrays()
  params = {"w": jax.device_put(normal(WIDTH, 6), NamedSharding(mesh, P(None, AXIS)))}
  batches = {"x": jax.device_put(normal(2, 4, WIDTH), rows)}
  split = jax.tree.map(lambda p: p.sharding, params)

  def embed(params, batch, key):
    del key
    w = jax.sharding.reshard(params["w"], P())
    return batch["x"] @ w, (jnp.float32(0), jnp.float32(0), {})

  def combine(params, rows):
    return ov_losses.contrastive_softmax(rows[:, :3], rows[:, 3:], jnp.float32(2)).loss, 1.0, {}

  def direct(w, x):
    rows = np.swapaxes(x, 0, 1).reshape(-1, WIDTH) @ w
    return ov_losses.contrastive_softmax(rows[:, :3], rows[:, 3:], jnp.float32(2)).loss

  with jax.set_mesh(mesh):
    step = lambda p, b: ov_losses.gradient_cache(
      embed, combine, p, b, jax.random.key(0), shardings=split
    )
    grads, out = jax.jit(step)(params, batches)
  w, x = np.asarray(params["w"]), np.asarray(batches["x"])
  value, grad = jax.value_and_grad(direct)(w, x)
  close((out.loss, grads["w"]), (value, grad))
  assert grads["w"].sharding.spec == P(None, AXIS)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if "naive" not in name][2:])
def test_forms_over_a_custom_mesh(name, kind, context):
  case, mesh = CASES[name], mesh_of(kind)
  loss_kind, form = name.split()

  def loss(image, texts, scale, ids):
    function = {"softmax": ov_losses.contrastive_softmax, "sigmoid": ov_losses.contrastive_sigmoid}
    bias = () if loss_kind == "softmax" else (scale - 12.0,)
    return function[loss_kind](
      unit(image), unit(texts), scale, *bias, text_groups=ov_losses.text_groups(ids),
      form=form, mesh=mesh, axes=(AXIS,), chunk=2,
    ).loss  # fmt: skip

  with jax.set_mesh(mesh) if context else contextlib.nullcontext():
    found = jax.jit(value_and_grad(loss, case))(*placed(mesh, case))
  close(found, jitted(case, case.naive))
  with jax.set_mesh(mesh) if context else contextlib.nullcontext():
    empty = jax.jit(loss)(np.ones((0, 4), np.float32), np.ones((1, 0, 4), np.float32),
                          np.float32(1), np.zeros((0, 3), np.int32))  # fmt: skip
  assert empty == 0.0


@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_mesh_inside_shard_map_raises_a_one_line_error(form):
  mesh = mesh_of(AxisType.Auto)
  loss = lambda x: ov_losses.contrastive_softmax(x, x, 1.0, form=form, mesh=mesh, axes=(AXIS,)).loss
  mapped = jax.shard_map(loss, mesh=mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)
  with pytest.raises(ValueError, match=r"mesh=\('d',\) inside jax.shard_map .* pass mesh=None"):
    mapped(np.ones((4, 3), np.float32))


def test_limits_and_groups_keep_their_dtypes(x64):
  assert ov_losses.clamp_log_scale(jnp.float32(9), 100.0).dtype == jnp.float32
  ids = np.arange(6).reshape(2, 3)
  groups = ov_losses.text_groups(ids)
  assert groups.dtype == jnp.int32
  np.testing.assert_array_equal(groups, ov_losses.text_groups(ids.astype(np.int32)))
  image = np.eye(2, dtype=np.float32)
  wide = ov_losses.contrastive_softmax(image, image, 1.0, text_groups=np.array([5, 5]))
  assert wide.mean_negative == 0.0  # int64 numbers work as well
