"""What every transformer of this package shares: its sizes, its options, and the checks on both.

Dimensions, everywhere: B batch, T tokens, D width, N heads, H head dim, F mlp, V vocab, L layers,
P patch, K kept tokens.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import math
import numbers
import reprlib
from typing import Any, Literal, TypeVar, cast

import jax.numpy as jnp

Config = TypeVar("Config")
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "offload"]
Implementation = Literal["xla", "cudnn", "tpu"]

DTYPES = ("float32", "bfloat16")
# Larger sizes are mistakes: they would fill any memory, or loop for years, before an error.
LARGEST_SIZE = 2**24
LARGEST_DEPTH = 4096
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
REMATS = ("none", "full", "dots", "offload")
IMPLEMENTATIONS = ("xla", "cudnn", "tpu")


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
  """Raises ValueError, with the nearest allowed value, unless `value` is in `allowed`."""
  allowed = tuple(allowed)
  if not isinstance(value, str) or value not in allowed:
    near = difflib.get_close_matches(str(value)[:99], map(str, allowed), n=1, cutoff=0.0)
    raise ValueError(
      f"{name}={shown(value)} is unknown; choose one of {', '.join(map(str, allowed))}"
      f" (nearest: {near[0]})."
    )


def check_ratio(name: str, value: float, *, zero: bool, one: bool) -> None:
  """Raises ValueError unless 0 < value < 1, where `zero` and `one` admit the ends."""
  if not is_number(value) or not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
    interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    raise ValueError(f"{name}={shown(value)} is out of range; give a fraction in {interval}.")


def check_size(name: str, value: Any, largest: int = LARGEST_SIZE) -> None:
  """Raises ValueError unless `value` is an integer in [1, largest]."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{name}={shown(value)} must be a positive integer.")
  if value > largest:
    raise ValueError(f"{name}={shown(value)} is too large; expected at most {largest}.")


def check_finite(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is a finite number."""
  if not is_number(value) or not math.isfinite(value):
    raise ValueError(f"{name}={shown(value)}; expected a finite number.")


def check_flag(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is a bool."""
  if not isinstance(value, bool):
    raise ValueError(f"{name}={shown(value)}; expected True or False.")


def check_part(name: str, value: Any, *kinds: type) -> None:
  """Raises ValueError unless `value`, a part of a config, is of one of `kinds`."""
  if not isinstance(value, kinds):
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"{name} is a {type(value).__name__}; expected a {names}.")


def is_number(value: Any) -> bool:
  """Whether `value` is a real number, bools not counted."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
  """repr of a value in one line of at most 60 characters, for messages."""
  if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print very long ones
    return f"an integer of {value.bit_length()} bits"
  return " ".join(_repr.repr(value).split())[:60]


def variant_sizes(
  kind: str, name: str, table: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, int]:
  """Looks up `name` in a table of (width, depth, mlp_dim, num_heads)."""
  check_choice(f"{kind} variant", name, table)
  return dict(zip(("width", "depth", "mlp_dim", "num_heads"), table[name], strict=True))


def from_fields(kind: type[Config], fields: Mapping[str, Any]) -> Config:
  """kind(**fields), where a field that `kind` lacks or needs is a ValueError."""
  known = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
  for name in fields:
    check_choice(f"field of {kind.__name__}", name, known)
  required = (f.name for f in known.values() if f.default is dataclasses.MISSING)
  if missing := [name for name in required if name not in fields]:
    raise ValueError(f"{kind.__name__} misses the fields {', '.join(missing)}.")
  return kind(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Sizes and options of a stack of pre-norm blocks.

  Attributes:
    width: D, of the residual stream.
    depth: L, number of blocks.
    mlp_dim: F, hidden width of the MLP.
    num_heads: N; D must be a multiple of it.
    dtype: compute dtype of the blocks. Parameters are float32 always.
    remat: what the backward pass keeps of a block: "none" its input and the results of all matmuls,
      so that none is made twice; "dots" not those of attention; "full" the input only; "offload" as
      "dots", in host memory. Norms, GELU and softmax are always made again: that costs less than
      to write them down and read them.
    attention: "xla" anywhere, "cudnn" on NVIDIA GPUs, "tpu" a Pallas kernel on TPUs.
    scan: run the stacked layers by `jax.lax.scan` (compile time independent of depth) or unrolled.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  dtype: Dtype = "float32"
  remat: Remat = "none"
  attention: Implementation = "xla"
  scan: bool = True

  def __post_init__(self) -> None:
    for name in ("width", "mlp_dim", "num_heads"):
      self._check_positive(name)
    check_size("depth", self.depth, LARGEST_DEPTH)
    check_flag("scan", self.scan)
    if self.width % self.num_heads:
      raise ValueError(
        f"width={self.width} is not a multiple of num_heads={self.num_heads}; "
        f"nearest width: {round_to_multiple(self.width, self.num_heads)}."
      )
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("remat", self.remat, REMATS)
    check_choice("attention", self.attention, IMPLEMENTATIONS)
    if self.attention == "cudnn" and self.dtype != "bfloat16":
      raise ValueError(
        f"attention='cudnn' computes in 16 bits but dtype={self.dtype!r}; "
        "set dtype='bfloat16' or attention='xla'."
      )

  def _check_positive(self, name: str) -> None:
    check_size(name, getattr(self, name))

  @property
  def head_dim(self) -> int:
    """H."""
    return self.width // self.num_heads

  @property
  def compute_dtype(self) -> jnp.dtype:
    """`dtype` as an object."""
    return jnp.dtype(self.dtype)


def round_to_multiple(value: int, of: int) -> int:
  """The multiple of `of` nearest to `value`, at least `of`."""
  return max(of, round(value / of) * of)
