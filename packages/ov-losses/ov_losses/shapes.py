"""Array types for signatures."""

from typing import TYPE_CHECKING

from jaxtyping import Array
import numpy as np

# Functions accept NumPy arrays and convert them; type checkers see JAX arrays.
if TYPE_CHECKING:
  AnyArray = Array
else:
  AnyArray = Array | np.ndarray
