"""Peak memory of the tiled loss against the naive form, from the compiler; nothing is run.

  python -m ov_losses.memory_report --batch=64 --tokens=127 --width=768 --vocab=32000

Prints one row per form and dtype. `temporaries` is what the compiled value-and-gradient allocates
beside its arguments and results; at 1 MiB = 2^20 bytes.
"""

import argparse

import jax
import jax.numpy as jnp

from ov_losses.caption import caption_cross_entropy
from ov_losses.naive import naive_loss

MIB = 2**20


def temporary_bytes(
  form: str, batch: int, tokens: int, width: int, vocab: int, dtype: str, tile: int | None = None
) -> int:
  """Bytes of temporaries in the compiled value-and-gradient of `form`, "naive" or "tiled"."""

  def loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    if form == "naive":
      return naive_loss(hidden, head, labels, mask)
    return caption_cross_entropy(hidden, head, labels, mask, tile=tile).loss

  arguments = (
    jax.ShapeDtypeStruct((batch, tokens, width), dtype),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
    jax.ShapeDtypeStruct((batch, tokens), jnp.bool_),
  )
  compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
  analysis = compiled.memory_analysis()
  if analysis is None:
    raise RuntimeError(f"the {jax.default_backend()} compiler has no memory analysis; use cpu.")
  return analysis.temp_size_in_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--tokens", type=int, default=127)
  parser.add_argument("--width", type=int, default=768)
  parser.add_argument("--vocab", type=int, default=32000)
  parser.add_argument("--tile", type=int, default=None)
  args = parser.parse_args()
  sizes = (args.batch, args.tokens, args.width, args.vocab)
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; B, T, D, V = {sizes}")
  logits = args.batch * args.tokens * args.vocab * 4
  print(f"one float32 [B,T,V] array: {logits / MIB:,.0f} MiB")
  print(f"{'dtype':<10}{'naive MiB':>12}{'tiled MiB':>12}{'ratio':>8}")
  for dtype in ("float32", "bfloat16"):
    naive = temporary_bytes("naive", *sizes, dtype)
    tiled = temporary_bytes("tiled", *sizes, dtype, args.tile)
    print(f"{dtype:<10}{naive / MIB:>12,.0f}{tiled / MIB:>12,.0f}{naive / tiled:>8.1f}")


if __name__ == "__main__":
  main()
