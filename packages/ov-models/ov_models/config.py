"""Transformer configuration shared by all towers, and validation of config fields.

Dimensions: B batch, T tokens, D width, N heads, H head dim, F mlp, V vocab, L layers, P patch,
K kept tokens.
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
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
MlpKind = Literal["plain", "gated"]
NormKind = Literal["layer", "rms"]
QkvBias = Literal["all", "query_value", "none"]

DTYPES = ("float32", "bfloat16")
# Larger sizes are typos; without a limit they exhaust memory or time before an error.
LARGEST_SIZE = 2**24
LARGEST_DEPTH = 4096
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
REMATS = ("none", "full", "dots", "offload")
IMPLEMENTATIONS = ("xla", "cudnn", "tpu")
# Values of the block options, by field of TransformerConfig.
_BLOCK_CHOICES = {
  "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
  "mlp": ("plain", "gated"),
  "norm": ("layer", "rms"),
  "qkv_bias": ("all", "query_value", "none"),
}
_BLOCK_FLAGS = ("out_bias", "mlp_bias", "qk_norm", "attention_gate")


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
  """Raise ValueError with the nearest allowed value unless `value` is in `allowed`."""
  allowed = tuple(allowed)
  if not isinstance(value, str) or value not in allowed:
    near = difflib.get_close_matches(str(value)[:99], map(str, allowed), n=1, cutoff=0.0)
    raise ValueError(
      f"{name}={shown(value)} is unknown; choose one of {', '.join(map(str, allowed))}"
      f" (nearest: {near[0]})."
    )


def check_ratio(name: str, value: float, *, zero: bool, one: bool) -> None:
  """Raise ValueError unless 0 < value < 1; `zero` and `one` include the bounds."""
  if not is_number(value) or not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
    interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    raise ValueError(f"{name}={shown(value)} is out of range; give a fraction in {interval}.")


def check_size(name: str, value: Any, largest: int = LARGEST_SIZE) -> None:
  """Raise ValueError unless `value` is an integer in [1, largest]."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{name}={shown(value)} must be a positive integer.")
  if value > largest:
    raise ValueError(f"{name}={shown(value)} is too large; expected at most {largest}.")


def check_finite(name: str, value: Any) -> None:
  """Raise ValueError unless `value` is a finite number."""
  if not is_number(value) or not math.isfinite(value):
    raise ValueError(f"{name}={shown(value)}; expected a finite number.")


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """Raise ValueError unless `value` is a number in [low, high]."""
  if not is_number(value) or not low <= value <= high:
    raise ValueError(f"{name}={shown(value)}; expected a number from {low:g} to {high:g}.")


def check_flag(name: str, value: Any) -> None:
  """Raise ValueError unless `value` is a bool."""
  if not isinstance(value, bool):
    raise ValueError(f"{name}={shown(value)}; expected True or False.")


def check_part(name: str, value: Any, *kinds: type) -> None:
  """Raise ValueError unless `value` is an instance of one of `kinds`."""
  if not isinstance(value, kinds):
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"{name} is a {type(value).__name__}; expected a {names}.")


def is_number(value: Any) -> bool:
  """Return whether `value` is a real number and not a bool."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
  """Return the repr of a value in one line of at most 60 characters, for error messages."""
  if isinstance(value, int) and value.bit_length() > 200:  # Python cannot print very long integers
    return f"an integer of {value.bit_length()} bits"
  return " ".join(_repr.repr(value).split())[:60]


def variant_sizes(
  kind: str, name: str, table: Mapping[str, tuple[int, int, int, int]]
) -> dict[str, int]:
  """Return the sizes of variant `name` from a table of (width, depth, mlp_dim, num_heads)."""
  check_choice(f"{kind} variant", name, table)
  return dict(zip(("width", "depth", "mlp_dim", "num_heads"), table[name], strict=True))


def from_fields(kind: type[Config], fields: Mapping[str, Any]) -> Config:
  """Return kind(**fields); raise ValueError for unknown or missing fields."""
  known = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
  for name in fields:
    check_choice(f"field of {kind.__name__}", name, known)
  required = (f.name for f in known.values() if f.default is dataclasses.MISSING)
  if missing := [name for name in required if name not in fields]:
    raise ValueError(f"{kind.__name__} is missing the fields {', '.join(missing)}.")
  return kind(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Sizes and options of a stack of pre-norm blocks.

  Attributes:
    width: width D of the residual stream.
    depth: number L of blocks.
    mlp_dim: hidden width F of the MLP.
    num_heads: number N of attention heads; must divide D.
    dtype: compute dtype of the blocks. Parameters are always float32.
    remat: rematerialisation policy of each block. "none": save the input and all matmul outputs;
      "dots": without those of attention; "offload": "dots" in host memory; "full": save the input
      only. Norms, GELU and softmax are always recomputed, which is cheaper than memory traffic.
    attention: implementation: "xla" on any device, "cudnn" on NVIDIA GPUs, "tpu" a Pallas kernel.
    scan: run the stacked layers by `jax.lax.scan` (compile time independent of depth) or unrolled.
    activation: activation of the MLP: exact GELU, its tanh approximation, x * sigmoid(1.702 x)
      (quick_gelu, https://arxiv.org/abs/2103.00020), or SiLU.
    mlp: "plain": down(act(up(x))), or "gated": down(act(gate(x)) * up(x)), which is SwiGLU
      (https://arxiv.org/abs/2002.05202) with activation "silu".
    norm: "layer" (LayerNorm) or "rms" (RMSNorm, https://arxiv.org/abs/1910.07467).
    norm_eps: epsilon of all norms.
    qkv_bias: biases of the attention inputs; "query_value": none of the keys.
    out_bias: whether the attention output has a bias.
    mlp_bias: whether the layers of the MLP have biases.
    qk_norm: whether each head's queries and keys are normalised, with learned scales.
    attention_gate: whether attended values are multiplied by the sigmoid of a projection of the
      block's input, channel by channel, before the attention output.
    layer_scale: initial value of learned per-channel factors of both branches of a block
      (https://arxiv.org/abs/2103.17239); None for no factors.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  dtype: Dtype = "float32"
  remat: Remat = "none"
  attention: Implementation = "xla"
  scan: bool = True
  activation: Activation = "gelu_tanh"
  mlp: MlpKind = "plain"
  norm: NormKind = "layer"
  norm_eps: float = 1e-6
  qkv_bias: QkvBias = "all"
  out_bias: bool = True
  mlp_bias: bool = True
  qk_norm: bool = False
  attention_gate: bool = False
  layer_scale: float | None = None

  def __post_init__(self) -> None:
    for name in ("width", "mlp_dim", "num_heads"):
      self._check_positive(name)
    check_size("depth", self.depth, LARGEST_DEPTH)
    check_flag("scan", self.scan)
    for name, allowed in _BLOCK_CHOICES.items():
      check_choice(name, getattr(self, name), allowed)
    for name in _BLOCK_FLAGS:
      check_flag(name, getattr(self, name))
    check_ratio("norm_eps", self.norm_eps, zero=False, one=False)
    if self.layer_scale is not None:
      check_range("layer_scale", self.layer_scale, -1e3, 1e3)
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
    """Return the width H of a head."""
    return self.width // self.num_heads

  @property
  def compute_dtype(self) -> jnp.dtype:
    """Return `dtype` as a jnp.dtype."""
    return jnp.dtype(self.dtype)


def round_to_multiple(value: int, of: int) -> int:
  """Return the positive multiple of `of` nearest to `value`."""
  return max(of, round(value / of) * of)
