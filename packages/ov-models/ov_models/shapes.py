"""Array types for signatures."""

from typing import TYPE_CHECKING

from jaxtyping import Array, Bool, Int
import numpy as np

# Functions accept NumPy arrays and convert them; type checkers see JAX arrays.
if TYPE_CHECKING:
  AnyArray = Array
else:
  AnyArray = Array | np.ndarray

# Segment ids: the image of a packed row that a token belongs to; see Tokens.
Segments = Bool[Array, "B T"] | Int[Array, "B T"]
