"""Peak memory of the tiled loss against the naive form, from the compiler; nothing is run.

  python -m ov_losses.memory_report --batch=64 --tokens=127 --width=768 --vocab=32000

Prints one row per dtype: MiB (2^20 bytes) of temporaries in the compiled value-and-gradient, that
is, what it allocates beside its arguments and results. With `pip install libtpu` it compiles for a
TPU that need not be there: `TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu ... --topology=v5e:2x2`.
"""

import argparse

import jax
import jax.numpy as jnp

from ov_losses import compiled
from ov_losses.caption import caption_cross_entropy
from ov_losses.compiled import MIB
from ov_losses.naive import naive_loss


def value_and_gradients(form: str, tile: int | None = None) -> jax.stages.Wrapped:
  """Jitted: hidden, head, labels, mask -> loss and its gradients by the first two.

  Args:
    form: which loss, "naive" or "tiled".
    tile: token columns at a time, for "tiled".
  """

  def loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    if form == "naive":
      return naive_loss(hidden, head, labels, mask)
    return caption_cross_entropy(hidden, head, labels, mask, tile=tile).loss

  return jax.jit(jax.value_and_grad(loss, (0, 1)))


def temporary_bytes(
  form: str,
  batch: int,
  tokens: int,
  width: int,
  vocab: int,
  dtype: str,
  tile: int | None = None,
  device: jax.Device | None = None,
) -> int:
  """Bytes of temporaries in the compiled value-and-gradient of `form`, "naive" or "tiled".

  Args:
    form: which loss.
    batch: B.
    tokens: T.
    width: D.
    vocab: V.
    dtype: of the hidden states; the head is float32.
    tile: token columns at a time, for "tiled".
    device: one to compile for, also of a topology; default: the first of this process.
  """
  sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
  arguments = (
    jax.ShapeDtypeStruct((batch, tokens, width), dtype, sharding=sharding),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32, sharding=sharding),
    jax.ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=sharding),
    jax.ShapeDtypeStruct((batch, tokens), jnp.bool_, sharding=sharding),
  )
  return compiled.temporary_bytes(value_and_gradients(form, tile).lower(*arguments))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--tokens", type=int, default=127)
  parser.add_argument("--width", type=int, default=768)
  parser.add_argument("--vocab", type=int, default=32000)
  parser.add_argument("--tile", type=int, default=None, help="most token columns; default 16")
  parser.add_argument("--topology", default=None, help="TPU to compile for, such as v5e:2x2")
  args = parser.parse_args()
  device = compiled.topology_devices(args.topology)[0]
  sizes = (args.batch, args.tokens, args.width, args.vocab)
  print(f"jax {jax.__version__}, {device.device_kind}; B, T, D, V = {sizes}")
  logits = args.batch * args.tokens * args.vocab * 4
  print(f"one float32 [B,T,V] array: {logits / MIB:,.0f} MiB")
  print(f"{'dtype':<10}{'naive MiB':>12}{'tiled MiB':>12}{'ratio':>8}")
  for dtype in ("float32", "bfloat16"):
    naive = temporary_bytes("naive", *sizes, dtype, device=device)
    tiled = temporary_bytes("tiled", *sizes, dtype, args.tile, device)
    print(f"{dtype:<10}{naive / MIB:>12,.0f}{tiled / MIB:>12,.0f}{naive / tiled:>8.1f}")


if __name__ == "__main__":
  main()
