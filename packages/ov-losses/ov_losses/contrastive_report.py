"""Do the forms of the contrastive losses agree, and what do they cost? Three tables.

  python -m ov_losses.contrastive_report  # all three, some minutes on two CPU cores
  python -m ov_losses.contrastive_report --tables=memory --batch=32768 --width=768

  agreement   largest difference to the formula in float64, of the loss and of every gradient, as a
              share of the largest entry there. Small arrays, run.
  memory      MiB (2^20 bytes) of temporaries on each device in the compiled value-and-gradient,
              that is, what it allocates beside its arguments and results. Nothing is run.
  compile     seconds to trace, lower and compile it, for three local batches; the better of two.

On CPU it simulates `--devices` devices. With `pip install libtpu` it compiles for a TPU that need
not be there: `TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu ... --topology=v5e:2x4 --tables=memory`.
"""

import argparse
from collections.abc import Sequence
import time
from typing import get_args

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from ov_losses import compiled
from ov_losses.compiled import MIB
from ov_losses.contrastive import contrastive_sigmoid, contrastive_softmax
from ov_losses.contrastive_truth import Example, example, truth
from ov_losses.similarity_blocks import Kind
from ov_losses.similarity_forms import Form

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES = ("float32", "bfloat16")
TABLES = ("agreement", "memory", "compile")
LOCAL_BATCHES = (64, 512, 4096)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """All devices on the data axis."""
  types = (AxisType.Auto,)
  return jax.make_mesh((len(devices),), ("data",), axis_types=types, devices=devices)


def value_and_gradients(kind: Kind, form: Form, mesh: Mesh) -> jax.stages.Wrapped:
  """Jitted: the entries of `Example` -> loss and its gradients by the first four of them."""

  def loss(
    image: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    valid: jax.Array,
    groups: jax.Array,
  ) -> jax.Array:
    if kind == "softmax":
      return contrastive_softmax(
        image, texts, scale, valid=valid, text_groups=groups, form=form, mesh=mesh
      ).loss
    return contrastive_sigmoid(
      image, texts, scale, bias, valid=valid, text_groups=groups, form=form, mesh=mesh
    ).loss

  split, per_row, everywhere = (NamedSharding(mesh, s) for s in (P("data"), P(None, "data"), P()))
  places = (split, per_row, everywhere, everywhere)
  return jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2, 3)),
    in_shardings=(*places, split, per_row),
    out_shardings=(everywhere, places),
  )


def lowered(
  kind: Kind, form: Form, mesh: Mesh, batch: int, width: int, dtype: str
) -> jax.stages.Lowered:
  """The value-and-gradient for one text per image, without arrays."""
  shape = jax.ShapeDtypeStruct
  return value_and_gradients(kind, form, mesh).lower(
    shape((batch, width), dtype),
    shape((1, batch, width), dtype),
    shape((), "float32"),
    shape((), "float32"),
    shape((batch,), "bool"),
    shape((1, batch), "int32"),
  )


def differences(kind: Kind, form: Form, mesh: Mesh, given: Example) -> list[float]:
  """Largest of the loss and each gradient, as a share of the largest entry; softmax has no bias."""
  loss, grads = value_and_gradients(kind, form, mesh)(*given)
  want = truth(kind, given)
  as_arrays = lambda *numbers: [np.asarray(x, np.float64) for x in numbers]
  pairs = zip(as_arrays(loss, *grads), as_arrays(want.loss, *want.gradients), strict=True)
  used = list(pairs)[: 4 if kind == "softmax" else 5]
  return [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in used]


def print_agreement(meshes: Sequence[Mesh], batch: int = 256, width: int = 64) -> None:
  num_texts = 2
  print(f"\nAgreement: B, K, E = {batch}, {num_texts}, {width}; a fifth of the rows not valid")
  names = ("loss", "image", "texts", "scale", "bias")
  print(f"{'':<9}{'dtype':<10}{'form':<10}{'devices':<8}" + "".join(f"{n:>9}" for n in names))
  for kind in KINDS:
    for dtype in DTYPES:
      given = example(batch, num_texts, width, jax.numpy.dtype(dtype))
      for form in FORMS:
        for mesh in meshes:
          cells = [f"{x:>9.0e}" for x in differences(kind, form, mesh, given)]
          print(f"{kind:<9}{dtype:<10}{form:<10}{mesh.size:<8}" + "".join(cells))


def print_memory(mesh: Mesh, batch: int, width: int) -> None:
  print(f"\nMemory: global B, E = {batch}, {width}; MiB of temporaries on each device")
  print(f"one float32 [B / {mesh.size}, B] array: {batch // mesh.size * batch * 4 / MIB:,.0f}")
  print(f"{'':<9}{'dtype':<10}" + "".join(f"{form:>10}" for form in FORMS))
  for kind in KINDS:
    for dtype in DTYPES:
      programs = [lowered(kind, form, mesh, batch, width, dtype) for form in FORMS]
      cells = [f"{compiled.temporary_bytes(p) / MIB:>10,.0f}" for p in programs]
      print(f"{kind:<9}{dtype:<10}" + "".join(cells))


def compile_seconds(kind: Kind, form: Form, mesh: Mesh, batch: int, width: int) -> float:
  start = time.perf_counter()
  lowered(kind, form, mesh, batch, width, "float32").compile()
  return time.perf_counter() - start


def print_compile_time(mesh: Mesh, width: int) -> None:
  print(f"\nCompile time: float32, E = {width}; seconds for a local batch of")
  print(f"{'':<9}{'form':<10}" + "".join(f"{local:>8}" for local in LOCAL_BATCHES))
  for kind in KINDS:
    for form in FORMS:
      batches = [local * mesh.size for local in LOCAL_BATCHES]
      times = [[compile_seconds(kind, form, mesh, b, width) for b in batches] for _ in range(2)]
      print(f"{kind:<9}{form:<10}" + "".join(f"{min(s):>8.2f}" for s in zip(*times, strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--tables", default=",".join(TABLES), help="which, with commas between")
  parser.add_argument("--batch", type=int, default=32768, help="global batch of the memory table")
  parser.add_argument("--width", type=int, default=768, help="E of memory and compile time")
  parser.add_argument("--devices", type=int, default=8, help="how many CPU devices to simulate")
  parser.add_argument("--topology", default=None, help="TPU to compile for, such as v5e:2x4")
  args = parser.parse_args(argv)
  tables = args.tables.split(",")
  if not set(tables) <= set(TABLES):
    parser.error(f"--tables={args.tables}; expected some of {','.join(TABLES)}")
  if args.topology and "agreement" in tables:
    parser.error("agreement is run, and a topology can only be compiled for; name other --tables")
  if not args.topology:
    jax.config.update("jax_num_cpu_devices", args.devices)
  devices = compiled.topology_devices(args.topology)
  mesh = make_mesh(devices)
  if args.batch % mesh.size:
    parser.error(f"--batch={args.batch}; expected a multiple of {mesh.size}, the devices")
  print(f"jax {jax.__version__}, {mesh.size} devices, {devices[0].device_kind}")
  if "agreement" in tables:
    print_agreement([make_mesh(devices[:1]), mesh])
  if "memory" in tables:
    print_memory(mesh, args.batch, args.width)
  if "compile" in tables:
    print_compile_time(mesh, args.width)


if __name__ == "__main__":
  main()
